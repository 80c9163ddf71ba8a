"""Keys and values as a layer's attention sees them, made by the model's own code from what its cache holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from kvbench.engine.interface import capture


class Expansion:
    """Turns what a cache layer holds of tokens, such as latents, into their keys and values.

    The attention module itself does it: it is called for one token, with a cache that returns what shall be expanded,
    up to the call of its attention function.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cache: Cache | None,
        device: torch.device,
    ) -> None:
        """For an attention `module` on a `device` that was called with these arguments, `cache` among them."""
        self._module, self.device = module, device
        self._args = tuple(_one_token(value, cache) for value in args)
        self._kwargs = {name: _one_token(value, cache) for name, value in kwargs.items()}

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, H, t, d] and values [B, H, t, e], on the model's device, of what is held, two [B, G, t, r]."""
        if not keys.shape[2]:  # the model's own code need not know how to expand nothing
            made = self(
                keys.new_zeros(*keys.shape[:2], 1, keys.shape[3]),
                values.new_zeros(*values.shape[:2], 1, values.shape[3]),
            )
            return made[0][:, :, :0], made[1][:, :, :0]
        past, rows = _Holding(keys.to(self.device), values.to(self.device)), keys.shape[0]
        args = tuple(_for_rows(value, past, rows) for value in self._args)
        kwargs = {name: _for_rows(value, past, rows) for name, value in self._kwargs.items()}
        with torch.no_grad():
            found = capture(self._module, args, kwargs)
        return found.key, found.value

    def gives(self, held_keys: Tensor, held_values: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether `keys` and `values` are what is made of what is held, looking at the first and the last token.

        The model made them together with the tokens between, so rounding may differ.
        """
        places = sorted({0, keys.shape[2] - 1})
        near = 1e-2 if held_keys.element_size() < 4 else 1e-3
        made = self(held_keys[:, :, places], held_values[:, :, places])
        return all(
            torch.allclose(one.float(), other.float(), rtol=near, atol=near * float(other.float().abs().max()))
            for one, other in zip(made, (keys[:, :, places], values[:, :, places]), strict=True)
        )


class _Holding(Cache):
    """A cache that returns given tokens, whatever it is updated with."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._tokens = keys, values

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The given tokens."""
        return self._tokens


_CACHE = object()


def _one_token(value: Any, cache: Cache | None) -> Any:
    """An argument cut to the first row and token; the cache's place is marked."""
    if value is cache:
        return _CACHE
    if isinstance(value, tuple):
        return tuple(_one_token(part, cache) for part in value)
    if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == 1:
        return value[:, :1].clone()
    return value


def _for_rows(value: Any, past: Cache, rows: int) -> Any:
    """An argument of one row and token for several rows, with `past` in the cache's place."""
    if value is _CACHE:
        return past
    if isinstance(value, tuple):
        return tuple(_for_rows(part, past, rows) for part in value)
    if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == 1:
        return value.expand(rows, *value.shape[1:])
    return value
