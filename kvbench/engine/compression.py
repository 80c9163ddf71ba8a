"""Compression while decoding, hook by hook: notes the latest queries, and lets the policy score what a layer holds."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.buffers import gathered
from kvbench.contract.compression import best, due, scored, to_the_front
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy


def taken(layer: Layer) -> int:
    """Tokens that the layer has taken in since its prompt."""
    return layer.tokens - layer.prompt_tokens


def note(policy: KVCachePolicy, layer: Layer, queries: Tensor) -> None:
    """Keep the newest token's queries [B, H, 1, d] for the next compression."""
    window = policy.compression_window(layer.budget.every)
    if not window:
        return
    if layer.latest_queries is None:
        layer.latest_queries = queries.new_zeros(*queries.shape[:2], window, queries.shape[3])
    place = (taken(layer) - 1) % window
    layer.latest_queries[:, :, place : place + 1] = queries


def compress(policy: KVCachePolicy, layer: Layer) -> None:
    """Cut what the layer holds down to its budget, where that is due before the next token."""
    if not due(layer.budget.every, taken(layer)) or layer.store.static_ids.shape[-1] <= layer.budget.least:
        return
    held, order = _held(policy, layer)
    marks = best(scored(policy, layer, held), held.ids, layer.budget)
    slots = torch.zeros_like(marks).scatter_(-1, order, marks)
    front = to_the_front(slots)
    for name in policy.running:
        layer.state[name] = layer.state[name].expand_as(slots).gather(-1, front)
    layer.store.keep_slots(slots)


def _held(policy: KVCachePolicy, layer: Layer) -> tuple[HeldTokens, Tensor]:
    """What the layer holds, and the store's slots [B, G, t] in its order: by id, empty ones last."""
    ids = layer.store.static_ids.expand(layer.rows, layer.kv_heads, -1)
    order = ids.masked_fill(ids < 0, torch.iinfo(torch.int64).max).argsort(dim=-1)
    keys, values = (gathered(part, order) for part in layer.store.whole_static())
    window, ring = policy.compression_window(layer.budget.every), layer.latest_queries
    if ring is None:
        ring = keys.new_zeros(layer.rows, layer.heads, 0, layer.head_dim)
    queries = ring.roll(-(taken(layer) % window), 2) if window else ring
    running = {name: layer.state[name].expand_as(ids).gather(-1, order) for name in policy.running}
    return HeldTokens(keys, values, ids.gather(-1, order), queries, layer.tokens, running), order
