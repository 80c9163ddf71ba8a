"""The best scores of each row, as many as the device says, by a search for the threshold among the scores' values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import compiled, device_of, empty_or, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None

IN_REGISTERS = 16384
"""Most scores of a row that one program holds in registers; longer rows are read again for every count."""
LONGEST = 2**21 - 1
"""Most scores of a row."""


@jit
def _ordered(x: tl.tensor) -> tl.tensor:
    """Floats as integers of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _value(key: tl.tensor) -> tl.tensor:
    """The float of an integer of `_ordered`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _part(source: tl.tensor, first: tl.tensor, chunk: int, n: int, BLOCK: tl.constexpr, CHUNKS: tl.constexpr) -> Any:
    """A chunk of a row's scores: the `first` is at hand, the others are read again."""
    if CHUNKS == 1:
        return first
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    return tl.load(source + at, mask=at < n, other=float("-inf"))


@jit
def _select(
    scores: tl.tensor, counts: tl.tensor, also: tl.tensor, ids: tl.tensor, n: int, k: int, columns: int,
    sb: int, sh: int, cb: int, ch: int, heads: int,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, K: tl.constexpr, ALSO: tl.constexpr,
) -> None:  # fmt: skip
    """`low` and `high` close in on the threshold: `over_low` scores, at least as many as wanted, are `low` or more,
    `over_high`, fewer, are `high` or more."""
    row = tl.program_id(0)
    b, h = row // heads, row % heads
    source = scores + b.to(tl.int64) * sb + h.to(tl.int64) * sh
    place = tl.arange(0, BLOCK)
    first = tl.load(source + place, mask=place < n, other=float("-inf"))
    over_low = tl.zeros((), tl.int32)
    least, most = tl.full((), 0x7FFFFFFF, tl.int32), tl.full((), -0x80000000, tl.int32)
    for chunk in range(CHUNKS):
        x = _part(source, first, chunk, n, BLOCK, CHUNKS)
        there = x > float("-inf")
        over_low += tl.sum(there.to(tl.int32), 0)
        least = tl.minimum(least, tl.min(tl.where(there, _ordered(x), 0x7FFFFFFF), 0))
        most = tl.maximum(most, tl.max(tl.where(there, _ordered(x), -0x80000000), 0))
    count = tl.minimum(tl.load(counts + b * cb + h * ch).to(tl.int32), k)
    want = tl.maximum(tl.minimum(count, over_low), 0)
    low, high = least.to(tl.int64), most.to(tl.int64) + 1
    over_high = tl.zeros((), tl.int32)
    step = tl.zeros((), tl.int32)
    while (high - low > 1) & (over_low > want) & (want > 0):
        step += 1
        if step % 10 == 0:  # to the nearest scores there are, which ends it where many are equal
            least, most = tl.full((), 0x7FFFFFFF, tl.int32), tl.full((), -0x80000000, tl.int32)
            for chunk in range(CHUNKS):
                key = _ordered(_part(source, first, chunk, n, BLOCK, CHUNKS))
                least = tl.minimum(least, tl.min(tl.where(key >= low.to(tl.int32), key, 0x7FFFFFFF), 0))
                most = tl.maximum(most, tl.max(tl.where(key <= (high - 1).to(tl.int32), key, -0x80000000), 0))
            low, high = least.to(tl.int64), most.to(tl.int64) + 1
        middle = low + (high - low) // 2
        if step % 3 != 0:  # as if the logarithm of the count fell evenly with the score
            a, z = _value(low.to(tl.int32)), _value((high - 1).to(tl.int32))
            over = tl.log2(over_low.to(tl.float32))
            under = tl.log2(tl.maximum(over_high.to(tl.float32), 0.5))
            guess = a + (z - a) * ((over - tl.log2(want.to(tl.float32))) / (over - under))
            middle = _ordered(guess).to(tl.int64)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        found = tl.zeros((), tl.int32)
        for chunk in range(CHUNKS):
            key = _ordered(_part(source, first, chunk, n, BLOCK, CHUNKS))
            found += tl.sum((key >= middle.to(tl.int32)).to(tl.int32), 0)
        enough = found >= want
        low, over_low = tl.where(enough, middle, low), tl.where(enough, found, over_low)
        high, over_high = tl.where(enough, high, middle), tl.where(enough, over_high, found)
    threshold = low.to(tl.int32)
    above = tl.zeros((), tl.int32)
    for chunk in range(CHUNKS):
        x = _part(source, first, chunk, n, BLOCK, CHUNKS)
        above += tl.sum((_ordered(x) > threshold).to(tl.int32), 0)
    ties_left = want - above
    written = tl.zeros((), tl.int32)
    for chunk in range(CHUNKS):
        at = chunk * BLOCK + place
        x = _part(source, first, chunk, n, BLOCK, CHUNKS)
        own = _ordered(x)
        chosen = (x > float("-inf")) & (own >= threshold) & (want > 0)
        if over_low > want:  # of the scores that are equal to it, the first
            tie = (own == threshold) & (at < n)
            chosen = chosen & ((own > threshold) | (tl.cumsum(tie.to(tl.int32), 0) <= ties_left))
            ties_left -= tl.sum(tie.to(tl.int32), 0)
        slot = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        stored = tl.where(chosen, slot, k) < k
        tl.store(ids + row.to(tl.int64) * columns + slot, at.to(tl.int32), mask=stored)
        written += tl.sum(chosen.to(tl.int32), 0)
    rest = tl.arange(0, K)
    free = tl.where(rest >= want, rest, k) < k
    tl.store(ids + row.to(tl.int64) * columns + rest, tl.full((K,), -1, tl.int32), mask=free)
    if ALSO:
        tl.store(ids + row.to(tl.int64) * columns + k, tl.load(also + b).to(tl.int32))


@kernel
def select_top(
    scores: Tensor, counts: Tensor, k: int, *, also: Tensor | None = None, output: Tensor | None = None
) -> Tensor:
    """Ids of the best `counts` of each row of `scores` [B, H, n], int32 [B, H, k], ascending, −1 behind them.

    `counts`, int32 [B] or [B, H] on the device, are at most `k`; scores of −∞ are never chosen; of equal scores the
    lower ids are. `also`, int32 [B], is an id for all of a row's heads that is put behind: [B, H, k + 1]. Written to
    `output` where given. Raises KVBenchError for other shapes or types.
    """
    if scores.dim() != 3 or scores.dtype != torch.float32 or scores.stride(2) != 1 or scores.shape[2] > LONGEST:
        raise KVBenchError(
            f"scores {list(scores.shape)} of {scores.dtype} are not contiguous float32 [B, H, n], n up to {LONGEST}."
        )
    batch, heads, n = scores.shape
    if k < 1 or tuple(counts.shape) not in ((batch,), (batch, heads)) or (also is not None and also.shape != (batch,)):
        raise KVBenchError(
            f"k is {k} and counts are {list(counts.shape)}: at least 1, [{batch}] or [{batch}, {heads}] are expected."
        )
    counts = (counts if counts.dim() == 2 else counts[:, None]).expand(batch, heads)
    columns = k + (also is not None)
    ids = empty_or(output, (batch, heads, columns), torch.int32, scores.device)
    if not compiled(scores):
        ids[..., :k] = _twin(scores, counts, k)
        if also is not None:
            ids[..., k] = also[:, None]
        return ids
    block = max(min(next_power_of_2(n), IN_REGISTERS), 16)
    with device_of(scores):
        _select[(batch * heads,)](
            scores, counts, counts if also is None else also, ids, n, k, columns,
            scores.stride(0), scores.stride(1), *counts.stride(), heads,
            block, -(-n // block), next_power_of_2(k), also is not None,
            num_warps=16 if block >= 16384 else 8 if block >= 4096 else 4,
        )  # fmt: skip
    return ids


def _twin(scores: Tensor, counts: Tensor, k: int) -> Tensor:
    n = scores.shape[-1]
    ordered = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(n, device=scores.device)
    kept = (rank < counts[..., None].clamp_max(k)) & (ordered.values > -torch.inf)
    ids = torch.where(kept, ordered.indices, n).sort(-1).values[..., :k]
    if n < k:
        ids = torch.nn.functional.pad(ids, (0, k - n), value=n)
    return torch.where(ids < n, ids, -1).int()
