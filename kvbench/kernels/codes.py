"""Attention over tokens of which each key and value is a code of its own, decoded inside the kernel.

Formats: 8-bit integers; 8-bit floats; levels of a table in 1 to 4 bits (`Layout`), each with a scale for the vector or
without one. A key's scale multiplies its logit and a value's its weight, so that codes are the operands of products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.merge import launch_merge
from kvbench.kernels.support import (
    check_grouped,
    check_rows,
    compiled,
    device_of,
    dots_in_float32,
    empty_or,
    jit,
    kernel,
    next_power_of_2,
    per_group,
    split_count,
)

try:
    import triton.language as tl
except ImportError:
    tl = None

Kind = Literal["int8", "e4m3", "e5m2", "levels"]
_NUMBERS: dict[Kind, int] = {"int8": 0, "e4m3": 1, "e5m2": 2, "levels": 3}
_FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Layout:
    """What a byte of codes stands for.

    `levels`: numbers of `bits` bits that name entries of the table `levels`, float32 [2^bits]. Number i of a row of P
    bytes lies in byte i mod P, from bit bits · ⌊i / P⌋ on; of 3 bits the lower two lie in a row of their own before the
    row of the third.
    """

    kind: Kind
    bits: int = 8
    levels: Tensor | None = None

    def width(self, dim: int) -> int:
        """Bytes of a vector of `dim` numbers."""
        return dim * self.bits // 8


def decoded(codes: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """Vectors, float32 [..., d], of their codes, uint8 [..., w], and scales [..., 1], or [..., 0] for none."""
    if layout.kind == "levels":
        assert layout.levels is not None
        found = layout.levels[_unpacked(codes, layout.bits).int()]
    elif layout.kind == "int8":
        found = codes.view(torch.int8).float()
    else:
        found = codes.view(_FLOATS[layout.kind]).float()
    return found * scales.float() if scales.shape[-1] else found


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    if bits == 3:
        lower = codes.shape[-1] * 2 // 3
        return _unpacked(codes[..., :lower], 2) | (_unpacked(codes[..., lower:], 1) << 2)
    return torch.cat([(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)


@dataclass(frozen=True)
class CodedStore:
    """Tokens in codes: uint8 [B, G, t, w] and scales [B, G, t, 1 or 0] of keys and values, the first `lengths` in use.

    `lengths` int32 [B] or [B, G]; `sizes` the numbers of a key and of a value.
    """

    key_codes: Tensor
    key_scales: Tensor
    value_codes: Tensor
    value_scales: Tensor
    lengths: Tensor
    layout: Layout
    sizes: tuple[int, int]


@jit
def _numbers(
    codes: tl.tensor, levels: tl.tensor, token: tl.tensor, step: int, c: tl.tensor, mask: tl.tensor, like: tl.tensor,
    KIND: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Numbers [tokens, d] without their scales, in the type of `like`."""
    if KIND == 3:
        row = codes + token[:, None] * step
        if BITS == 3:
            low: tl.constexpr = D // 4
            high: tl.constexpr = D // 8
            first = tl.load(row + (c % low)[None, :], mask=mask, other=0).to(tl.int32)
            last = tl.load(row + (low + c % high)[None, :], mask=mask, other=0).to(tl.int32)
            found = ((first >> (2 * (c // low))[None, :]) & 3) | (((last >> (c // high)[None, :]) & 1) << 2)
        else:
            span: tl.constexpr = D * BITS // 8
            bytes_ = tl.load(row + (c % span)[None, :], mask=mask, other=0).to(tl.int32)
            found = (bytes_ >> (BITS * (c // span))[None, :]) & ((1 << BITS) - 1)
        return tl.load(levels + found).to(like.dtype)
    bytes_ = tl.load(codes + token[:, None] * step + c[None, :], mask=mask, other=0)
    if KIND == 0:
        return bytes_.to(tl.int8, bitcast=True).to(tl.float32).to(like.dtype)
    # the bits of an 8-bit float, moved to those of a 16-bit one: E4M3's number by 2^8, as its exponent has less bias
    wide = bytes_.to(tl.uint16)
    moved = ((wide & 128) << 8) | ((wide & 127) << (7 if KIND == 1 else 8))
    return moved.to(tl.float16, bitcast=True).to(like.dtype)


@jit
def _coded(
    q: tl.tensor, parts: tl.tensor, part_lses: tl.tensor, qb: int, qh: int, scale: float, raised: float, batch: int,
    kc: tl.tensor, ks: tl.tensor, vc: tl.tensor, vs: tl.tensor, lengths: tl.tensor, levels: tl.tensor,
    kcb: int, kcg: int, kct: int, ksb: int, ksg: int, kst: int, vcb: int, vcg: int, vct: int,
    vsb: int, vsg: int, vst: int, lb: int, lg: int, splits: int,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    """One part of one head's tokens: partial output and log-sum-exp."""
    split = tl.program_id(0) % splits
    program = tl.program_id(0) // splits
    row = program // G
    group = program % G
    tokens = tl.load(lengths + row * lb + group * lg)
    long_row = row.to(tl.int64)
    kc += long_row * kcb + group * kcg
    vc += long_row * vcb + group * vcg
    ks += long_row * ksb + group * ksg
    vs += long_row * vsb + group * vsg
    r = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_D)
    cv = tl.arange(0, BLOCK_DV)
    t = tl.arange(0, TOKENS)
    own = r < R
    queries = tl.load(
        q + long_row * qb + (group * R + r)[:, None] * qh + c[None, :], mask=own[:, None] & (c < D)[None, :], other=0.0
    )
    if UPCAST:
        queries = queries.to(tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    each = tl.cdiv(tl.cdiv(tokens, TOKENS), splits) * TOKENS
    stop = tl.minimum(split * each + each, tokens)
    for at in range(split * each, stop, TOKENS):
        slot = at + t
        valid = slot < stop
        token = slot.to(tl.int64)
        rows = _numbers(kc, levels, token, kct, c, valid[:, None] & (c < D)[None, :], queries, KIND, BITS, D)
        logits = tl.dot(queries, tl.trans(rows), input_precision="tf32x3") * (scale * raised)
        if SCALED:
            logits *= tl.load(ks + token * kst, mask=valid, other=0.0).to(tl.float32)[None, :]
        logits = tl.where(valid[None, :], logits * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(peak - shift)
        peak = higher
        total = total * fade + tl.sum(weights, 1)
        if SCALED:
            weights *= tl.load(vs + token * vst, mask=valid, other=0.0).to(tl.float32)[None, :]
        rows = _numbers(vc, levels, token, vct, cv, valid[:, None] & (cv < DV)[None, :], queries, KIND, BITS, DV)
        sums = sums * fade[:, None] + tl.dot(weights.to(rows.dtype), rows, input_precision="tf32x3")
    filled = total > 0
    total = tl.where(filled, total, 1.0)
    found = tl.where(filled, (peak + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    place = (split * batch + row).to(tl.int64) * (G * R) + group * R
    tl.store(part_lses + place + r, found, mask=own)
    tl.store(
        parts + (place + r)[:, None] * DV + cv[None, :], sums * raised / total[:, None],
        mask=(own & filled)[:, None] & (cv < DV)[None, :],
    )  # fmt: skip


@kernel
def attend_codes(
    queries: Tensor,
    store: CodedStore,
    *,
    scaling: float | None = None,
    dtype: torch.dtype = torch.float32,
    output: Tensor | None = None,
    lse: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `queries` [B, H, 1, d] over a store of codes: output [B, H, 1, d'] and log-sum-exp [B, H].

    Options and results are those of `attend`. Raises KVBenchError where shapes or types do not fit.
    """
    batch, groups = store.key_codes.shape[:2]
    rows, heads, dim = check_grouped(queries, groups)
    _check(store, rows, dim)
    scaling = dim**-0.5 if scaling is None else scaling
    value_dim = store.sizes[1]
    output = empty_or(output, (batch, heads, 1, value_dim), dtype, queries.device)
    lse = empty_or(lse, (batch, heads), torch.float32, queries.device)
    lengths = per_group(store.lengths, batch, groups, "lengths")
    if not compiled(queries):
        _twin(queries, store, lengths, scaling, output, lse)
        return output, lse
    wide, layout = dots_in_float32(queries, store.key_codes), store.layout
    tokens = 16 if wide and max(dim, value_dim) > 128 else 32 if wide else 64
    if splits is None:
        splits = split_count(queries.device, batch * groups, -(-store.key_codes.shape[2] // tokens))
    parts = queries.new_empty((splits, batch, heads, 1, value_dim), dtype=torch.float32)
    part_lses = queries.new_empty((splits, batch, heads), dtype=torch.float32)
    scaled = store.key_scales.shape[3] > 0
    held = (store.key_codes, store.key_scales if scaled else lengths, store.value_codes,
            store.value_scales if scaled else lengths)  # fmt: skip
    strides = [part.stride()[:3] if part is not lengths else (0, 0, 0) for part in held]
    arguments: tuple[Any, ...] = (
        queries, parts, part_lses, queries.stride(0), queries.stride(1), scaling,
        256.0 if layout.kind == "e4m3" else 1.0, batch, *held, lengths,
        queries if layout.levels is None else layout.levels, *(step for part in strides for step in part),
        *lengths.stride(), splits,
    )  # fmt: skip
    with device_of(queries):
        _coded[(batch * groups * splits,)](
            *arguments, groups, heads // groups, dim, value_dim, max(16, next_power_of_2(dim)),
            max(16, next_power_of_2(value_dim)), max(16, next_power_of_2(heads // groups)), _NUMBERS[layout.kind],
            layout.bits, scaled, wide, tokens, num_warps=8 if wide else 4, num_stages=2,
        )  # fmt: skip
        launch_merge(parts, part_lses, output, lse)
    return output, lse


def _check(store: CodedStore, batch: int, dim: int) -> None:
    layout, groups = store.layout, store.key_codes.shape[1]
    if store.sizes[0] != dim or any(size * layout.bits % 8 for size in store.sizes):
        raise KVBenchError(
            f"codes of {layout.bits} bits for vectors of {store.sizes[0]} and {store.sizes[1]} numbers don't fit "
            f"queries of {dim}: sizes must be those of the queries and fill whole bytes."
        )
    if (layout.kind == "levels") != (layout.levels is not None) or layout.bits not in (
        (1, 2, 3, 4) if layout.kind == "levels" else (8,)
    ):
        raise KVBenchError(
            f"codes '{layout.kind}' of {layout.bits} bits: levels come with a table and 1 to 4 bits, others with 8."
        )
    for what, codes, scales, size in (
        ("keys", store.key_codes, store.key_scales, store.sizes[0]),
        ("values", store.value_codes, store.value_scales, store.sizes[1]),
    ):
        check_rows(f"codes of {what}", codes, batch, groups, layout.width(size))
        if codes.dtype != torch.uint8:
            raise KVBenchError(f"codes of {what} are {codes.dtype}, not torch.uint8.")
        if scales.shape[:3] != codes.shape[:3] or scales.shape[3] != store.key_scales.shape[3] or scales.shape[3] > 1:
            raise KVBenchError(f"scales of {what} {list(scales.shape)}: one for each vector is expected, or none.")


def _twin(queries: Tensor, store: CodedStore, lengths: Tensor, scaling: float, output: Tensor, lse: Tensor) -> None:
    batch, heads, _, dim = queries.shape
    count = int(lengths.max()) if lengths.device.type == "cpu" else store.key_codes.shape[2]
    keys = decoded(store.key_codes[:, :, :count], store.key_scales[:, :, :count], store.layout)
    values = decoded(store.value_codes[:, :, :count], store.value_scales[:, :, :count], store.layout)
    logits = (queries.float().reshape(batch, lengths.shape[1], -1, dim) @ keys.transpose(-1, -2)) * scaling
    beyond = torch.arange(count, device=queries.device) >= lengths[..., None]
    logits = logits.masked_fill(beyond[:, :, None], -torch.inf)
    peaks = logits.logsumexp(-1)
    weights = (logits - torch.where(peaks.isfinite(), peaks, 0)[..., None]).exp()
    lse.copy_(peaks.flatten(1, 2))
    output.copy_((weights @ values).view(batch, heads, 1, store.sizes[1]))
