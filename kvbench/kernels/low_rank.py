"""Rebuilds keys that are held as low-rank coefficients before their rotation, and fetches their values (ShadowKV)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import check_rows, compiled, device_of, dots_in_float32, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None


@dataclass(frozen=True)
class LowRankKeys:
    """Keys before rotation as `coefficients` [B, n, r] times each head's `basis` [B, G, r, d].

    `across` is the basis with each channel in its partner's place. Rotated to position p, channel c is
    cos[p, c]·x[c] + sin[p, c]·x[partner[c]]: `cos` and `sin`, float32 [n, d], and `partner`, int32 [d]. Chunks of
    `chunk` tokens whose `rank`, int32 [B, G, chunks], is not negative are kept as they are, rotated, in `exact`
    [B, G, ranks · chunk, d].
    """

    coefficients: Tensor
    basis: Tensor
    across: Tensor
    cos: Tensor
    sin: Tensor
    partner: Tensor
    rank: Tensor
    exact: Tensor
    chunk: int


@jit
def _rebuild(
    ids: tl.tensor, coefficients: tl.tensor, basis: tl.tensor, across: tl.tensor, cos: tl.tensor, sin: tl.tensor,
    rank: tl.tensor, exact: tl.tensor, values: tl.tensor, keys_out: tl.tensor, values_out: tl.tensor,
    nb: int, xb: int, xg: int, rb: int, rg: int, vb: int, vg: int, vt: int, k: int, fetching: int,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """The first `fetching` programs of a head fetch values; the others rebuild keys meanwhile."""
    program = tl.program_id(1)
    row = (program // G).to(tl.int64)
    group = program % G
    tile = tl.program_id(0)
    slot = tl.where(tile < fetching, tile, tile - fetching) * TOKENS + tl.arange(0, TOKENS)
    chunk = tl.load(ids + program.to(tl.int64) * k + slot // CHUNK, mask=slot < k * CHUNK, other=-1)
    valid = chunk >= 0
    token = chunk.to(tl.int64) * CHUNK + slot % CHUNK
    target = program.to(tl.int64) * (k * CHUNK) + slot
    if tile < fetching:
        cv = tl.arange(0, BLOCK_DV)
        mask = valid[:, None] & (cv < DV)[None, :]
        fetched = tl.load(values + row * vb + group * vg + token[:, None] * vt + cv[None, :], mask=mask, other=0.0)
        tl.store(values_out + target[:, None] * DV + cv[None, :], fetched, mask=mask)
        return
    place = tl.load(rank + row * rb + group * rg + chunk, mask=valid, other=-1)
    kept = valid & (place >= 0)
    c = tl.arange(0, BLOCK_D)
    j = tl.arange(0, STEP)
    real = c < D
    plain = tl.zeros((TOKENS, BLOCK_D), tl.float32)
    turned = tl.zeros((TOKENS, BLOCK_D), tl.float32)
    for first in range(0, R, STEP):
        at = first + j
        own = tl.load(
            coefficients + row * nb + token[:, None] * R + at[None, :],
            mask=valid[:, None] & (at < R)[None, :], other=0.0,
        )  # fmt: skip
        place_of = program.to(tl.int64) * (R * D) + at[:, None] * D + c[None, :]
        mask = (at < R)[:, None] & real[None, :]
        straight = tl.load(basis + place_of, mask=mask, other=0.0)
        swapped = tl.load(across + place_of, mask=mask, other=0.0)
        if UPCAST:
            own, straight, swapped = own.to(tl.float32), straight.to(tl.float32), swapped.to(tl.float32)
        plain += tl.dot(own, straight, input_precision="tf32x3")
        turned += tl.dot(own, swapped, input_precision="tf32x3")
    held = keys_out.dtype.element_ty
    mask = valid[:, None] & real[None, :]
    turn = token[:, None] * D + c[None, :]
    rotated = plain.to(held).to(tl.float32) * tl.load(cos + turn, mask=mask, other=0.0)
    rotated += turned.to(held).to(tl.float32) * tl.load(sin + turn, mask=mask, other=0.0)
    spot = exact + row * xb + group * xg + (place * CHUNK + slot % CHUNK)[:, None] * D + c[None, :]
    as_is = tl.load(spot, mask=kept[:, None] & real[None, :], other=0.0)
    rows = tl.where(kept[:, None], as_is, rotated.to(held))
    tl.store(keys_out + target[:, None] * D + c[None, :], rows, mask=mask)


@kernel
def rebuild(ids: Tensor, held: LowRankKeys, values: Tensor, keys_out: Tensor, values_out: Tensor) -> None:
    """Write the keys and values of chunks `ids`, contiguous int32 [B, G, k], −1 for none, in their order.

    `values` [B, G, n, d'] may lie in pinned host memory. `keys_out` [B, G, k · chunk, d] and `values_out`, contiguous,
    keep what they hold where there is no chunk. Raises KVBenchError where shapes do not fit.
    """
    batch, groups, count = ids.shape
    rank, dim = held.basis.shape[2:]
    size = count * held.chunk
    check_rows("values", values, batch, groups)
    for what, rows, shape in (
        ("coefficients", held.coefficients, (batch, held.coefficients.shape[1], rank)),
        ("the basis", held.basis, (batch, groups, rank, dim)),
        ("the swapped basis", held.across, (batch, groups, rank, dim)),
        ("rebuilt keys", keys_out, (batch, groups, size, dim)),
        ("fetched values", values_out, (batch, groups, size, values.shape[3])),
        ("ids", ids, (batch, groups, count)),
        ("angles", held.cos, (held.cos.shape[0], dim)),
    ):
        if tuple(rows.shape) != shape or not rows.is_contiguous():
            raise KVBenchError(f"{what} {list(rows.shape)} are not a contiguous {list(shape)}.")
    if not compiled(keys_out):
        _twin(ids, held, values, keys_out, values_out)
        return
    upcast = dots_in_float32(keys_out, held.coefficients, held.basis)
    tokens = 32
    tiles = -(-size // tokens)
    with device_of(keys_out):
        _rebuild[(2 * tiles, batch * groups)](
            ids, held.coefficients, held.basis, held.across, held.cos, held.sin, held.rank, held.exact, values,
            keys_out, values_out, held.coefficients.stride(0), *held.exact.stride()[:2], *held.rank.stride()[:2],
            *values.stride()[:3], count, tiles, groups, rank, dim, values.shape[3], held.chunk, 32,
            max(16, next_power_of_2(dim)), next_power_of_2(values.shape[3]), tokens, upcast, num_warps=4,
        )  # fmt: skip


def _twin(ids: Tensor, held: LowRankKeys, values: Tensor, keys_out: Tensor, values_out: Tensor) -> None:
    batch, groups, _ = ids.shape
    chunk, dtype = held.chunk, keys_out.dtype
    valid = (ids >= 0).repeat_interleave(chunk, dim=2)[..., None]
    chunks = ids.clamp_min(0).long()
    within = torch.arange(chunk, device=ids.device)
    tokens = (chunks[..., None] * chunk + within).flatten(2)
    row = torch.arange(batch, device=ids.device)[:, None, None]
    group = torch.arange(groups, device=ids.device)[:, None]
    plain = (held.coefficients[row, tokens].float() @ held.basis.float()).to(dtype).float()
    rotated = plain * held.cos[tokens] + plain[..., held.partner.long()] * held.sin[tokens]
    place = held.rank[row, group, chunks]
    spots = (place.clamp_min(0).long()[..., None] * chunk + within).flatten(2)
    exact = held.exact[row, group, spots] if held.exact.shape[2] else rotated
    keys = torch.where((place >= 0).repeat_interleave(chunk, dim=2)[..., None], exact.to(dtype), rotated.to(dtype))
    fetched = values[row.to(values.device), group.to(values.device), tokens.to(values.device)].to(keys.device)
    keys_out.copy_(torch.where(valid, keys, keys_out))
    values_out.copy_(torch.where(valid, fetched, values_out))
