"""Attention over tokens whose scores are known: only their values are read, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.merge import launch_merge
from kvbench.kernels.support import (
    check_rows,
    compiled,
    device_of,
    empty_or,
    jit,
    kernel,
    next_power_of_2,
    split_count,
)

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _weigh(
    scores: tl.tensor, ids: tl.tensor, values: tl.tensor, parts: tl.tensor, part_lses: tl.tensor,
    vb: int, vg: int, vt: int, scaling: float, heads: int, count: int, all_heads: int, splits: int,
    SHARE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    split = tl.program_id(1)
    channel = tl.arange(0, BLOCK_D)
    values += row.to(tl.int64) * vb + (head // SHARE).to(tl.int64) * vg
    first = tl.program_id(0).to(tl.int64) * count
    peak = float("-inf")
    total = 0.0
    sums = tl.zeros((BLOCK_D,), tl.float32)
    each = (count + splits - 1) // splits
    for start in range(split * each, min(split * each + each, count), TOKENS):
        place = start + tl.arange(0, TOKENS)
        inside = place < min(split * each + each, count)
        token = tl.load(ids + first + place, mask=inside, other=-1)
        valid = token >= 0
        logits = tl.load(scores + first + place, mask=valid, other=0.0).to(tl.float32) * scaling
        logits = tl.where(valid, logits, float("-inf"))
        found = tl.load(
            values + token.to(tl.int64)[:, None] * vt + channel[None, :],
            mask=valid[:, None] & (channel < D)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        higher = tl.maximum(peak, tl.max(logits, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        rescale = tl.exp(peak - shift)
        weights = tl.exp(logits - shift)
        sums = sums * rescale + tl.sum(weights[:, None] * found, 0)
        total = total * rescale + tl.sum(weights, 0)
        peak = higher
    filled = total > 0
    safe = tl.where(filled, total, 1.0)
    place = split.to(tl.int64) * all_heads + tl.program_id(0)
    tl.store(parts + place * D + channel, sums / safe, mask=channel < D)
    tl.store(part_lses + place, tl.where(filled, peak + tl.log(safe), float("-inf")))


@kernel
def weigh(
    scores: Tensor,
    ids: Tensor,
    values: Tensor,
    *,
    scaling: float = 1.0,
    output: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the tokens `ids`, int32 [B, H, k] (−1 is none), by their `scores`, float32 [B, H, k].

    `values` [B, G, t, d] lie on the device of ids and scores, or in pinned host memory, which is read in place. Gives
    the output, float32 [B, H, 1, d], and the log-sum-exp of the scores times `scaling`, float32 [B, H], written to
    `output` and `lse` where given; 0 and −∞ for a head with no token. KVBenchError where shapes do not fit.
    """
    batch, heads, count = ids.shape
    groups, dim = values.shape[1], values.shape[3]
    check_rows("values", values, batch, groups)
    if scores.shape != ids.shape or heads % groups or not (scores.is_contiguous() and ids.is_contiguous()):
        raise KVBenchError(
            f"scores {list(scores.shape)} and ids {list(ids.shape)} are not two contiguous [{batch}, H, k], with H a "
            f"multiple of {groups} heads."
        )
    output = empty_or(output, (batch, heads, 1, dim), torch.float32, ids.device)
    lse = empty_or(lse, (batch, heads), torch.float32, ids.device)
    if not compiled(ids):
        _twin(scores, ids, values, scaling, output, lse)
        return output, lse
    tokens = 32
    splits = split_count(ids.device, batch * heads, -(-count // tokens))
    parts = ids.new_empty((splits, batch, heads, 1, dim), dtype=torch.float32)
    part_lses = ids.new_empty((splits, batch, heads), dtype=torch.float32)
    with device_of(ids):
        _weigh[(batch * heads, splits)](
            scores, ids, values, parts, part_lses, *values.stride()[:3], scaling, heads, count, batch * heads, splits,
            heads // groups, dim, next_power_of_2(dim), tokens, num_warps=4,
        )  # fmt: skip
        launch_merge(parts, part_lses, output, lse)
    return output, lse


def _twin(scores: Tensor, ids: Tensor, values: Tensor, scaling: float, output: Tensor, lse: Tensor) -> None:
    batch, heads, _ = ids.shape
    row = torch.arange(batch, device=values.device)[:, None, None]
    group = (torch.arange(heads, device=values.device) // (heads // values.shape[1]))[:, None]
    found = values[row, group, ids.long().clamp_min(0).to(values.device)].to(ids.device).float()
    logits = (scores.float() * scaling).masked_fill(ids < 0, -torch.inf)
    lse.copy_(logits.logsumexp(-1))
    weights = (logits - torch.where(lse.isfinite(), lse, 0)[..., None]).exp()
    output.copy_(weights[:, :, None] @ found)
