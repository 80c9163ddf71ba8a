"""Rotary embedding as the attached model applies it, to any vectors at any positions, and its inverse."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.contract.errors import KVBenchError

_CHANGING = ("dynamic", "longrope")
"""Kinds whose frequencies depend on the length seen so far, so that stored keys cannot be rotated back."""


class Rotary:
    """The rotary embedding of one attention layer, found through transformers' conventions at first use.

    The model's own rotary module gives cos and sin, and the `apply_rotary_pos_emb` of the attention module's Python
    module applies them, so interleaved, partial and scaled (YaRN) variants come out as the model has them.
    """

    def __init__(self, model: nn.Module, config: Any, module: nn.Module, number: int, *, latent: bool = False) -> None:
        """For layer `number` of `model`, whose text configuration is `config` and whose attention is `module`.

        The keys of a `latent` layer are made of what its cache holds, which was rotated before.
        """
        self._model, self._config, self._module, self._number = model, config, module, number
        self._latent = latent

    def check(self) -> None:
        """Raise KVBenchError where the model has no rotary embedding that can be undone."""
        _ = self._function, self._source

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` [..., n, d] to `positions` [n]; raises KVBenchError where the model has no such embedding."""
        cos, sin = self._angles(positions)
        return self._apply(x, cos, sin)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo `rotate`: `x` [..., n, d] as it was before its rotation to `positions` [n], scaling included."""
        cos, sin = self._angles(positions)
        squared = cos.square() + sin.square()
        return self._apply(x, cos / squared, -sin / squared)

    def _apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        flat = x.reshape(1, -1, *x.shape[-2:]).float()
        function, single = self._function
        vectors = (flat,) if single else (flat, flat[:, :0])
        found = function(*vectors, cos=cos.to(x.device), sin=sin.to(x.device))
        rotated: Tensor = found if single else found[0]
        return rotated.to(x.dtype).view(x.shape)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        module, extra = self._source
        # The weights may lie nowhere between calls (accelerate's offloading); the frequencies stay.
        device = next((buffer.device for buffer in module.buffers()), positions.device)
        cos, sin = module(
            torch.empty(0, dtype=torch.float32, device=device), positions.to(device).reshape(1, -1), **extra
        )
        return cos, sin

    @cached_property
    def _function(self) -> tuple[Callable[..., Any], bool]:
        """What rotates, and whether it takes one tensor, not queries and keys."""
        function = getattr(sys.modules[type(self._module).__module__], "apply_rotary_pos_emb", None)
        if not callable(function):
            raise self._missing("its attention applies none by the usual name")
        names = list(inspect.signature(function).parameters)
        given = [name for name in names[:3] if name not in ("cos", "sin")]
        if not {"cos", "sin"} <= set(names) or given not in (["q", "k"], ["x"]):
            raise self._missing(f"its rotation takes ({', '.join(names)}), not queries and keys, cos and sin")
        return function, len(given) == 1

    @cached_property
    def _source(self) -> tuple[nn.Module, dict[str, Any]]:
        if self._latent:
            raise self._missing("its attention makes keys of what the cache holds after these were rotated")
        found = [
            module for module in self._model.modules()
            if type(module).__name__.endswith("RotaryEmbedding") and getattr(module, "config", None) is self._config
        ]  # fmt: skip
        if len(found) != 1:
            raise self._missing(f"{len(found)} rotary modules share its text configuration, not one")
        names = list(inspect.signature(found[0].forward).parameters)
        if names[:2] != ["x", "position_ids"] or not set(names[2:]) <= {"layer_type"}:
            raise self._missing(f"{type(found[0]).__name__} takes ({', '.join(names)}), not (x, position_ids)")
        kind: Any = getattr(found[0], "rope_type", "default")
        extra = {}
        if names[2:]:
            extra["layer_type"] = self._config.layer_types[self._number]
            kind = kind[extra["layer_type"]]
        if any(name in kind for name in _CHANGING):
            raise self._missing(f"its '{kind}' frequencies change with the length of the context")
        return found[0], extra

    def _missing(self, reason: str) -> KVBenchError:
        return KVBenchError(
            f"{type(self._model).__name__} has no rotary embedding that can be undone in layer {self._number}: "
            f"{reason}. Choose a policy that does not need keys before rotation, or another model."
        )
