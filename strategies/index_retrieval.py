"""Retrieval policies: a vector index over offloaded keys answers each head's query, whatever the index."""

from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from kvbench.budget import LayerBudget
from kvbench.indexes.base import Index
from kvbench.policy import KVCachePolicy, Layer, Selection
from kvbench.strategies.static_set import StaticSetOptions


class RetrievalOptions(StaticSetOptions):
    """Options of every retrieval policy, beside those of its index."""

    insert_every: int = Field(
        16,
        ge=0,
        description="tokens that leave the window for the index at a time; 0 keeps all new tokens in the window",
    )


class IndexRetrieval(KVCachePolicy):
    """Offloads all but the static set and attends, per query head, to the tokens that an index finds.

    Subclasses name their `index` and merge its options into their `Options`. With `insert_every` tokens beyond the
    window (fewer where the budget is tight), the oldest are offloaded and inserted into the index, so that the tokens
    attended stay at the budget.
    """

    index: ClassVar[type[Index]]

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        fields = self.index.Options.model_fields
        self._index_options: Any = self.index.Options(**{name: getattr(self.options, name) for name in fields})
        self.query_window = None if self.index.uses_queries else 0

    def static_tokens(self, context: int) -> tuple[int, int]:
        """Sinks and window, as the options say."""
        sinks, window = self.options.sizes()
        return sinks, window

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Offload the tokens between sinks and window and index their keys."""
        sinks, window = self.options.sizes()
        stop = layer.tokens - window
        if stop <= sinks:
            return
        layer.store.set_aside(sinks, stop, offload=True)
        index = self.index(self._index_options)
        index.build(
            layer.store.aside_keys.flatten(0, 1),
            queries.flatten(0, 1).cpu() if self.index.uses_queries else None,
            heads=layer.rows * layer.heads,
        )
        layer.state["index"] = index
        layer.store.index_bytes = index.nbytes

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Search the index with each head's query for what the budget leaves beside the static set."""
        if "index" not in layer.state:
            return Selection()
        store = layer.store
        available = store.aside_stop - store.aside_start
        wanted = budget.beside(store.static_tokens, available)
        if not wanted:
            return Selection()
        if wanted == available:
            return Selection(everything=True, evaluations=0.0)
        found = layer.state["index"].search(queries.flatten(0, 1).cpu(), wanted)
        ids = torch.from_numpy(found.ids).long().view(layer.rows, layer.heads, wanted)
        ids = torch.where(ids < 0, -1, ids + store.aside_start)
        evaluations = torch.from_numpy(found.evaluations).view(layer.rows, layer.heads)
        return Selection(ids, padded=True, evaluations=evaluations)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Move what has grown out of the window to the host and into the index."""
        every = self.options.insert_every
        if not every or "index" not in layer.state:
            return
        beyond = layer.store.static_tokens - sum(self.options.sizes())
        over_budget = layer.store.static_tokens > layer.budget.tokens and not layer.budget.covers_all
        if beyond >= every or over_budget:
            new, _ = layer.store.advance(beyond)
            layer.state["index"].insert(new.flatten(0, 1).cpu(), storage=layer.store.aside_keys.flatten(0, 1))
            layer.store.index_bytes = layer.state["index"].nbytes
