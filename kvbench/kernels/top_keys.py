"""Exact nearest keys of many queries by inner product (RetrievalAttention's Algorithm 2, arXiv 2409.10516).

The best k of n scores lie in the k blocks of keys with the largest maxima, since each of these has a score that is as
good. `fused` never writes the scores: one pass over the keys keeps each block's maximum, and the k chosen blocks are
scored again. `unfused` writes them. Collecting in a second pass what reaches the k-th maximum took eight times as long
as the first (H200, atomic additions).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.select import select_top
from kvbench.kernels.support import compiled, device_of, dots_in_float32, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None

WIDTH = 16
"""Keys in a block."""
SCORES = 2**28
"""Scores, or maxima of blocks, that are held at a time on a GPU; 2^22 scores on the CPU."""
Way = Literal["auto", "fused", "unfused"]


@jit
def _scores(
    queries: tl.tensor, keys: tl.tensor, offsets: tl.tensor, first: int, n: int, kn: int,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, OFFSETS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    j = first + tl.arange(0, KEYS)
    c = tl.arange(0, BLOCK_D)
    mask = (j < n)[None, :] & (c < D)[:, None]
    rows = tl.load(keys + j.to(tl.int64)[None, :] * kn + c[:, None], mask=mask, other=0.0).to(queries.dtype)
    found = tl.dot(queries, rows, input_precision="ieee")
    if OFFSETS:
        found -= tl.load(offsets + j, mask=j < n, other=0.0)[None, :]
    return tl.where((j < n)[None, :], found, float("-inf"))


@jit
def _maxima(
    q: tl.tensor, k: tl.tensor, offsets: tl.tensor, maxima: tl.tensor,
    qs: int, qm: int, ks: int, kn: int, m: int, n: int, blocks: int,
    R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, UPCAST: tl.constexpr, OFFSETS: tl.constexpr,
) -> None:  # fmt: skip
    number = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    c = tl.arange(0, BLOCK_D)
    own = (i < m)[:, None] & (c < D)[None, :]
    queries = tl.load(q + number * qs + i.to(tl.int64)[:, None] * qm + c[None, :], mask=own, other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    keys = k + (number // R) * ks
    offsets += (number // R) * n
    target = maxima + (number * m + i.to(tl.int64)[:, None]) * blocks
    for first in range(0, n, KEYS):
        found = _scores(queries, keys, offsets, first, n, kn, D, BLOCK_D, KEYS, OFFSETS)
        best = tl.max(tl.reshape(found, (QUERIES, KEYS // WIDTH, WIDTH)), 2)
        block = first // WIDTH + tl.arange(0, KEYS // WIDTH)
        tl.store(target + block[None, :], best, mask=(i < m)[:, None] & (block < blocks)[None, :])


@jit
def _rescore(
    q: tl.tensor, k: tl.tensor, offsets: tl.tensor, chosen: tl.tensor, scores: tl.tensor,
    qs: int, qm: int, ks: int, kn: int, m: int,
    n: int, blocks: int,
    R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    OFFSETS: tl.constexpr,
) -> None:  # fmt: skip
    """One query's scores of the keys in its chosen blocks."""
    row = tl.program_id(0).to(tl.int64)
    number = row // m
    c = tl.arange(0, BLOCK_D)
    query = tl.load(q + number * qs + row % m * qm + c, mask=c < D, other=0.0).to(tl.float32)
    keys = k + (number // R) * ks
    for first in range(0, blocks * WIDTH, KEYS):
        place = first + tl.arange(0, KEYS)
        there = place < blocks * WIDTH
        block = tl.load(chosen + row * blocks + place // WIDTH, mask=there, other=0)
        j = block * WIDTH + place % WIDTH
        there &= j < n
        rows = tl.load(
            keys + j.to(tl.int64)[:, None] * kn + c[None, :], mask=there[:, None] & (c < D)[None, :], other=0.0
        )
        found = tl.sum(rows.to(tl.float32) * query[None, :], 1)
        if OFFSETS:
            found -= tl.load(offsets + (number // R) * n + j, mask=there, other=0.0)
        found = tl.where(there, found, float("-inf"))
        tl.store(scores + row * blocks * WIDTH + place, found, mask=place < blocks * WIDTH)


@kernel
def top_keys(queries: Tensor, keys: Tensor, k: int, *, offsets: Tensor | None = None, way: Way = "auto") -> Tensor:
    """Ids, int32 [S, m, min(k, n)], of the keys [G, n, d] with the largest inner products with queries [S, m, d].

    The best come first and equal ones by smaller id; S is a multiple of G, and queries [s] are compared with the keys
    of group s // (S // G). Products are of the vectors as they are, added up in float32;
    `offsets`, float32 [G, n], are taken from them. `way` chooses between the two
    ways to the same ids; `auto` is `fused` where Triton runs. Raises KVBenchError for other shapes, or k < 1.
    """
    if queries.dim() != 3 or keys.dim() != 3 or queries.shape[0] % keys.shape[0] or queries.shape[2] != keys.shape[2]:
        raise KVBenchError(
            f"queries {list(queries.shape)} and keys {list(keys.shape)} are not [S, m, d] and [G, n, d], S a multiple "
            "of G."
        )
    if k < 1 or queries.stride(2) != 1 or keys.stride(2) != 1:
        raise KVBenchError(f"k is {k}, and strides {queries.stride()}, {keys.stride()}: 1 or more, and d contiguous.")
    k = min(k, keys.shape[1])
    if way == "unfused" or not compiled(queries) or not k or not queries.shape[1] or k * WIDTH >= keys.shape[1]:
        return _unfused(queries, keys, k, offsets)
    step = max(SCORES // (queries.shape[0] * -(-keys.shape[1] // WIDTH)), 128)
    return torch.cat([_fused(part, keys, k, offsets) for part in torch.split(queries, step, dim=1)], dim=1)


def _products(queries: Tensor, keys: Tensor, offsets: Tensor | None) -> Tensor:
    if queries.dtype != keys.dtype or queries.dtype == torch.float32 or not queries.is_cuda:
        found = queries.float() @ keys.float().T
    else:
        found = torch.mm(queries, keys.T, out_dtype=torch.float32)
    return found if offsets is None else found.sub_(offsets)


def _best_first(ids: Tensor, scores: Tensor) -> Tensor:
    """Ids that rise along the last dimension, by falling scores."""
    return ids.gather(-1, scores.sort(dim=-1, descending=True, stable=True).indices).int()


def _unfused(queries: Tensor, keys: Tensor, k: int, offsets: Tensor | None) -> Tensor:
    sets, m, _ = queries.shape
    n, share = keys.shape[1], sets // keys.shape[0]
    if not k:
        return torch.empty(sets, m, 0, dtype=torch.int32, device=queries.device)
    rows = max(1, (SCORES if queries.is_cuda else 2**22) // n)
    parts = [
        _best_of(_products(block, keys[number // share], None if offsets is None else offsets[number // share]), k)
        for number in range(sets)
        for block in torch.split(queries[number], rows)
    ]
    return torch.cat(parts).view(sets, m, k)


def _best_of(scores: Tensor, k: int) -> Tensor:
    """Ids [r, k] of the best of scores [r, n], the best first."""
    rows, n = scores.shape
    counts = torch.full((1,), k, dtype=torch.int32, device=scores.device)
    blocks = -(-n // WIDTH)
    if k * WIDTH >= n:
        ids = select_top(scores[None], counts, k)[0].long()
        return _best_first(ids, scores.gather(-1, ids))
    whole = n // WIDTH * WIDTH
    maxima = scores[:, :whole].view(rows, -1, WIDTH).amax(-1)
    if whole < n:
        maxima = torch.cat([maxima, scores[:, whole:].amax(-1, keepdim=True)], dim=-1)
    chosen = select_top(maxima[None], counts.clamp_max(blocks), k)[0].long()
    ids = (chosen[..., None] * WIDTH + torch.arange(WIDTH, device=scores.device)).flatten(1)
    candidates = scores.gather(-1, ids.clamp_max(n - 1)).masked_fill_(ids >= n, -torch.inf)
    best = select_top(candidates[None], counts, k)[0].long()
    return _best_first(ids.gather(-1, best), candidates.gather(-1, best))


def _fused(queries: Tensor, keys: Tensor, k: int, offsets: Tensor | None) -> Tensor:
    sets, m, d = queries.shape
    n, device = keys.shape[1], queries.device
    blocks = -(-n // WIDTH)
    upcast = dots_in_float32(queries, keys)
    strides = queries.stride(0), queries.stride(1), keys.stride(0), keys.stride(1)
    shape = sets // keys.shape[0], d, max(16, next_power_of_2(d))
    many, few, warps, stages = (32, 64, 4, 2) if upcast else (128, 128, 8, 3) if d <= 128 else (64, 64, 4, 2)
    given = keys if offsets is None else offsets.float().contiguous()
    maxima = torch.empty(sets * m, blocks, dtype=torch.float32, device=device)
    with device_of(queries):
        _maxima[(-(-m // many), sets)](
            queries, keys, given, maxima, *strides, m, n, blocks, *shape, many, few, WIDTH, upcast, offsets is not None,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    counts = torch.full((1,), k, dtype=torch.int32, device=device)
    chosen = select_top(maxima[None], counts, k)[0]
    del maxima
    scores = torch.empty(sets * m, k * WIDTH, dtype=torch.float32, device=device)
    with device_of(queries):
        _rescore[(sets * m,)](
            queries, keys, given, chosen, scores, *strides, m, n, k, *shape, 64 if d <= 128 else 32, WIDTH,
            offsets is not None, num_warps=4,
        )  # fmt: skip
    best = select_top(scores[None], counts, k)[0].long()
    ids = chosen.gather(-1, best // WIDTH) * WIDTH + best % WIDTH
    return _best_first(ids, scores.gather(-1, best)).view(sets, m, k)
