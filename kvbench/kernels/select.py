"""The best scores of each row, as many as the device says, by a search for the threshold bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import compiled, device_of, empty_or, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None

IN_REGISTERS = 16384
"""Most scores of a row that one program holds in registers; longer rows are read again for every bit."""
LONGEST = 2**21 - 1
"""Most scores of a row."""


@jit
def _ordered(x: tl.tensor) -> tl.tensor:
    """Floats as unsigned integers of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@jit
def _select(
    scores: tl.tensor, counts: tl.tensor, also: tl.tensor, ids: tl.tensor, n: int, k: int, columns: int,
    sb: int, sh: int, cb: int, ch: int, heads: int,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, K: tl.constexpr, ALSO: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    b, h = row // heads, row % heads
    source = scores + b.to(tl.int64) * sb + h.to(tl.int64) * sh
    place = tl.arange(0, BLOCK)
    count = tl.minimum(tl.load(counts + b * cb + h * ch).to(tl.int32), k)
    first = tl.load(source + place, mask=place < n, other=float("-inf"))
    there = tl.sum((first > float("-inf")).to(tl.int32), 0)
    for chunk in range(1, CHUNKS):
        at = chunk * BLOCK + place
        x = tl.load(source + at, mask=at < n, other=float("-inf"))
        there += tl.sum((x > float("-inf")).to(tl.int32), 0)
    want = tl.maximum(tl.minimum(count, there), 0)
    key = _ordered(first)
    threshold = tl.zeros((), tl.uint32)
    for step in range(32):
        candidate = threshold | (tl.full((), 0x80000000, tl.uint32) >> step)
        found = tl.sum((key >= candidate).to(tl.int32), 0)
        for chunk in range(1, CHUNKS):
            at = chunk * BLOCK + place
            x = tl.load(source + at, mask=at < n, other=float("-inf"))
            found += tl.sum((_ordered(x) >= candidate).to(tl.int32), 0)
        threshold = tl.where(found >= want, candidate, threshold)
    above = tl.sum((key > threshold).to(tl.int32), 0)
    for chunk in range(1, CHUNKS):
        at = chunk * BLOCK + place
        x = tl.load(source + at, mask=at < n, other=float("-inf"))
        above += tl.sum((_ordered(x) > threshold).to(tl.int32), 0)
    ties_left = want - above
    written = tl.zeros((), tl.int32)
    for chunk in range(CHUNKS):
        at = chunk * BLOCK + place
        x = tl.load(source + at, mask=at < n, other=float("-inf"))
        own = _ordered(x)
        tie = (own == threshold) & (at < n)
        rank = tl.cumsum(tie.to(tl.int32), 0)
        chosen = (x > float("-inf")) & ((own > threshold) | (tie & (rank <= ties_left))) & (want > 0)
        slot = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        stored = tl.where(chosen, slot, k) < k
        tl.store(ids + row.to(tl.int64) * columns + slot, at.to(tl.int32), mask=stored)
        written += tl.sum(chosen.to(tl.int32), 0)
        ties_left -= tl.sum(tie.to(tl.int32), 0)
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
            block, -(-n // block), next_power_of_2(k), also is not None, num_warps=8 if block >= 4096 else 4,
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
