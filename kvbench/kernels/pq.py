"""Approximate scores of product-quantised keys by tables of partial inner products (PQCache, arXiv 2407.12820)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import (
    check_grouped,
    check_rows,
    compiled,
    device_of,
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


@jit
def _tables(
    q: tl.tensor, centroids: tl.tensor, tables: tl.tensor, qb: int, qh: int, scale: float,
    G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, CODES: tl.constexpr, SUB: tl.constexpr, BLOCK_SUB: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """One sub-space of one key/value head: its centroids' products with the group's queries, [codes, WIDTH]."""
    part = tl.program_id(0)
    row = part // (G * M)
    group = part // M % G
    code = tl.program_id(1) * STEP + tl.arange(0, STEP)
    c = tl.arange(0, BLOCK_SUB)
    r = tl.arange(0, ROWS)
    place = part.to(tl.int64) * CODES + code
    known = tl.load(
        centroids + place[:, None] * SUB + c[None, :], mask=(code < CODES)[:, None] & (c < SUB)[None, :], other=0.0
    ).to(tl.float32)
    queries = tl.load(
        q + row.to(tl.int64) * qb + (group * R + r)[None, :] * qh + part % M * SUB + c[:, None],
        mask=(r < R)[None, :] & (c < SUB)[:, None], other=0.0,
    ).to(tl.float32)  # fmt: skip
    products = tl.dot(known, queries, input_precision="ieee") * scale
    tl.store(
        tables + place[:, None] * WIDTH + r[None, :], products, mask=(code < CODES)[:, None] & (r < WIDTH)[None, :]
    )


@jit
def _lookup(
    tables: tl.tensor, codes: tl.tensor, counts: tl.tensor, scores: tl.tensor,
    sb: int, sg: int, sm: int, cb: int, cg: int, count: int,
    G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    LIMITED: tl.constexpr,
) -> None:  # fmt: skip
    """Scores of TOKENS keys of one key/value head: the sum of their codes' table entries."""
    row = tl.program_id(1) // G
    group = tl.program_id(1) % G
    slot = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    r = tl.arange(0, WIDTH)
    limit = count
    if LIMITED:
        limit = tl.minimum(tl.load(counts + row * cb + group * cg), count)
    valid = slot < limit
    sums = tl.zeros((TOKENS, WIDTH), tl.float32)
    codes += row.to(tl.int64) * sb + group * sg
    tables += tl.program_id(1).to(tl.int64) * (M * CODES * WIDTH)
    for part in range(M):
        code = tl.load(codes + part * sm + slot, mask=valid, other=0).to(tl.int32)
        sums += tl.load(tables + (part * CODES + code)[:, None] * WIDTH + r[None, :], mask=valid[:, None], other=0.0)
    sums = tl.where(valid[:, None], sums, float("-inf"))
    place = (row.to(tl.int64) * (G * R) + group * R + r)[None, :] * count + slot[:, None]
    tl.store(scores + place, sums, mask=(r < R)[None, :] & (slot < count)[:, None])


@kernel
def pq_scores(
    queries: Tensor,
    centroids: Tensor,
    codes: Tensor,
    counts: Tensor | None = None,
    *,
    scaling: float = 1.0,
    output: Tensor | None = None,
) -> Tensor:
    """Inner products, float32 [B, H, n], of `queries` [B, H, 1, d] with product-quantised keys, times `scaling`.

    `centroids` [B, G, m, c, d/m], contiguous, and `codes`, uint8 [B, G, m, n], the last dimension contiguous. Keys from
    `counts`, int32 [B] or [B, G], on get −∞. Written to `output` where given. Raises KVBenchError where shapes, types
    or strides do not fit.
    """
    if centroids.dim() != 5 or not centroids.is_contiguous():
        raise KVBenchError(f"centroids {list(centroids.shape)} are not a contiguous [B, G, m, c, d/m].")
    batch, groups, parts, known, sub = centroids.shape
    rows, heads, dim = check_grouped(queries, groups)
    if rows != batch or dim != parts * sub:
        raise KVBenchError(f"centroids {list(centroids.shape)} do not fit queries {list(queries.shape)}.")
    if codes.dim() != 4 or tuple(codes.shape[:3]) != (batch, groups, parts) or codes.dtype != torch.uint8:
        raise KVBenchError(f"codes {list(codes.shape)} ({codes.dtype}) are not uint8 [{batch}, {groups}, {parts}, n].")
    count = codes.shape[3]
    if codes.stride(3) != 1 and count > 1:
        raise KVBenchError(f"codes have strides {list(codes.stride())}: the last dimension must be contiguous.")
    counts = None if counts is None else per_group(counts, batch, groups, "counts")
    output = empty_or(output, (batch, heads, count), torch.float32, queries.device)
    if not compiled(queries):
        _twin(queries, centroids, codes, counts, scaling, output)
    elif count:
        share = heads // groups
        width, step = next_power_of_2(share), min(64, max(16, next_power_of_2(known)))
        tables = queries.new_empty((batch, groups, parts, known, width), dtype=torch.float32)
        tokens = max(64, 1024 // width)
        with device_of(queries):
            _tables[(batch * groups * parts, -(-known // step))](
                queries, centroids, tables, queries.stride(0), queries.stride(1), scaling, groups, share, parts, known,
                sub, max(16, next_power_of_2(sub)), max(16, width), width, step, num_warps=4,
            )  # fmt: skip
            _lookup[(-(-count // tokens), batch * groups)](
                tables, codes, queries if counts is None else counts, output, *codes.stride()[:3],
                *((0, 0) if counts is None else counts.stride()), count, groups, share, parts, known, width, tokens,
                counts is not None, num_warps=4,
            )  # fmt: skip
    return output


def _twin(
    queries: Tensor, centroids: Tensor, codes: Tensor, counts: Tensor | None, scaling: float, output: Tensor
) -> None:
    batch, groups, parts, known, sub = centroids.shape
    count = codes.shape[3]
    grouped = queries.float().reshape(batch, groups, -1, parts, sub).permute(0, 1, 3, 4, 2)
    tables = (centroids.float() @ grouped) * scaling  # [B, G, m, c, R]
    first = torch.arange(parts, device=codes.device)[:, None] * known
    total = torch.zeros(batch, groups, count, tables.shape[-1], device=codes.device)
    flat, entries = tables.flatten(2, 3), codes.long() + first
    for part in range(parts):
        total += flat.gather(2, entries[:, :, part, :, None].expand(-1, -1, -1, tables.shape[-1]))
    if counts is not None:
        beyond = torch.arange(count, device=codes.device) >= counts[..., None]
        total = total.masked_fill(beyond[..., None], -torch.inf)
    output.copy_(total.transpose(2, 3).flatten(1, 2))


@jit
def _encode(
    keys: tl.tensor, centroids: tl.tensor, halves: tl.tensor, codes: tl.tensor, positions: tl.tensor, kb: int, kg: int,
    cb: int, cg: int, cm: int, first: int, G: tl.constexpr, M: tl.constexpr, CODES: tl.constexpr,
    BLOCK_CODES: tl.constexpr, SUB: tl.constexpr, BLOCK_SUB: tl.constexpr,
) -> None:  # fmt: skip
    """The nearest centroid of one sub-space of one key."""
    program = tl.program_id(0)
    row, group, part = (program // (G * M)).to(tl.int64), program // M % G, program % M
    i, c = tl.arange(0, BLOCK_CODES), tl.arange(0, BLOCK_SUB)
    place = program.to(tl.int64) * CODES + i
    known = tl.load(
        centroids + place[:, None] * SUB + c[None, :], mask=(i < CODES)[:, None] & (c < SUB)[None, :], other=0.0
    )
    point = tl.load(keys + row * kb + group * kg + part * SUB + c, mask=c < SUB, other=0.0).to(tl.float32)
    near = tl.sum(known * point[None, :], 1) - tl.load(halves + place, mask=i < CODES, other=float("inf"))
    slot = tl.load(positions + row) - first
    tl.store(codes + row * cb + group * cg + part * cm + slot, tl.argmax(near, 0).to(tl.uint8))


@kernel
def pq_encode(keys: Tensor, centroids: Tensor, halves: Tensor, codes: Tensor, positions: Tensor, first: int) -> None:
    """Write the codes of `keys` [B, G, 1, d] at `positions` − `first`, int32 [B], into `codes`, uint8 [B, G, m, n].

    `centroids`, contiguous float32 [B, G, m, c, d/m]; `halves`, half of their squared lengths, contiguous float32
    [B, G, m, c], ∞ where there is no centroid. Raises KVBenchError where shapes do not fit.
    """
    batch, groups, parts, known, sub = centroids.shape
    check_rows("keys", keys, batch, groups, parts * sub)
    if tuple(halves.shape) != (batch, groups, parts, known) or tuple(codes.shape[:3]) != (batch, groups, parts):
        raise KVBenchError(
            f"lengths {list(halves.shape)} and codes {list(codes.shape)} do not fit centroids {list(centroids.shape)}."
        )
    if not compiled(keys):
        points = keys.float().view(batch, groups, parts, sub, 1)
        found = ((centroids @ points).squeeze(-1) - halves).argmax(-1, keepdim=True).to(torch.uint8)
        place = (positions - first).long()[:, None, None, None]
        codes.scatter_(3, place.expand_as(found), found)
        return
    with device_of(keys):
        _encode[(batch * groups * parts,)](
            keys, centroids, halves, codes, positions, *keys.stride()[:2], *codes.stride()[:3], first, groups, parts,
            known, next_power_of_2(known), sub, next_power_of_2(sub), num_warps=8,
        )  # fmt: skip
