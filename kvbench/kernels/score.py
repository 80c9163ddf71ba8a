"""Scores of rows that stand for many tokens: block means, centroids, and Quest's upper bounds of pages."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.sq8 import check_codes, decoded, fold
from kvbench.kernels.support import (
    check_grouped,
    check_rows,
    compiled,
    device_of,
    dots_in_float32,
    empty_or,
    jit,
    kernel,
    next_power_of_2,
    per_group,
)

try:
    import triton.language as tl
except ImportError:
    tl = None

Reduce = Literal["none", "max", "sum"]


@jit
def _score(
    q: tl.tensor, low: tl.tensor, high: tl.tensor, ranges: tl.tensor, counts: tl.tensor, scores: tl.tensor,
    qb: int, qh: int, lowb: int, lowg: int, lowt: int, highb: int, highg: int, hight: int, cb: int, cg: int,
    count: int, scale: float, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BOUNDS: tl.constexpr, LIMITED: tl.constexpr, UPCAST: tl.constexpr,
    REDUCE: tl.constexpr, CODED: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(1) // G
    group = tl.program_id(1) % G
    slot = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    limit = count
    if LIMITED:
        limit = tl.minimum(tl.load(counts + row * cb + group * cg), count)
    valid = slot < limit
    row = row.to(tl.int64)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_D)
    queries = tl.load(
        q + row * qb + (group * R + r)[:, None] * qh + c[None, :], mask=(r < R)[:, None] & (c < D)[None, :], other=0.0
    )
    mask = valid[:, None] if D == BLOCK_D else valid[:, None] & (c < D)[None, :]
    place = slot.to(tl.int64)[:, None]
    rows = tl.load(low + row * lowb + group * lowg + place * lowt + c[None, :], mask=mask, other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    if CODED:
        scaled, shared = fold(queries.to(tl.float32), ranges + (row * G + group) * (2 * D), c, D)
        queries = scaled if UPCAST else scaled.to(tl.bfloat16)
        rows = (rows.to(tl.float32) - 128.0).to(queries.dtype)
    else:
        rows = rows.to(queries.dtype)
    if BOUNDS:
        zero = tl.zeros_like(queries)
        found = tl.dot(tl.where(queries < 0, queries, zero), tl.trans(rows), input_precision="tf32x3")
        rows = tl.load(high + row * highb + group * highg + place * hight + c[None, :], mask=mask, other=0.0)
        rows = rows.to(queries.dtype)
        found += tl.dot(tl.where(queries > 0, queries, zero), tl.trans(rows), input_precision="tf32x3")
    else:
        found = tl.dot(queries, tl.trans(rows), input_precision="tf32x3")
    if CODED:
        found += shared[:, None]
        if not UPCAST:  # what bfloat16 leaves out of the queries
            found += tl.dot((scaled - queries.to(tl.float32)).to(tl.bfloat16), tl.trans(rows))
    found *= scale
    if REDUCE == 0:
        found = tl.where(valid[None, :], found, float("-inf"))
        place = (row * (G * R) + group * R + r)[:, None] * count + slot[None, :]
        tl.store(scores + place, found, mask=(r < R)[:, None] & (slot < count)[None, :])
    else:
        if REDUCE == 1:
            found = tl.where((r < R)[:, None], found, float("-inf"))
        best = tl.max(found, 0) if REDUCE == 1 else tl.sum(found, 0)  # rows beyond the group are 0
        best = tl.where(valid, best, float("-inf"))
        tl.store(scores + (row * G + group) * count + slot, best, mask=slot < count)


@kernel
def scores(
    queries: Tensor,
    rows: Tensor,
    counts: Tensor | None = None,
    *,
    scaling: float = 1.0,
    reduce: Reduce = "none",
    row_range: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """Inner products, float32 [B, H, n], of `queries` [B, H, 1, d] with `rows` [B, G, n, d], times `scaling`.

    Rows from `counts`, int32 [B] or [B, G], on get −∞. `reduce` gives the `max` or `sum` over a group's query heads,
    [B, G, n]. Rows that are uint8 codes have their channels' minima and ranges, float32 [B, G, 2, d], as `row_range`
    (see `sq8`). Raises KVBenchError where shapes, types or strides do not fit.
    """
    return _scores(queries, rows, None, row_range, counts, scaling, reduce, output)


@kernel
def page_scores(
    queries: Tensor,
    low: Tensor,
    high: Tensor,
    counts: Tensor | None = None,
    *,
    scaling: float = 1.0,
    reduce: Reduce = "none",
    output: Tensor | None = None,
) -> Tensor:
    """Quest's upper bounds Σ_c max(q_c·low_c, q_c·high_c), float32 [B, H, pages], of keys within [B, G, pages, d].

    `counts`, `scaling`, `reduce` and errors are those of `scores` (Quest, arXiv 2406.10774).
    """
    check_rows("maxima", high, low.shape[0], low.shape[1], low.shape[3])
    if high.shape != low.shape:
        raise KVBenchError(f"minima {list(low.shape)} and maxima {list(high.shape)} differ in shape.")
    return _scores(queries, low, high, None, counts, scaling, reduce, output)


def _scores(
    queries: Tensor,
    low: Tensor,
    high: Tensor | None,
    ranges: Tensor | None,
    counts: Tensor | None,
    scaling: float,
    reduce: Reduce,
    output: Tensor | None,
) -> Tensor:
    groups, count = low.shape[1:3]
    batch, heads, dim = check_grouped(queries, groups)
    check_rows("rows", low, batch, groups, dim)
    check_codes("rows", low, ranges, (batch, groups), dim)
    if reduce not in ("none", "max", "sum"):
        raise KVBenchError(f"reduce={reduce!r}: none, max or sum is expected.")
    counts = None if counts is None else per_group(counts, batch, groups, "counts")
    shape = (batch, heads if reduce == "none" else groups, count)
    output = empty_or(output, shape, torch.float32, queries.device)
    if not compiled(queries):
        _twin(queries, decoded(low, ranges), high, counts, scaling, reduce, output)
    elif count:
        upper = low if high is None else high
        upcast = dots_in_float32(queries, low, upper)
        tokens = 64 if dim * queries.element_size() <= 512 else 32
        limits = queries if counts is None else counts
        with device_of(queries):
            _score[(-(-count // tokens), batch * groups)](
                queries, low, upper, queries if ranges is None else ranges, limits, output, *queries.stride()[:2],
                *low.stride()[:3], *upper.stride()[:3], *((0, 0) if counts is None else counts.stride()),
                count, scaling, groups, heads // groups, dim, max(16, next_power_of_2(dim)),
                max(16, next_power_of_2(heads // groups)), tokens, high is not None, counts is not None, upcast,
                ("none", "max", "sum").index(reduce), ranges is not None, num_warps=8 if upcast else 4,
            )  # fmt: skip
    return output


def _twin(
    queries: Tensor,
    low: Tensor,
    high: Tensor | None,
    counts: Tensor | None,
    scaling: float,
    reduce: Reduce,
    output: Tensor,
) -> None:
    batch, groups, count, dim = low.shape  # in float32
    grouped = queries.float().reshape(batch, groups, -1, dim)
    if high is None:
        found = grouped @ low.transpose(-1, -2)
    else:
        found = grouped.clamp_max(0) @ low.transpose(-1, -2)
        found += grouped.clamp_min(0) @ high.float().transpose(-1, -2)
    found *= scaling
    if reduce != "none":
        found = found.amax(2, keepdim=True) if reduce == "max" else found.sum(2, keepdim=True)
    if counts is not None:
        beyond = torch.arange(count, device=low.device) >= counts[..., None]
        found = found.masked_fill(beyond[:, :, None], -torch.inf)
    output.copy_(found.flatten(1, 2))
