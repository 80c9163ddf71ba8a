"""Policies of a third party, each of which needs one more part of the contract than hooks at a decoding step."""

import torch
from pydantic import Field

import kvbench


class EveryOther(kvbench.KVCachePolicy):
    """Governs every other full-attention layer and keeps the most recent tokens there."""

    name = "every_other"
    summary = "Keeps the most recent tokens in every other layer; the layers between stay exact."
    query_window = 0

    class Options(kvbench.Options):
        """Options of the policy."""

        first: int = Field(1, ge=0, le=1, description="the first layer that it governs")

    def governs(self, place):
        """Layers first, first + 2, ..."""
        return place.index % 2 == self.options.first

    def static_tokens(self, context):
        """The newest token."""
        return 0, 1

    def prefill(self, layer, queries, keys, values):
        """Evict all but the most recent tokens."""
        if not layer.budget.covers_all:
            layer.store.keep(torch.arange(layer.tokens - layer.budget.tokens, layer.tokens))

    def insert(self, layer, keys, values):
        """Evict the oldest tokens."""
        if not layer.budget.covers_all:
            layer.store.evict(layer.tokens - layer.budget.tokens - keys.shape[2], keys.shape[2])


@kvbench.hookimpl
def kvbench_policies():
    """Register the policies."""
    return [EveryOther]
