"""Buckets of hash tables, and the keys that share them with a query (MagicPIG, arXiv 2410.16179)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import compiled, device_of, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _collide(
    codes: tl.tensor, asked: tl.tensor, scores: tl.tensor, cb: int, cg: int, ct: int, tables: int, n: int, least: int,
    G: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(1)
    row, group = (program // G).to(tl.int64), program % G
    slot = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    r = tl.arange(0, ROWS)
    own = r < R
    head = (program * R + r).to(tl.int64)
    codes += row * cb + group * cg
    shared = tl.zeros((ROWS, TOKENS), tl.int32)
    for table in range(tables):
        bucket = tl.load(codes + tl.cast(table, tl.int64) * ct + slot, mask=slot < n, other=0)
        wanted = tl.load(asked + head * tables + table, mask=own, other=0)
        shared += (bucket[None, :] == wanted[:, None]).to(tl.int32)
    place = scores + head[:, None] * n + slot[None, :]
    mask = own[:, None] & (slot < n)[None, :] & (shared < least)
    tl.store(place, tl.full((ROWS, TOKENS), float("-inf"), tl.float32), mask=mask)


@kernel
def keep_collisions(scores: Tensor, codes: Tensor, asked: Tensor, least: int) -> None:
    """Set `scores`, contiguous float32 [B, H, n], to −∞ where a key shares fewer than `least` buckets with the query.

    `codes`, int16 [B, G, tables, n], the last dimension contiguous, are the keys' buckets and `asked`, contiguous int16
    [B, H, tables], the queries'. Raises KVBenchError where shapes do not fit.
    """
    batch, heads, n = scores.shape
    groups, tables = codes.shape[1:3]
    if codes.shape != (batch, groups, tables, n) or asked.shape != (batch, heads, tables) or heads % groups:
        raise KVBenchError(
            f"codes {list(codes.shape)} and {list(asked.shape)} do not fit scores {list(scores.shape)}: "
            "[B, G, tables, n] and [B, H, tables] are expected."
        )
    share = heads // groups
    if not compiled(scores):
        common = torch.zeros(batch, groups, share, n, dtype=torch.int32, device=scores.device)
        for table in range(tables):
            mine = asked[..., table].view(batch, groups, share, 1)
            common += codes[:, :, None, table] == mine
        scores.masked_fill_(common.view(scores.shape) < least, -torch.inf)
        return
    tokens = 256
    with device_of(scores):
        _collide[(-(-n // tokens), batch * groups)](
            codes, asked, scores, *codes.stride()[:3], tables, n, least, groups, share, next_power_of_2(share), tokens,
            num_warps=4,
        )  # fmt: skip


@jit
def _hash(
    vectors: tl.tensor, mean: tl.tensor, planes: tl.tensor, codes: tl.tensor, slots: tl.tensor, vb: int, vh: int,
    cb: int, ch: int, ct: int, tables: int, heads: int, D: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr,
    TABLES: tl.constexpr, CENTRED: tl.constexpr, SLOTTED: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(1).to(tl.int64)
    row, head = program // heads, program % heads
    t = tl.program_id(0) * TABLES + tl.arange(0, TABLES)
    c = tl.arange(0, BLOCK_D)
    vector = tl.load(vectors + row * vb + head * vh + c, mask=c < D, other=0.0).to(tl.float32)
    if CENTRED:
        vector -= tl.load(mean + program * D + c, mask=c < D, other=0.0)
    code = tl.zeros((TABLES,), tl.int32)
    for bit in range(BITS):
        plane = tl.load(
            planes + c[:, None] * (tables * BITS) + (t * BITS + bit)[None, :],
            mask=(c < D)[:, None] & (t < tables)[None, :], other=0.0,
        )  # fmt: skip
        side = tl.sum(vector[:, None] * plane, 0) > 0
        code += side.to(tl.int32) << bit
    place = codes + row * cb + head * ch + t * ct
    if SLOTTED:
        place += tl.load(slots + row)
    tl.store(place, code.to(tl.int16), mask=t < tables)


@kernel
def hash_buckets(
    vectors: Tensor, planes: Tensor, bits: int, codes: Tensor, slots: Tensor | None = None, mean: Tensor | None = None
) -> None:
    """Write the buckets of `vectors` [B, X, 1, d], less their `mean`, contiguous float32 [B, X, 1, d], where given.

    Bit i of a table's bucket says on which side of its i-th hyperplane a vector lies: `planes`, contiguous float32
    [d, tables · bits]. `codes` are int16 [B, X, tables], or [B, X, tables, n] with `slots`, int32 [B], to write to.
    """
    batch, heads, _, dim = vectors.shape
    tables = planes.shape[1] // bits
    if planes.shape[0] != dim or codes.shape[:3] != (batch, heads, tables) or (slots is None) != (codes.dim() == 3):
        raise KVBenchError(
            f"planes {list(planes.shape)} and codes {list(codes.shape)} do not fit {list(vectors.shape)}."
        )
    if not compiled(vectors):
        found = buckets(vectors.squeeze(2), planes, bits, None if mean is None else mean.squeeze(2))
        if slots is None:
            codes.copy_(found)
        else:
            place = slots.long()[:, None, None, None].expand(batch, heads, tables, 1)
            codes.scatter_(3, place, found[..., None])
        return
    block = 32
    with device_of(vectors):
        _hash[(-(-tables // block), batch * heads)](
            vectors, vectors if mean is None else mean, planes, codes, vectors if slots is None else slots,
            *vectors.stride()[:2], *codes.stride()[:3], tables, heads, dim, next_power_of_2(dim), bits, block,
            mean is not None, slots is not None, num_warps=4,
        )  # fmt: skip


def buckets(vectors: Tensor, planes: Tensor, bits: int, mean: Tensor | None = None) -> Tensor:
    """The buckets, int16 [..., tables], of `vectors` [..., d]; see `hash_buckets`."""
    centred = vectors.float() if mean is None else vectors.float() - mean
    signs = (centred @ planes > 0).view(*vectors.shape[:-1], -1, bits)
    powers = 2 ** torch.arange(bits, dtype=torch.int32, device=vectors.device)
    return (signs * powers).sum(-1).to(torch.int16)


@jit
def _centred(
    keys: tl.tensor, q: tl.tensor, mean: tl.tensor, cosines: tl.tensor, qb: int, qh: int, k: int,
    heads: int, share: int, D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(1).to(tl.int64)
    row, head = program // heads, program % heads
    slot = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.arange(0, BLOCK_D)
    query = tl.load(q + row * qb + head * qh + c, mask=c < D, other=0.0).to(tl.float32)
    middle = tl.load(mean + (program // share) * D + c, mask=c < D, other=0.0)
    place = (program * k + slot)[:, None] * D + c[None, :]
    rows = tl.load(keys + place, mask=(slot < k)[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    rows = tl.where((c < D)[None, :], rows - middle[None, :], 0.0)
    lengths = tl.sqrt(tl.sum(rows * rows, 1)) * tl.sqrt(tl.sum(query * query, 0))
    found = tl.sum(rows * query[None, :], 1) / tl.maximum(lengths, 1e-12)
    tl.store(cosines + program * k + slot, found, mask=slot < k)


@kernel
def centred_cosines(queries: Tensor, keys: Tensor, mean: Tensor) -> Tensor:
    """Cosines, float32 [B, H, k], of `queries` [B, H, 1, d] and `keys`, contiguous [B, H, k, d], less their `mean`.

    `mean` is contiguous float32 [B, G, 1, d].
    """
    batch, heads, count, dim = keys.shape
    share = heads // mean.shape[1]
    if queries.shape != (batch, heads, 1, dim) or mean.shape != (batch, heads // share, 1, dim):
        raise KVBenchError(f"keys {list(keys.shape)} and means {list(mean.shape)} do not fit {list(queries.shape)}.")
    if not compiled(keys):
        centred = keys.float() - mean.repeat_interleave(share, dim=1)
        lengths = centred.norm(dim=-1) * queries.float().norm(dim=-1)
        found: Tensor = (centred * queries.float()).sum(-1) / lengths.clamp_min(1e-12)
        return found
    cosines = torch.empty(batch, heads, count, device=keys.device)
    tokens = 32
    with device_of(keys):
        _centred[(-(-count // tokens), batch * heads)](
            keys, queries, mean, cosines, *queries.stride()[:2], count, heads, share, dim,
            next_power_of_2(dim), tokens, num_warps=4,
        )  # fmt: skip
    return cosines
