"""Attention over parts of a context, merged exactly by log-sum-exp in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Summed(Protocol):
    """Values in a format of their own, which sums them itself (`kvbench.contract.storage.Storage`)."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum, float32 [B, H, 1, d], of all values with `weights` [B, H, t]."""


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


def softmax_parts(parts: Sequence[tuple[Tensor, Tensor | Summed]], *, with_weights: bool = False) -> Attention:
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
