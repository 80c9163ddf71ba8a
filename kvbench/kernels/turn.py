"""Turns queries to another position and adds up those of a group (InfLLM, arXiv 2402.04617)."""

from __future__ import annotations

from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import check_grouped, compiled, device_of, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _turn(
    q: tl.tensor, cos: tl.tensor, sin: tl.tensor, partner: tl.tensor, turned: tl.tensor, asked: tl.tensor,
    summed: tl.tensor, qb: int, qh: int, G: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    row, group = (program // G).to(tl.int64), program % G
    r, c = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = (r < R)[:, None] & (c < D)[None, :]
    source = q + row * qb + (group * R + r)[:, None] * qh
    plain = tl.load(source + c[None, :], mask=mask, other=0.0).to(tl.float32)
    across = tl.load(source + tl.load(partner + c, mask=c < D, other=0)[None, :], mask=mask, other=0.0).to(tl.float32)
    found = plain * tl.load(cos + row * D + c, mask=c < D, other=0.0)[None, :]
    found += across * tl.load(sin + row * D + c, mask=c < D, other=0.0)[None, :]
    found = found.to(turned.dtype.element_ty)
    tl.store(turned + (program * R + r).to(tl.int64)[:, None] * D + c[None, :], found, mask=mask)
    target = program.to(tl.int64) * D + c
    tl.store(asked + target, tl.sum(found.to(tl.float32), 0).to(asked.dtype.element_ty), mask=c < D)
    tl.store(summed + target, tl.sum(plain, 0).to(summed.dtype.element_ty), mask=c < D)


@kernel
def turn(queries: Tensor, cos: Tensor, sin: Tensor, partner: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Channel c of `queries` [B, H, 1, d] becomes cos[b, c]·x[c] + sin[b, c]·x[partner[c]].

    `cos` and `sin` are contiguous float32 [B, d], `partner` int32 [d]. Gives the turned queries [B, H, 1, d], their
    sums over each group [B, G, 1, d], and those of the queries as they were, in the queries' type. Raises
    KVBenchError where shapes do not fit.
    """
    batch, heads, dim = check_grouped(queries, groups)
    for what, table in (("cosines", cos), ("sines", sin)):
        if tuple(table.shape) != (batch, dim) or not table.is_contiguous():
            raise KVBenchError(f"{what} {list(table.shape)} are not a contiguous {[batch, dim]}.")
    share = heads // groups
    if not compiled(queries):
        plain = queries.float()
        found = (plain * cos[:, None, None] + plain[..., partner.long()] * sin[:, None, None]).to(queries.dtype)
        asked, summed = (x.reshape(batch, groups, share, dim).float().sum(2, keepdim=True) for x in (found, plain))
        return found, asked.to(queries.dtype), summed.to(queries.dtype)
    turned = queries.new_empty(batch, heads, 1, dim)
    asked, summed = (queries.new_empty(batch, groups, 1, dim) for _ in range(2))
    with device_of(queries):
        _turn[(batch * groups,)](
            queries, cos, sin, partner, turned, asked, summed, *queries.stride()[:2], groups, share,
            next_power_of_2(share), dim, next_power_of_2(dim), num_warps=4,
        )  # fmt: skip
    return turned, asked, summed
