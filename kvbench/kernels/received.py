"""The attention that each token of a prompt receives from all later queries, without a matrix of weights in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import check_rows, compiled, device_of, dots_in_float32, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None

BLOCK = 2**22
"""Attention weights that the torch twin computes at a time."""


@jit
def _log_sums(
    q: tl.tensor, k: tl.tensor, lses: tl.tensor, n: int, scale: float,
    qb: int, qh: int, qt: int, kb: int, kg: int, kt: int, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Log-sum-exps, base 2, of some queries of one head."""
    row = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    first = tl.program_id(0) * QUERIES
    at = first + tl.arange(0, QUERIES)
    c = tl.arange(0, BLOCK_D)
    queries = tl.load(
        q + row * qb + head * qh + at.to(tl.int64)[:, None] * qt + c[None, :],
        mask=(at < n)[:, None] & (c < D)[None, :], other=0.0,
    )  # fmt: skip
    if UPCAST:
        queries = queries.to(tl.float32)
    k += row * kb + (head // R) * kg
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, tl.minimum(first + QUERIES, n), KEYS):
        key = start + tl.arange(0, KEYS)
        rows = tl.load(
            k + key.to(tl.int64)[:, None] * kt + c[None, :], mask=(key < n)[:, None] & (c < D)[None, :], other=0.0
        ).to(queries.dtype)
        logits = tl.dot(queries, tl.trans(rows), input_precision="ieee") * scale
        logits = tl.where(key[None, :] <= at[:, None], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        peak = higher
    tl.store(lses + tl.program_id(1).to(tl.int64) * n + at, peak + tl.log2(total), mask=at < n)


@jit
def _received(
    q: tl.tensor, k: tl.tensor, lses: tl.tensor, sums: tl.tensor, n: int, scale: float,
    qb: int, qh: int, qt: int, kb: int, kg: int, kt: int, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """The weights of all later queries of a group, summed for some keys of one key/value head."""
    G: tl.constexpr = H // R
    row = (tl.program_id(1) // G).to(tl.int64)
    group = tl.program_id(1) % G
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    c = tl.arange(0, BLOCK_D)
    rows = tl.load(
        k + row * kb + group * kg + key.to(tl.int64)[:, None] * kt + c[None, :],
        mask=(key < n)[:, None] & (c < D)[None, :], other=0.0,
    )  # fmt: skip
    rows = tl.trans(rows.to(tl.float32) if UPCAST else rows.to(q.dtype.element_ty))
    found = tl.zeros((KEYS,), tl.float32)
    for share in range(R):
        head = group * R + share
        for start in range(tl.program_id(0) * KEYS, n, QUERIES):
            at = start + tl.arange(0, QUERIES)
            queries = tl.load(
                q + row * qb + head * qh + at.to(tl.int64)[:, None] * qt + c[None, :],
                mask=(at < n)[:, None] & (c < D)[None, :], other=0.0,
            ).to(rows.dtype)  # fmt: skip
            lse = tl.load(lses + (row * H + head) * n + at, mask=at < n, other=float("inf"))
            logits = tl.dot(queries, rows, input_precision="ieee") * scale
            weights = tl.exp2(logits - lse[:, None])
            found += tl.sum(tl.where(key[None, :] <= at[:, None], weights, 0.0), 0)
    tl.store(sums + tl.program_id(1).to(tl.int64) * n + key, found, mask=key < n)


@kernel
def received(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Sum over all the prompt's queries [B, H, n, d] of their softmax weights over keys [B, G, n, d]: [B, G, n].

    float32; a query attends to its own and earlier tokens. Raises KVBenchError where shapes or strides do not fit.
    """
    batch, heads, tokens, dim = queries.shape
    groups = keys.shape[1]
    check_rows("queries", queries, batch, heads)
    check_rows("keys", keys, batch, groups, dim)
    if keys.shape[2] != tokens or heads % groups:
        raise KVBenchError(f"queries {list(queries.shape)} and keys {list(keys.shape)} are not of one prompt.")
    if not compiled(queries):
        return _twin(queries, keys, scaling)
    sums = torch.empty(batch, groups, tokens, dtype=torch.float32, device=queries.device)
    lses = torch.empty(batch, heads, tokens, dtype=torch.float32, device=queries.device)
    upcast = dots_in_float32(queries, keys)
    size = 32 if upcast else 64
    shape = (
        tokens, scaling * 1.4426950408889634, *queries.stride()[:3], *keys.stride()[:3], heads, heads // groups, dim,
        max(16, next_power_of_2(dim)), size, size, upcast,
    )  # fmt: skip
    with device_of(queries):
        _log_sums[(-(-tokens // size), batch * heads)](queries, keys, lses, *shape, num_warps=4)
        _received[(-(-tokens // size), batch * groups)](queries, keys, lses, sums, *shape, num_warps=4)
    return sums


def _twin(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    batch, heads, tokens, dim = queries.shape
    groups = keys.shape[1]
    grouped = queries.reshape(batch, groups, heads // groups, tokens, dim)
    total = keys.new_zeros(batch, groups, tokens, dtype=torch.float32)
    step = max(BLOCK // (batch * heads * tokens), 1)
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        block = grouped[:, :, :, start:stop].flatten(2, 3)
        logits = (block @ keys[:, :, :stop].transpose(-1, -2)).float() * scaling
        logits = logits.view(batch, groups, -1, stop - start, stop)
        future = torch.ones(stop - start, stop, dtype=torch.bool, device=keys.device).triu(start + 1)
        total[..., :stop] += logits.masked_fill_(future, -torch.inf).softmax(-1).sum((2, 3))
    return total
