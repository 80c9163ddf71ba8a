"""The default of the hook `attend`: attention over the static set and a selection, wherever its tokens lie."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvbench.contract.attention import Attention, Summed, scores, softmax_parts
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.storage import Storage

MOST_LOGITS = 2**26
"""Of a block of queries at a time: 256 MiB of float32."""
DENSE = 16
"""Set-aside tokens for each selected one, up to which a block of queries meets them all: copying a token's key and
value takes as long as some twenty inner products."""


def attend(layer: Layer, queries: Tensor, selection: Selection, *, with_weights: bool = False) -> Attention:
    """Attend, for `queries` [B, H, m, d], to the static set, the selected tokens and the selection's summary rows.

    The queries are those of the newest m tokens, and none sees a later one. Selected tokens that are offloaded are
    attended where they lie: only the queries travel there and only the partial result comes back.
    """
    if layer.exact_attention is not None and selection.ids is None and not with_weights:
        return Attention(layer.exact_attention())
    block = queries.shape[2]
    if block == 1:
        return _attend(layer, queries, selection, None, with_weights)
    positions = torch.arange(layer.tokens - block, layer.tokens, device=queries.device)
    chosen = 0 if selection.ids is None else selection.ids.shape[-1] * layer.head_dim
    at_once = max(1, MOST_LOGITS // (layer.rows * layer.heads * max(layer.tokens, chosen)))
    found = []
    for first in range(0, block, at_once):
        now = slice(first, first + at_once)
        mine = queries[:, :, now]
        asked = _asked(selection, now, layer.heads, mine.shape[2])
        part = _attend(layer, _folded(mine), asked, positions[now], with_weights)
        found.append([None if one is None else one.reshape(layer.rows, layer.heads, -1, one.shape[-1])
                      for one in (part.output.squeeze(2), part.lse, part.weights)])  # fmt: skip
    output, lse, weights = (None if parts[0] is None else torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    assert output is not None and lse is not None
    return Attention(output, lse.squeeze(-1), weights)


def _folded(queries: Tensor) -> Tensor:
    """Queries [B, H, m, d] as one query of H · m heads."""
    return queries.flatten(1, 2)[:, :, None]


def _asked(selection: Selection, now: slice, heads: int, size: int) -> Selection:
    """What a selection asks for some of a block's queries, for each of their folded heads."""

    def each(x: Tensor, size: int) -> Tensor:
        if x.dim() == 4:
            return x[:, :, now].flatten(1, 2)
        return x if x.shape[1] != heads else x.repeat_interleave(size, dim=1)

    queries = None if selection.queries is None else _folded(selection.queries[:, :, now])
    return replace(
        selection, queries=queries,
        ids=None if selection.ids is None else each(selection.ids, 1),
        log_weights=None if selection.log_weights is None else each(selection.log_weights, size),
        summary=None if selection.summary is None else (each(selection.summary[0], size), selection.summary[1]),
    )  # fmt: skip


def _attend(
    layer: Layer, queries: Tensor, selection: Selection, positions: Tensor | None, with_weights: bool
) -> Attention:
    """Attend for queries [B, H, 1, d], or [B, H · m, 1, d] of m tokens at `positions` [m] that see none later."""
    parts: list[tuple[Tensor, Tensor | Summed]]
    if layer.apart and positions is None and not with_weights:
        parts = [_as_one_row(layer.static_attention or attend_static(layer, queries), queries.device)]
    else:
        parts = _static(layer, queries, positions)
    chosen = _chosen(
        layer, queries if selection.queries is None else selection.queries, selection, positions, with_weights
    )
    if chosen is not None:
        here = chosen[0].device == queries.device
        parts.append(chosen if here else _as_one_row(softmax_parts([chosen]), queries.device))
    if selection.summary is not None:
        parts.append(selection.summary)
    sinks = layer.sink_logits
    if sinks is not None and positions is not None:
        sinks = sinks.repeat_interleave(len(positions), dim=-1)
    return softmax_parts(parts, sink_logits=sinks, with_weights=with_weights)


def attend_static(layer: Layer, queries: Tensor) -> Attention:
    """Attend, for `queries` [B, H, 1, d], to the static set alone."""
    return softmax_parts(_static(layer, queries, None))


def _static(layer: Layer, queries: Tensor, positions: Tensor | None) -> list[tuple[Tensor, Tensor | Summed]]:
    """Logits and values of the static set."""
    parts: list[tuple[Tensor, Tensor | Summed]] = []
    slot = 0
    for found, values, mask in layer.store.attended(queries, layer.scaling):
        logits = layer.capped(found)
        if mask is not None:
            logits = logits.masked_fill_(_per_head(~mask, queries.shape[1]), -torch.inf)
        if positions is not None:
            logits = _causal(logits, layer.store.static_ids[..., slot : slot + logits.shape[2]], positions)
            slot += logits.shape[2]
        parts.append((logits, values))
    return parts


def _chosen(
    layer: Layer, queries: Tensor, selection: Selection, positions: Tensor | None, with_weights: bool
) -> tuple[Tensor, Tensor | Storage] | None:
    """Logits and values of the selected tokens, where they lie."""
    ids, store, heads = selection.ids, layer.store, queries.shape[1]
    if selection.everything and store.aside_stop > store.aside_start:
        logits = layer.capped(store.aside.scores(queries, layer.scaling))
        if selection.heads is not None:
            logits = logits.masked_fill_(~_per_head(selection.heads.to(logits.device), heads)[..., None], -torch.inf)
        if positions is not None:
            held = torch.arange(store.aside_start, store.aside_stop, device=logits.device)
            logits = _causal(logits, held, positions)
        return logits, store.aside
    if ids is None or not ids.shape[-1]:
        return None
    plain = selection.queries is None and selection.log_weights is None and not with_weights
    if positions is not None and plain and store.aside_stop - store.aside_start <= DENSE * ids.shape[-1]:
        return _among_all(layer, queries, ids, positions)
    keys, values = store.gather(ids)
    logits = layer.capped(scores(queries.to(keys.device), keys, layer.scaling))
    if selection.log_weights is not None:
        logits = logits + selection.log_weights.to(keys.device)
    if selection.padded:
        logits = logits.masked_fill(_per_head(ids.to(keys.device) < 0, heads), -torch.inf)
    return logits if positions is None else _causal(logits, ids, positions), values


def _among_all(layer: Layer, queries: Tensor, ids: Tensor, positions: Tensor) -> tuple[Tensor, Storage]:
    """Logits of all set-aside tokens, −∞ for those that `ids` lacks: a block copies many rows where it selects them."""
    store = layer.store
    logits = layer.capped(store.aside.scores(queries, layer.scaling))
    count = store.aside_stop - store.aside_start
    slots = torch.where(ids < 0, count, ids - store.aside_start).to(logits.device)
    chosen = torch.zeros(*ids.shape[:2], count + 1, dtype=torch.bool, device=logits.device).scatter_(2, slots, True)
    logits = logits.masked_fill_(_per_head(~chosen[..., :count], queries.shape[1]), -torch.inf)
    if store.aside_stop > int(positions[0]):
        logits = _causal(logits, torch.arange(store.aside_start, store.aside_stop, device=logits.device), positions)
    return logits, store.aside


def _causal(logits: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
    """Mask, in logits [B, H · m, t], the tokens `ids` [t] or [B, ..., t] that lie after a query's position."""
    ids, positions = ids.to(logits.device), positions.to(logits.device)
    if ids.dim() == 1:
        each = logits.reshape(logits.shape[0], -1, positions.shape[0], logits.shape[2])
        return each.masked_fill(ids > positions[:, None], -torch.inf).view_as(logits)
    own = positions.repeat(logits.shape[1] // positions.shape[0])
    return logits.masked_fill(_per_head(ids, logits.shape[1]) > own[:, None], -torch.inf)


def _per_head(mask: Tensor, heads: int) -> Tensor:
    return mask if mask.shape[1] == heads else mask.repeat_interleave(heads // mask.shape[1], dim=1)


def _as_one_row(part: Attention, device: torch.device) -> tuple[Tensor, Tensor]:
    """A normalised partial attention as a single token: its log-sum-exp is the logit, its output the value."""
    assert part.lse is not None
    return part.lse.to(device), part.output.to(device)
