"""Channel-wise minima and maxima of pages of keys (Quest, arXiv 2406.10774), for all pages or as tokens come."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import check_rows, compiled, device_of, jit, kernel, next_power_of_2, per_group

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _bounds(
    keys: tl.tensor, low: tl.tensor, high: tl.tensor, lengths: tl.tensor,
    kb: int, kg: int, kt: int, lowb: int, lowg: int, lowp: int, highb: int, highg: int, highp: int, lb: int, lg: int,
    groups: int, size: int, D: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    page = tl.program_id(0)
    row = tl.program_id(1) // groups
    group = tl.program_id(1) % groups
    stop = tl.minimum((page + 1) * size, tl.load(lengths + row * lb + group * lg))
    c = tl.arange(0, BLOCK_D)
    least = tl.full((BLOCK_D,), float("inf"), tl.float32)
    most = tl.full((BLOCK_D,), float("-inf"), tl.float32)
    for at in range(page * size, stop, STEP):
        token = at + tl.arange(0, STEP)
        mask = (token < stop)[:, None] & (c < D)[None, :]
        place = row.to(tl.int64) * kb + group * kg + token.to(tl.int64)[:, None] * kt + c[None, :]
        rows = tl.load(keys + place, mask=mask, other=0.0).to(tl.float32)
        least = tl.minimum(least, tl.min(tl.where(mask, rows, float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.where(mask, rows, float("-inf")), 0))
    mask = c < tl.where(page * size < stop, D, 0)
    low += row.to(tl.int64) * lowb + group * lowg + page.to(tl.int64) * lowp
    high += row.to(tl.int64) * highb + group * highg + page.to(tl.int64) * highp
    tl.store(low + c, least.to(low.dtype.element_ty), mask=mask)
    tl.store(high + c, most.to(high.dtype.element_ty), mask=mask)


@jit
def _update(
    keys: tl.tensor, low: tl.tensor, high: tl.tensor, positions: tl.tensor,
    kb: int, kg: int, kt: int, lowb: int, lowg: int, lowp: int, highb: int, highg: int, highp: int, pb: int, pg: int,
    groups: int, new: int, pages: int, size: int, D: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    first = tl.load(positions + row * pb + group * pg)
    c = tl.arange(0, BLOCK_D)
    keys += row.to(tl.int64) * kb + group * kg
    low += row.to(tl.int64) * lowb + group * lowg
    high += row.to(tl.int64) * highb + group * highg
    for i in range(0, new):
        position = first + i
        page = position // size
        mask = c < tl.where((position >= 0) & (page < pages), D, 0)
        key = tl.load(keys + i * kt + c, mask=mask, other=0.0)
        old = mask & (c < tl.where(position % size == 0, 0, D))  # a page's first token opens it
        place = page.to(tl.int64)
        least = tl.load(low + place * lowp + c, mask=old, other=float("inf"))
        most = tl.load(high + place * highp + c, mask=old, other=float("-inf"))
        tl.store(
            low + place * lowp + c, tl.minimum(least.to(tl.float32), key.to(tl.float32)).to(least.dtype), mask=mask
        )
        tl.store(
            high + place * highp + c, tl.maximum(most.to(tl.float32), key.to(tl.float32)).to(most.dtype), mask=mask
        )


def _check(keys: Tensor, low: Tensor, high: Tensor, page_size: int) -> None:
    if page_size < 1:
        raise KVBenchError(f"a page of {page_size} tokens: at least 1 is expected.")
    for what, rows in (("keys", keys), ("minima", low), ("maxima", high)):
        check_rows(what, rows, keys.shape[0], keys.shape[1], keys.shape[3])
    if low.shape[2] != high.shape[2]:
        raise KVBenchError(f"{low.shape[2]} pages of minima and {high.shape[2]} of maxima: as many are expected.")


@kernel
def page_bounds(keys: Tensor, lengths: Tensor, page_size: int, low: Tensor, high: Tensor) -> None:
    """Write the bounds of all pages of `page_size` tokens of `keys` [B, G, t, d] to `low` and `high` [B, G, pages, d].

    Only the first `lengths`, int32 [B] or [B, G], tokens count; pages that hold none of them are left as they are.
    Raises KVBenchError where shapes or strides do not fit.
    """
    _check(keys, low, high, page_size)
    batch, groups, tokens, dim = keys.shape
    lengths = per_group(lengths, batch, groups, "lengths")
    pages = min(low.shape[2], -(-tokens // page_size))
    if compiled(low):
        with device_of(low):
            _bounds[(pages, batch * groups)](
                keys, low, high, lengths, *keys.stride()[:3], *low.stride()[:3], *high.stride()[:3], *lengths.stride(),
                groups, page_size, dim, next_power_of_2(dim), min(16, next_power_of_2(page_size)), num_warps=4,
            )  # fmt: skip
        return
    place = torch.arange(pages * page_size, device=keys.device)
    rows = keys[:, :, place.clamp_max(tokens - 1)]
    outside = ((place >= lengths[..., None]) | (place >= tokens))[..., None]
    for bound, extreme, reduce in ((low, torch.inf, torch.amin), (high, -torch.inf, torch.amax)):
        found = reduce(rows.masked_fill(outside, extreme).view(batch, groups, pages, page_size, dim), 3)
        seen = (torch.arange(pages, device=keys.device) * page_size < lengths[..., None])[..., None]
        bound[:, :, :pages] = torch.where(seen, found.to(bound.dtype), bound[:, :, :pages])


@kernel
def update_bounds(keys: Tensor, positions: Tensor, page_size: int, low: Tensor, high: Tensor) -> None:
    """Widen the bounds `low` and `high` [B, G, pages, d] of the pages that new tokens fall into.

    Token i of `keys` [B, G, m, d] is at position `positions` + i, int32 [B] or [B, G]; a page's first token sets its
    bounds. Tokens at negative positions, and beyond the last page, are left out. Raises KVBenchError where shapes or
    strides do not fit.
    """
    _check(keys, low, high, page_size)
    batch, groups, new, dim = keys.shape
    positions = per_group(positions, batch, groups, "positions")
    if compiled(low):
        with device_of(low):
            _update[(batch * groups,)](
                keys, low, high, positions,
                *keys.stride()[:3], *low.stride()[:3], *high.stride()[:3], *positions.stride(),
                groups, new, low.shape[2], page_size, dim, next_power_of_2(dim), num_warps=1,
            )  # fmt: skip
        return
    for i in range(new):
        position = (positions + i).long()
        page = position.div(page_size, rounding_mode="floor")
        valid = ((position >= 0) & (page < low.shape[2]))[..., None, None]
        at = page.clamp(0, low.shape[2] - 1)[..., None, None].expand(-1, -1, 1, dim)
        opens = (position % page_size == 0)[..., None, None]
        for bound, extreme, wider in ((low, torch.inf, torch.minimum), (high, -torch.inf, torch.maximum)):
            old = bound.gather(2, at)
            found = wider(old.masked_fill(opens, extreme), keys[:, :, i : i + 1].to(bound.dtype))
            bound.scatter_(2, at, torch.where(valid, found, old))
