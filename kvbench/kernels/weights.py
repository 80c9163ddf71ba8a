"""Softmax over all scores of each query head, brought together for its group, in two kernels whatever the length."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import compiled, device_of, empty_or, jit, kernel, next_power_of_2, per_group

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _there(
    slot: tl.tensor, row: tl.tensor, group: tl.tensor, counts: tl.tensor, sizes: tl.tensor, below: tl.tensor,
    cb: int, cg: int, n: int, G: tl.constexpr, LIMITED: tl.constexpr, SIZED: tl.constexpr, FORCED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Which slots exist, which take part in the softmax, and which are chosen whatever they weigh."""
    exists = slot < n
    if LIMITED:
        exists = exists & (slot < tl.load(counts + row * cb + group * cg))
    part = exists
    forced = exists & (slot < 0)
    if SIZED or FORCED:
        size = tl.load(sizes + (row * G + group).to(tl.int64) * n + slot, mask=exists, other=0)
    if SIZED:
        part = part & (size != 0)
    if FORCED:
        forced = exists & (size >= 0) & (size < tl.load(below + row))
        part = part & (forced == 0)
    return exists, part, forced


@jit
def _partial(
    logits: tl.tensor, partial: tl.tensor, counts: tl.tensor, sizes: tl.tensor, below: tl.tensor, cb: int, cg: int,
    n: int, G: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, LIMITED: tl.constexpr, SIZED: tl.constexpr,
    FORCED: tl.constexpr, MARGIN: tl.constexpr,
) -> None:  # fmt: skip
    """The log-sum-exp, for margins the highest, of a tile of one query head's scores."""
    head = tl.program_id(1)
    row, group = head // (G * R), head // R % G
    slot = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    _, part, _ = _there(slot, row, group, counts, sizes, below, cb, cg, n, G, LIMITED, SIZED, FORCED)
    x = tl.load(logits + head.to(tl.int64) * n + slot, mask=part, other=float("-inf"))
    peak = tl.max(x, 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(x - shift), 0)
    found = tl.where(total > 0, shift + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    if MARGIN:
        found = peak
    tl.store(partial + head.to(tl.int64) * tl.num_programs(0) + tl.program_id(0), found)


@jit
def _weights(
    logits: tl.tensor, partial: tl.tensor, weights: tl.tensor, counts: tl.tensor, sizes: tl.tensor, below: tl.tensor,
    cb: int, cg: int, n: int, parts: int, G: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, LIMITED: tl.constexpr, SIZED: tl.constexpr, FORCED: tl.constexpr, LARGEST: tl.constexpr,
    MARGIN: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of one group's weights, from the log-sum-exps of all tiles."""
    program = tl.program_id(1)
    row, group = program // G, program % G
    r, p = tl.arange(0, ROWS), tl.arange(0, PARTS)
    head = (program * R + r).to(tl.int64)
    own = r < R
    tiles = tl.load(
        partial + head[:, None] * parts + p[None, :], mask=own[:, None] & (p < parts)[None, :], other=float("-inf")
    )
    peak = tl.max(tiles, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(tiles - peak[:, None]), 1)
    total = tl.where(total > 0, total, 1.0)
    slot = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists, part, forced = _there(slot, row, group, counts, sizes, below, cb, cg, n, G, LIMITED, SIZED, FORCED)
    x = tl.load(logits + head[:, None] * n + slot[None, :], mask=own[:, None] & part[None, :], other=float("-inf"))
    if MARGIN:
        found = tl.max(tl.where(own[:, None], x - peak[:, None], float("-inf")), 0)
    else:
        each = tl.exp(x - peak[:, None]) / total[:, None]
        found = tl.max(each, 0) if LARGEST else tl.sum(each, 0)
    found = tl.where(forced, R + 1.0, tl.where(exists, found, float("-inf")))
    tl.store(weights + program.to(tl.int64) * n + slot, found, mask=slot < n)


@kernel
def group_weights(
    logits: Tensor,
    groups: int,
    reduce: Literal["sum", "max", "margin"],
    counts: Tensor | None = None,
    *,
    sizes: Tensor | None = None,
    forced: tuple[Tensor, Tensor] | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """The softmax of each query head's `logits`, contiguous float32 [B, H, n], reduced over its group: [B, G, n].

    For `margin` the group's largest of the logits less their head's highest.

    Slots from `counts`, int32 [B] or [B, G], on get −∞. Slots whose `sizes`, contiguous integers [B, G, n], are 0
    stay out of the softmax and weigh 0. With `forced`, ranks int32 [B, G, n] and limits int32 [B], slots whose rank is
    0 or more and below their row's limit stay out of the softmax and get more than any weight. Raises KVBenchError
    where shapes do not fit.
    """
    batch, heads, n = logits.shape
    if (
        heads % groups
        or not logits.is_contiguous()
        or logits.dtype != torch.float32
        or reduce not in ("sum", "max", "margin")
    ):
        raise KVBenchError(
            f"scores {list(logits.shape)} ({logits.dtype}) are not contiguous float32 [B, H, n] with H a multiple of "
            f"{groups}, or reduce={reduce!r} is not sum, max or margin."
        )
    if sizes is not None and forced is not None:
        raise KVBenchError("weights take sizes or forced slots, not both.")
    marks = forced[0] if forced is not None else sizes
    if marks is not None and (tuple(marks.shape) != (batch, groups, n) or not marks.is_contiguous()):
        raise KVBenchError(f"marks of slots {list(marks.shape)} are not a contiguous {[batch, groups, n]}.")
    counts = None if counts is None else per_group(counts, batch, groups, "counts")
    output = empty_or(output, (batch, groups, n), torch.float32, logits.device)
    if not compiled(logits):
        _twin(logits, groups, reduce, counts, sizes, forced, output)
    elif n:
        share, tokens = heads // groups, max(1024, next_power_of_2(-(-n // 512)))
        parts = -(-n // tokens)
        partial = logits.new_empty((batch, heads, parts))
        shared = (
            logits if counts is None else counts, logits if marks is None else marks,
            logits if forced is None else forced[1], *((0, 0) if counts is None else counts.stride()), n,
        )  # fmt: skip
        given = (counts is not None, sizes is not None, forced is not None)
        rows = next_power_of_2(share)
        tile = max(2048 // rows, 64)
        with device_of(logits):
            _partial[(parts, batch * heads)](
                logits, partial, *shared, groups, share, tokens, *given, reduce == "margin", num_warps=4
            )
            _weights[(-(-n // tile), batch * groups)](
                logits, partial, output, *shared, parts, groups, share, rows, next_power_of_2(parts), tile, *given,
                reduce == "max", reduce == "margin", num_warps=4,
            )  # fmt: skip
    return output


def _twin(
    logits: Tensor, groups: int, reduce: str, counts: Tensor | None, sizes: Tensor | None,
    forced: tuple[Tensor, Tensor] | None, output: Tensor,
) -> None:  # fmt: skip
    batch, _, n = logits.shape
    exists = torch.ones(batch, groups, n, dtype=torch.bool, device=logits.device)
    if counts is not None:
        exists &= torch.arange(n, device=logits.device) < counts[..., None]
    part, always = exists, torch.zeros_like(exists)
    if sizes is not None:
        part = exists & (sizes != 0)
    if forced is not None:
        always = exists & (forced[0] >= 0) & (forced[0] < forced[1][:, None, None])
        part = exists & ~always
    grouped = logits.view(batch, groups, -1, n).masked_fill(~part[:, :, None], -torch.inf)
    if reduce == "margin":
        found = (grouped - grouped.amax(-1, keepdim=True).nan_to_num(0.0)).amax(2)
    else:
        each = grouped.softmax(-1).nan_to_num(0.0)
        found = each.amax(2) if reduce == "max" else each.sum(2)
    output.copy_(found.masked_fill(~exists, -torch.inf).masked_fill(always, logits.shape[1] // groups + 1.0))
