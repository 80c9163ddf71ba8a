"""Attention over parts of a context, merged exactly by log-sum-exp in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvbench.policy import Layer, Selection
    from kvbench.storage import Storage


@dataclass
class Attention:
    """Result of an attention: `output` [B, H, m, d] and its log-sum-exp `lse` [B, H, m] (float32).

    `weights` [B, H, t] (float32) are given on request only: the softmax weights over the static tokens in the
    store's slot order, then over the selected tokens in the selection's order.
    """

    output: Tensor
    lse: Tensor | None = None
    weights: Tensor | None = None


def scores(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Scaled inner products, float32 [B, H, t], of `queries` [B, H, 1, d] with `keys` [B, G or H, t, d]."""
    batch, heads, _, dim = queries.shape
    grouped = queries.reshape(batch, keys.shape[1], heads // keys.shape[1], dim)
    return (grouped @ keys.transpose(-1, -2)).reshape(batch, heads, -1).float() * scaling


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Sum, float32 [B, H, 1, d], of `values` [B, G or H, t, d] with `weights` [B, H, t]."""
    batch, heads, tokens = weights.shape
    grouped = weights.reshape(batch, values.shape[1], heads // values.shape[1], tokens).to(values.dtype)
    return (grouped @ values).reshape(batch, heads, 1, values.shape[-1]).float()


def softmax_parts(parts: Sequence[tuple[Tensor, Tensor | Storage]], *, with_weights: bool = False) -> Attention:
    """Merge partial attentions over disjoint token sets into the softmax attention over their union.

    Each part is a pair of logits, float32 [B, H, t] (-inf masks a token), and values [B, G or H, t, d] or the storage
    that holds them. The maximum
    over all parts is subtracted once and one normaliser divides the sum, all in float32, which equals merging
    normalised partial outputs by γ = exp(lse_part − lse_total) (RetrievalAttention, arXiv 2409.10516, eq. 5).
    """
    peak = torch.stack([logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -torch.inf)
                        for logits, _ in parts]).amax(0)  # fmt: skip
    shift = torch.where(peak.isfinite(), peak, torch.zeros_like(peak)).unsqueeze(-1)
    exponentials = [(logits - shift).exp_() for logits, _ in parts]
    total = torch.stack([part.sum(-1) for part in exponentials]).sum(0)
    output = sum(
        (
            weighted_sum(part, values) if isinstance(values, Tensor) else values.weighted_sum(part)
            for part, (_, values) in zip(exponentials, parts, strict=True)
        ),
        start=torch.zeros((), device=total.device),
    ) / total[..., None, None].clamp_min(torch.finfo(torch.float32).tiny)
    weights = torch.cat(exponentials, dim=-1) / total.unsqueeze(-1) if with_weights else None
    return Attention(output, (total.log() + shift.squeeze(-1)).unsqueeze(-1), weights)


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
