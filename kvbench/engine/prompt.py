"""A prompt that has passed through the model, as every policy takes it over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvbench.contract.layer import Layer
from kvbench.engine.spool import Spool, Spooled


@dataclass(frozen=True)
class PrefilledLayer:
    """What one governed layer made of the prompt: keys and values [B, G, n, d], padding included, and queries.

    `queries` [B, H, m, d] are those of the last m tokens.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    module: nn.Module
    scaling: float


class PrefilledLayers(Mapping[int, PrefilledLayer]):
    """The layers by number, in a temporary file; each is read when it is asked for, and not kept."""

    def __init__(self) -> None:
        self._spool = Spool()
        self._layers: dict[int, tuple[Spooled, Spooled, Spooled, nn.Module, float]] = {}

    def note(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Add a layer."""
        kept = (self._spool.put(queries), self._spool.put(keys), self._spool.put(values))
        self._layers[layer.number] = (*kept, layer.module, layer.scaling)

    def __getitem__(self, number: int) -> PrefilledLayer:
        queries, keys, values, module, scaling = self._layers[number]
        return PrefilledLayer(keys.load(), values.load(), queries.load(), module, scaling)

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
