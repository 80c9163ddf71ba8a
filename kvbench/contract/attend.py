"""The default of the hook `attend`: attention over the static set and a selection, wherever its tokens lie."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.attention import Attention, scores, softmax_parts
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.storage import Storage


def attend(layer: Layer, queries: Tensor, selection: Selection, *, with_weights: bool = False) -> Attention:
    """Attend, for `queries` [B, H, 1, d], to the static set, the selected tokens and the selection's summary rows.

    Selected tokens that are offloaded are attended where they lie: only the queries travel there and only the
    partial result comes back.
    """
    if layer.exact_attention is not None and selection.ids is None and not with_weights:
        return Attention(layer.exact_attention())
    store = layer.store
    parts: list[tuple[Tensor, Tensor | Storage]] = [
        (scores(queries, keys, layer.scaling) if mask is None
         else scores(queries, keys, layer.scaling).masked_fill_(_per_head(~mask, layer.heads), -torch.inf), values)
        for keys, values, mask in store.static_parts()
    ]  # fmt: skip
    chosen = _chosen(layer, queries if selection.queries is None else selection.queries, selection)
    if chosen is not None:
        here = chosen[0].device == queries.device
        parts.append(chosen if here else _as_one_row(softmax_parts([chosen]), queries.device))
    if selection.summary is not None:
        parts.append(selection.summary)
    return softmax_parts(parts, with_weights=with_weights)


def _chosen(layer: Layer, queries: Tensor, selection: Selection) -> tuple[Tensor, Tensor | Storage] | None:
    """Logits and values of the selected tokens, where they lie."""
    ids, store = selection.ids, layer.store
    if selection.everything and store.aside_stop > store.aside_start:
        logits = store.aside.scores(queries, layer.scaling)
        if selection.heads is not None:
            logits = logits.masked_fill_(
                ~_per_head(selection.heads.to(logits.device), layer.heads)[..., None], -torch.inf
            )
        return logits, store.aside
    if ids is None or not ids.shape[-1]:
        return None
    keys, values = store.gather(ids)
    logits = scores(queries.to(keys.device), keys, layer.scaling)
    if selection.log_weights is not None:
        logits = logits + selection.log_weights.to(keys.device)
    if selection.padded:
        logits = logits.masked_fill(_per_head(ids.to(keys.device) < 0, layer.heads), -torch.inf)
    return logits, values


def _per_head(mask: Tensor, heads: int) -> Tensor:
    return mask if mask.shape[1] == heads else mask.repeat_interleave(heads // mask.shape[1], dim=1)


def _as_one_row(part: Attention, device: torch.device) -> tuple[Tensor, Tensor]:
    """A normalised partial attention as a single token: its log-sum-exp is the logit, its output the value."""
    assert part.lse is not None
    return part.lse.to(device), part.output.to(device)
