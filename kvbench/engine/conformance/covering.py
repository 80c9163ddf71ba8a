"""A policy that goes the way of selecting and evicting policies and leaves nothing out."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection


class Covering(KVCachePolicy):
    """Evicts nothing in every other layer, but moves all tokens there, and selects all that is set aside in the others.

    The selection names its tokens for the query heads, for the key/value heads and as everything, by turns.
    """

    name = "covering"
    summary = "Selects everything in some layers and evicts nothing in the others, through the same calls as policies."
    takes_budget = False
    query_window = 0

    def __init__(self, evicting: int) -> None:
        super().__init__()
        self.evicting = evicting

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep every token, in another order, or set all but two aside."""
        if layer.ordinal % 2 == self.evicting:
            order = torch.arange(layer.tokens, device=keys.device).flip(0)
            layer.store.keep(order.expand(layer.rows, layer.kv_heads, -1))
        else:
            layer.store.set_aside(1, layer.tokens - 1, offload=False)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Set the oldest token of the window aside."""
        if layer.store.aside_stop:
            layer.store.advance(keys.shape[2])

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Select everything."""
        store, turn = layer.store, layer.tokens % 3
        if not store.aside_stop or turn == 0:
            return Selection(everything=True)
        ids = torch.arange(store.aside_start, store.aside_stop, device=queries.device)
        return Selection(ids.expand(layer.rows, layer.heads if turn == 1 else layer.kv_heads, -1))
