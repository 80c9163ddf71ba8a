"""How much the keys of each head differ from the mean of their directions (KeyDiff, arXiv 2504.15364)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import check_rows, compiled, device_of, empty_or, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _direction(rows: tl.tensor) -> tl.tensor:
    """Rows [n, d] over their lengths."""
    return rows / tl.maximum(tl.sqrt(tl.sum(rows * rows, 1)), 1e-12)[:, None]


@jit
def _sums(
    held: tl.tensor, real: tl.tensor, sums: tl.tensor, hb: int, hg: int, ht: int, rb: int, rg: int, groups: int, t: int,
    each: int, D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    """The sum of the directions of a part of one head's keys."""
    row = tl.program_id(1)
    b, g = (row // groups).to(tl.int64), row % groups
    c = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    first = tl.program_id(0) * each
    for at in range(first, tl.minimum(first + each, t), TOKENS):
        slot = at + tl.arange(0, TOKENS)
        there = tl.load(real + b * rb + g * rg + slot, mask=slot < t, other=0) != 0
        rows = tl.load(
            held + b * hb + g * hg + slot.to(tl.int64)[:, None] * ht + c[None, :],
            mask=there[:, None] & (c < D)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(_direction(rows.to(tl.float32)), 0)
    tl.store(sums + (row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * D + c, total, mask=c < D)


@jit
def _compare(
    held: tl.tensor, real: tl.tensor, sums: tl.tensor, keys: tl.tensor, scores: tl.tensor, fresh: tl.tensor,
    hb: int, hg: int, ht: int, rb: int, rg: int, kb: int, kg: int, groups: int, t: int, parts: int,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    """Minus the cosine of a tile of one head's keys, and of its new key, with the sum of all directions."""
    row = tl.program_id(1)
    b, g = (row // groups).to(tl.int64), row % groups
    c = tl.arange(0, BLOCK_D)
    p = tl.arange(0, PARTS)
    every = tl.load(
        sums + (row.to(tl.int64) * parts + p)[:, None] * D + c[None, :],
        mask=(p < parts)[:, None] & (c < D)[None, :], other=0.0,
    )  # fmt: skip
    new = tl.load(keys + b * kb + g * kg + c, mask=c < D, other=0.0).to(tl.float32)
    new = new / tl.maximum(tl.sqrt(tl.sum(new * new, 0)), 1e-12)
    anchor = tl.sum(every, 0) + new
    anchor = anchor / tl.maximum(tl.sqrt(tl.sum(anchor * anchor, 0)), 1e-8)
    slot = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = tl.load(real + b * rb + g * rg + slot, mask=slot < t, other=0) != 0
    rows = tl.load(
        held + b * hb + g * hg + slot.to(tl.int64)[:, None] * ht + c[None, :],
        mask=there[:, None] & (c < D)[None, :], other=0.0,
    )  # fmt: skip
    found = tl.sum(_direction(rows.to(tl.float32)) * anchor[None, :], 1)
    tl.store(scores + row.to(tl.int64) * t + slot, -found, mask=slot < t)
    if tl.program_id(0) == 0:
        tl.store(fresh + row, -tl.sum(new * anchor, 0))


@kernel
def key_differences(held: Tensor, real: Tensor, keys: Tensor, *, output: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Minus the cosines of the keys `held` [B, G, t, d] and of a new one, `keys` [B, G, 1, d], with their anchor.

    The anchor is the sum of the directions of those held that are `real`, bool [B, G, t], and of the new one. Gives
    float32 [B, G, t], 0 where not real, written to `output` where given, and [B, G, 1]. Raises KVBenchError where
    shapes do not fit.
    """
    batch, groups, count, dim = held.shape
    check_rows("held keys", held, batch, groups, dim)
    check_rows("new keys", keys, batch, groups, dim)
    if tuple(real.shape) != (batch, groups, count) or real.dtype != torch.bool or (count > 1 and real.stride(2) != 1):
        raise KVBenchError(f"marks {list(real.shape)} ({real.dtype}) are not contiguous bool {[batch, groups, count]}.")
    output = empty_or(output, (batch, groups, count), torch.float32, held.device)
    if not compiled(held):
        old = functional.normalize(held.float(), dim=-1) * real[..., None]
        new = functional.normalize(keys.float(), dim=-1)
        anchor = old.sum(2, keepdim=True) + new
        output.copy_(-functional.cosine_similarity(old, anchor, dim=-1))
        return output, -functional.cosine_similarity(new, anchor, dim=-1)
    tokens = 32
    tiles = -(-count // tokens)
    each = -(-tiles // 64) * tokens  # at most 64 parts, which every program of the second kernel adds up
    parts = max(-(-count // each), 1) if count else 1
    sums = torch.empty(batch, groups, parts, dim, device=held.device)
    fresh = torch.empty(batch, groups, 1, device=held.device)
    block = max(16, next_power_of_2(dim))
    with device_of(held):
        _sums[(parts, batch * groups)](
            held, real, sums, *held.stride()[:3], *real.stride()[:2], groups, count, max(each, tokens), dim, block,
            tokens, num_warps=4,
        )  # fmt: skip
        _compare[(max(tiles, 1), batch * groups)](
            held, real, sums, keys, output, fresh, *held.stride()[:3], *real.stride()[:2], *keys.stride()[:2], groups,
            count, parts, dim, block, next_power_of_2(parts), tokens, num_warps=4,
        )  # fmt: skip
    return output, fresh
