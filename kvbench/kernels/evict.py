"""Eviction in place: the worst token of each head makes room for the new one; and the weights that scores come from."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.kernels.support import check_grouped, compiled, device_of, dots_in_float32, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _replace(
    scores: tl.tensor, fresh: tl.tensor, ids: tl.tensor, positions: tl.tensor, spared: tl.tensor,
    key_store: tl.tensor, value_store: tl.tensor, keys: tl.tensor, values: tl.tensor,
    ksb: int, ksg: int, kst: int, vsb: int, vsg: int, vst: int, kb: int, kg: int, vb: int, vg: int,
    groups: int, t: int, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    b, g = row // groups, row % groups
    position = tl.load(positions + b)
    first = position + 1 - tl.load(spared + row)
    place = tl.arange(0, BLOCK)
    least = tl.full((), float("inf"), tl.float32)
    worst = tl.zeros((), tl.int32)
    for chunk in range(CHUNKS):
        at = chunk * BLOCK + place
        id = tl.load(ids + row * t + at, mask=at < t, other=2147483647)
        score = tl.load(scores + row * t + at, mask=at < t, other=float("inf"))
        score = tl.where(id >= first, float("inf"), score)
        low = tl.min(score, 0)
        found = tl.min(tl.where(score == low, at, 2147483647), 0)
        worst = tl.where(low < least, found, worst)
        least = tl.minimum(low, least)
    tl.debug_barrier()
    d = tl.arange(0, BLOCK_D)
    slot = worst.to(tl.int64)
    key = tl.load(keys + b * kb + g * kg + d, mask=d < DK, other=0.0)
    tl.store(key_store + b.to(tl.int64) * ksb + g.to(tl.int64) * ksg + slot * kst + d, key, mask=d < DK)
    value = tl.load(values + b * vb + g * vg + d, mask=d < DV, other=0.0)
    tl.store(value_store + b.to(tl.int64) * vsb + g.to(tl.int64) * vsg + slot * vst + d, value, mask=d < DV)
    tl.store(ids + row * t + slot, position)
    tl.store(scores + row * t + slot, tl.load(fresh + row))


@kernel
def replace_worst(
    scores: Tensor, fresh: Tensor, ids: Tensor, positions: Tensor, spared: Tensor,
    key_store: Tensor, value_store: Tensor, keys: Tensor, values: Tensor,
) -> None:  # fmt: skip
    """Put each head's new token in the place of its worst one, in contiguous `scores`, `ids` and the stores.

    `scores`, float32 [B, G, t], and `ids`, int32 [B, G, t], are those of the tokens held; the new token, `keys` and
    `values` [B, G, 1, d] with score `fresh` [B, G, 1] and id `positions`, int32 [B], takes the place of the lowest
    score. The latest `spared`, int32 [B, G], tokens, the new one counted, are never replaced; of equals the first is.
    """
    batch, groups, held = scores.shape
    if compiled(scores):
        block = max(min(next_power_of_2(held), 8192), 16)
        with device_of(scores):
            _replace[(batch * groups,)](
                scores, fresh, ids, positions, spared, key_store, value_store, keys, values,
                *key_store.stride()[:3], *value_store.stride()[:3], *keys.stride()[:2], *values.stride()[:2],
                groups, held, block, -(-held // block), keys.shape[3], values.shape[3],
                next_power_of_2(max(keys.shape[3], values.shape[3])), num_warps=4,
            )  # fmt: skip
        return
    first = (positions + 1)[:, None, None] - spared[..., None]
    worst = scores.masked_fill(ids >= first, torch.inf).argmin(-1, keepdim=True)
    for store, rows in ((key_store, keys), (value_store, values)):
        store.scatter_(2, worst[..., None].expand(*worst.shape, rows.shape[3]), rows.to(store.dtype))
    ids.scatter_(-1, worst, positions[:, None, None].expand_as(worst))
    scores.scatter_(-1, worst, fresh)


@jit
def _weigh(
    queries: tl.tensor, keys: tl.tensor, lse: tl.tensor, lengths: tl.tensor, weights: tl.tensor,
    qb: int, qh: int, kb: int, kg: int, kt: int, groups: int, t: int, scaling: float,
    R: tl.constexpr, BLOCK_R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(1)
    b, g = row // groups, row % groups
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    at = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    length = tl.load(lengths + row)
    heads = g * R + r
    q = tl.load(
        queries + b * qb + heads[:, None] * qh + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0
    )
    source = keys + b.to(tl.int64) * kb + g.to(tl.int64) * kg + at.to(tl.int64)[None, :] * kt + d[:, None]
    k = tl.load(source, mask=(at < length)[None, :] & (d < D)[:, None], other=0.0)
    if UPCAST:
        logits = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision="ieee")
    else:
        logits = tl.dot(q, k, input_precision="ieee")
    total = tl.load(lse + b * groups * R + heads, mask=r < R, other=0.0)
    found = tl.where((at < length)[None, :], tl.exp(logits * scaling - total[:, None]), 0.0)
    target = weights + (b * groups * R + heads).to(tl.int64)[:, None] * t + at[None, :]
    tl.store(target, found, mask=(r < R)[:, None] & (at < t)[None, :])


@kernel
def attention_weights(
    queries: Tensor, keys: Tensor, lse: Tensor, lengths: Tensor, scaling: float, *, output: Tensor | None = None
) -> Tensor:
    """The softmax weights, float32 [B, H, t], of `queries` [B, H, 1, d] on `keys` [B, G, t, d], from the log-sum-exp.

    `lse`, float32 [B, H], is what the attention gave; tokens from `lengths`, int32 [B, G], on weigh 0. Written to
    `output` where given.
    """
    batch, heads, dim = check_grouped(queries, keys.shape[1])
    groups, held = keys.shape[1:3]
    share = heads // groups
    weights = torch.empty(batch, heads, held, device=queries.device) if output is None else output
    if compiled(queries):
        tokens = 64
        with device_of(queries):
            _weigh[(-(-held // tokens), batch * groups)](
                queries, keys, lse, lengths, weights, queries.stride(0), queries.stride(1), *keys.stride()[:3],
                groups, held, scaling, share, max(16, next_power_of_2(share)), dim, max(16, next_power_of_2(dim)),
                tokens, dots_in_float32(queries, keys), num_warps=4,
            )  # fmt: skip
        return weights
    grouped = queries.float().reshape(batch, groups, share, dim)
    logits = (grouped @ keys.float().transpose(-1, -2)).flatten(1, 2) * scaling
    valid = (torch.arange(held, device=keys.device) < lengths[..., None]).repeat_interleave(share, dim=1)
    weights.copy_(torch.where(valid, (logits - lse[..., None]).exp(), 0))
    return weights
