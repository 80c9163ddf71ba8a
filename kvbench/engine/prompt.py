"""A prompt that has passed through the model, as every policy takes it over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.contract.layer import Layer
from kvbench.engine.spool import Spool, Spooled


def finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; a finite sum shows it in a thirtieth of the time, unless it overflows."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


@dataclass(frozen=True)
class Attends:
    """How a layer's attention module attends; see `kvbench.contract.layer.Layer`."""

    module: nn.Module
    heads: int
    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, query: Tensor, arguments: dict[str, Any]) -> Attends:
        """From a call of its attention function, for queries [B, H, m, d]."""
        return cls(
            module, query.shape[1], arguments.get("scaling") or query.shape[3] ** -0.5, arguments.get("softcap"),
            arguments.get("s_aux"),
        )  # fmt: skip


@dataclass(frozen=True)
class PrefilledLayer:
    """What one governed layer made of the prompt: keys and values as the cache holds them, [B, G, n, d], and queries.

    Padding is included; `queries` [B, H, m, d] are those of the last m tokens.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    attends: Attends


class PrefilledLayers(Mapping[int, PrefilledLayer]):
    """The layers by number, in a temporary file; each is read when it is asked for, and not kept."""

    def __init__(self) -> None:
        self._spool = Spool()
        self._layers: dict[int, tuple[Spooled, Spooled, Spooled, Attends]] = {}

    def note(self, layer: Layer, queries: Tensor) -> None:
        """Add a layer whose store holds the whole prompt, and its `queries`."""
        keys, values = layer.store.raw()
        kept = (self._spool.put(queries), self._spool.put(keys), self._spool.put(values))
        attends = Attends(layer.module, layer.heads, layer.scaling, layer.softcap, layer.sink_logits)
        self._layers[layer.number] = (*kept, attends)

    def __getitem__(self, number: int) -> PrefilledLayer:
        queries, keys, values, attends = self._layers[number]
        return PrefilledLayer(keys.load(), values.load(), queries.load(), attends)

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def queries(self) -> int:
        """How many of the prompt's last queries each layer has."""
        return min((queries.shape[2] for queries, *_ in self._layers.values()), default=0)


@dataclass(frozen=True)
class Prefill:
    """A prompt of `ids` [B, n], left-padded where `mask` [B, n] is 0, as every policy takes it over.

    Its first `border` tokens were a pass of their own. `logits` [B, V] are those of the last token; `others` the caches
    of layers that no policy governs, by number; `seconds` what the pass took, `reused` the tokens that were taken from
    another prompt's.
    """

    ids: Tensor
    mask: Tensor | None
    border: int
    layers: PrefilledLayers
    others: dict[int, Any]
    logits: Tensor
    seconds: float
    reused: int = 0
