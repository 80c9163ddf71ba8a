"""Column sums of causal attention over a prompt: what each token gathers from all queries, as H2O counts it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import check_rows, compiled, device_of, dots_in_float32, jit, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None

BLOCK = 2**22
"""Attention weights that the torch twin computes at a time, at most; never more bytes than the keys and values have."""


@jit
def _tile(
    source: tl.tensor, first: int, tokens: int, stride: int, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """N rows of d numbers from row `first` on, as columns [BLOCK_D, N]; `WHOLE` where none lies beyond the tokens."""
    j = first + tl.arange(0, N)
    c = tl.arange(0, BLOCK_D)
    place = source + j.to(tl.int64)[None, :] * stride + c[:, None]
    if WHOLE and D == BLOCK_D:
        return tl.load(place)
    return tl.load(place, mask=(j < tokens)[None, :] & (c < D)[:, None], other=0.0)


@jit
def _add_row_sums(
    queries: tl.tensor, k: tl.tensor, peak: tl.tensor, total: tl.tensor, i: tl.tensor, first: int, tokens: int, kt: int,
    scale: float, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    keys = _tile(k, first, tokens, kt, D, BLOCK_D, KEYS, WHOLE).to(queries.dtype)
    scores = tl.dot(queries, keys, input_precision="ieee")
    if not WHOLE:
        scores = tl.where(i[:, None] >= (first + tl.arange(0, KEYS))[None, :], scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * scale)
    total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(scores * scale - higher[:, None]), 1)
    return higher, total


@jit
def _row_sums(
    q: tl.tensor, k: tl.tensor, lse: tl.tensor, qb: int, qh: int, qt: int, kb: int, kg: int, kt: int,
    heads: int, tokens: int, scale: float,
    R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Log-sum-exp, base 2, of each query's scores; `scale`, above 0, is that of base 2. The longest rows start first.

    Keys before the block are all seen: only the diagonal's tiles ask which.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    i = block * QUERIES + tl.arange(0, QUERIES)
    c = tl.arange(0, BLOCK_D)
    own = (i < tokens)[:, None] & (c < D)[None, :]
    queries = tl.load(q + row * qb + head * qh + i.to(tl.int64)[:, None] * qt + c[None, :], mask=own, other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    k += row * kb + head // R * kg
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    diagonal = block * QUERIES // KEYS * KEYS
    for first in range(0, diagonal, KEYS):
        peak, total = _add_row_sums(queries, k, peak, total, i, first, tokens, kt, scale, D, BLOCK_D, KEYS, True)
    for first in range(diagonal, tl.minimum(block * QUERIES + QUERIES, tokens), KEYS):
        peak, total = _add_row_sums(queries, k, peak, total, i, first, tokens, kt, scale, D, BLOCK_D, KEYS, False)
    tl.store(lse + tl.program_id(1).to(tl.int64) * tokens + i, peak + tl.log2(total), mask=i < tokens)


@jit
def _weights(
    keys: tl.tensor, q: tl.tensor, lse: tl.tensor, j: tl.tensor, first: int, tokens: int, qt: int, scale: float,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, WHOLE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Weights [KEYS, QUERIES] that queries from `first` on give the keys."""
    i = first + tl.arange(0, QUERIES)
    queries = _tile(q, first, tokens, qt, D, BLOCK_D, QUERIES, WHOLE)
    norms = tl.load(lse + i) if WHOLE else tl.load(lse + i, mask=i < tokens, other=float("inf"))
    scores = tl.dot(keys, queries.to(keys.dtype), input_precision="ieee")
    weights = tl.exp2(scores * scale - norms[None, :])
    if not WHOLE:
        weights = tl.where(i[None, :] >= j[:, None], weights, 0.0)
    return weights


@jit
def _column_sums(
    q: tl.tensor, k: tl.tensor, lse: tl.tensor, sums: tl.tensor,
    qb: int, qh: int, qt: int, kb: int, kg: int, kt: int, groups: int, tokens: int, scale: float,
    R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """The sum over a group's heads and over later queries of exp2(score − lse), for a block of keys."""
    block = tl.program_id(0)
    row = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    j = block * KEYS + tl.arange(0, KEYS)
    c = tl.arange(0, BLOCK_D)
    mask = (j < tokens)[:, None] & (c < D)[None, :]
    keys = tl.load(k + row * kb + group * kg + j.to(tl.int64)[:, None] * kt + c[None, :], mask=mask, other=0.0)
    if UPCAST:
        keys = keys.to(tl.float32)
    total = tl.zeros((KEYS, QUERIES), tl.float32)
    start = block * KEYS // QUERIES * QUERIES
    later = tl.minimum(tl.cdiv(block * KEYS + KEYS, QUERIES), tl.cdiv(tokens, QUERIES)) * QUERIES
    whole = tl.maximum(tokens // QUERIES * QUERIES, later)
    for r in range(0, R):
        head = group * R + r
        source = q + row * qb + head * qh
        norms = lse + (row * groups * R + head) * tokens
        for first in range(start, later, QUERIES):
            total += _weights(keys, source, norms, j, first, tokens, qt, scale, D, BLOCK_D, QUERIES, False)
        for first in range(later, whole, QUERIES):
            total += _weights(keys, source, norms, j, first, tokens, qt, scale, D, BLOCK_D, QUERIES, True)
        for first in range(whole, tokens, QUERIES):
            total += _weights(keys, source, norms, j, first, tokens, qt, scale, D, BLOCK_D, QUERIES, False)
    tl.store(sums + tl.program_id(1).to(tl.int64) * tokens + j, tl.sum(total, 1), mask=j < tokens)


# Queries and keys of a tile, warps and stages: of both passes.
TILES = {"rows": (256, 64, 8, 3), "columns": (128, 64, 4, 3)}
WIDE = {"rows": (128, 32, 8, 2), "columns": (32, 128, 8, 2)}  # rows of more than 128 numbers
FULL = {"rows": (32, 32, 4, 2), "columns": (32, 32, 4, 2)}  # float32


def column_sums(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Sum over all `queries` [B, H, n, d] of their causal softmax weights over `keys` [B, G, n, d]: float32 [B, G, n].

    The weights of a group's query heads are added up. Nothing of quadratic size is held: each query's log-sum-exp
    comes first, as in FlashAttention-2 (Dao, arXiv 2307.08691), then each key's sum over later queries.
    Raises KVBenchError where shapes or strides do not fit.
    """
    if queries.dim() != 4 or keys.dim() != 4 or queries.shape[1] % keys.shape[1]:
        raise KVBenchError(f"queries {list(queries.shape)} and keys {list(keys.shape)} are not [B, H or G, n, d].")
    batch, heads, tokens, dim = queries.shape
    groups = keys.shape[1]
    check_rows("queries", queries, batch, heads, dim)
    check_rows("keys", keys, batch, groups, dim)
    if keys.shape[2] != tokens:
        raise KVBenchError(f"{tokens} queries and {keys.shape[2]} keys: one of each for a token is expected.")
    if not compiled(queries):
        return _twin(queries, keys, scaling)
    sums = torch.empty(batch, groups, tokens, dtype=torch.float32, device=queries.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=queries.device)
    if not tokens:
        return sums
    if scaling <= 0:
        raise KVBenchError(f"scaling is {scaling}: softmax weights are expected of scores times a positive number.")
    upcast = dots_in_float32(queries, keys)
    tiles = FULL if upcast else TILES if dim <= 128 else WIDE
    strides, scale = (*queries.stride()[:3], *keys.stride()[:3]), scaling * 1.4426950408889634
    shape = heads // groups, dim, max(16, next_power_of_2(dim))
    with device_of(queries):
        many, few, warps, stages = tiles["rows"]
        _row_sums[(-(-tokens // many), batch * heads)](
            queries, keys, lse, *strides, heads, tokens, scale, *shape, many, few, upcast,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        few, many, warps, stages = tiles["columns"]
        _column_sums[(-(-tokens // many), batch * groups)](
            queries, keys, lse, sums, *strides, groups, tokens, scale, *shape, few, many, upcast,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return sums


def _twin(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    batch, heads, tokens, dim = queries.shape
    groups = keys.shape[1]
    grouped = queries.reshape(batch, groups, heads // groups, tokens, dim)
    total = keys.new_zeros(batch, groups, tokens, dtype=torch.float32)
    step = max(min(BLOCK, keys.nbytes // 2) // max(batch * heads * tokens, 1), 1)
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        block = grouped[:, :, :, start:stop].flatten(2, 3)
        logits = (block @ keys[:, :, :stop].transpose(-1, -2)).float().mul_(scaling)
        logits = logits.view(batch, groups, -1, stop - start, stop)
        future = torch.ones(stop - start, stop, dtype=torch.bool, device=keys.device).triu(start + 1)
        total[..., :stop] += logits.masked_fill_(future, -torch.inf).softmax(-1).sum((2, 3))
    return total
