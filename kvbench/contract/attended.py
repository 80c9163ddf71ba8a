"""Which tokens a step attends to, and whether the selection keeps the contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection


def counts(layer: Layer, selection: Selection) -> Tensor:
    """How often each head attends to each token of the context at this step, int32 [B, H, n]: once, or never."""
    store, tokens, static = layer.store, layer.tokens, layer.store.static_ids
    found = torch.zeros(layer.rows, layer.heads, tokens + 1, dtype=torch.int32, device=static.device)
    _count(found, static.expand(layer.rows, layer.kv_heads, -1) if static.dim() == 1 else static)
    if selection.everything:
        heads = torch.ones(1, layer.kv_heads, dtype=torch.bool) if selection.heads is None else selection.heads
        share = heads.to(found.device).repeat_interleave(layer.heads // layer.kv_heads, dim=1)
        found[:, :, store.aside_start : store.aside_stop] += share[..., None].int()
    elif selection.ids is not None:
        _count(found, selection.ids.to(found.device))
    return found[..., :tokens]


def _count(found: Tensor, ids: Tensor) -> None:
    """Count the ids [B, H or G, k], −1 for none, in `found` [B, H, n + 1], whose last column is for none."""
    share = found.shape[1] // ids.shape[1]
    each = ids if share == 1 else ids.repeat_interleave(share, dim=1)
    found.scatter_add_(2, torch.where(each < 0, found.shape[2] - 1, each), torch.ones_like(each, dtype=found.dtype))


def attended(layer: Layer, selection: Any) -> Tensor:
    """The tokens of the context that each head attends to at this step, bool [B, H, n].

    Raises KVBenchError for a selection that breaks the contract, saying what `select` gave and what was expected: ids
    name set-aside tokens only, each at most once for a head. A token of the static set is attended to in any case, and
    would count twice.
    """
    if not isinstance(selection, Selection):
        raise KVBenchError(f"select gave a {type(selection).__name__}; expected a kvbench.Selection")
    if selection.ids is not None and not selection.everything:
        _check_ids(layer, selection.ids, -1 if selection.padded else 0)
    often = counts(layer, selection)
    if int(often.max()) > 1:
        row, head, token = (int(place) for place in (often > 1).nonzero()[0])
        raise KVBenchError(
            f"head {head} of row {row} attends to token {token} {int(often[row, head, token])} times; expected once"
        )
    return often > 0


def _check_ids(layer: Layer, ids: Any, least: int) -> None:
    store = layer.store
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 3:
        kind = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise KVBenchError(f"select gave ids as {kind}; expected int64 [rows, heads, k]")
    if ids.shape[0] != layer.rows or ids.shape[1] not in (layer.heads, layer.kv_heads):
        raise KVBenchError(
            f"select gave ids of the shape {list(ids.shape)}; expected {layer.rows} rows and {layer.heads} query or "
            f"{layer.kv_heads} key/value heads"
        )
    if not ids.numel():
        return
    lowest = int(ids.min())
    if lowest < least:
        raise KVBenchError(f"select gave the id {lowest}; expected {least} or more (-1 is for none, with padded=True)")
    wrong = (ids >= 0) & ((ids < store.aside_start) | (ids >= store.aside_stop))
    if bool(wrong.any()):
        token = int(ids[wrong][0])
        where = f"of a context of {layer.tokens}" if token >= layer.tokens else "of the static set or evicted"
        aside = f"{store.aside_start} to {store.aside_stop - 1}" if store.aside_stop > store.aside_start else "none"
        raise KVBenchError(f"select gave token {token}, {where}; expected set-aside tokens, {aside}")
