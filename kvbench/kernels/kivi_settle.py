"""Takes a step's token into KIVI's store (arXiv 2402.02750) and quantises what has waited long enough."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.insert import insert
from kvbench.kernels.kivi import KIVICodes
from kvbench.kernels.support import check_rows, compiled, device_of, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _parameters(rows: tl.tensor, valid: tl.tensor, LEVELS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Scale and minimum, as float16 holds them, of each row of numbers."""
    low = tl.min(tl.where(valid, rows, float("inf")), 1).to(tl.float16)
    high = tl.max(tl.where(valid, rows, float("-inf")), 1)
    scale = tl.div_rn(high - low.to(tl.float32), tl.full(high.shape, LEVELS, tl.float32)).to(tl.float16)
    scale = tl.maximum(scale.to(tl.float32), 6.103515625e-05)
    return scale, low.to(tl.float32)


@jit
def _rounded(rows: tl.tensor, scale: tl.tensor, low: tl.tensor, LEVELS: tl.constexpr) -> tl.tensor:
    """Codes 0 to LEVELS; halves go to the even neighbour, as adding 1.5 · 2^23 leaves them."""
    codes = (tl.div_rn(rows - low, scale) + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(codes, 0.0), 1.0 * LEVELS).to(tl.int32)


@jit
def _settle(
    late_keys: tl.tensor, late_values: tl.tensor, key_codes: tl.tensor, key_scales: tl.tensor,
    value_codes: tl.tensor, value_scales: tl.tensor, positions: tl.tensor,
    lengths: tl.tensor, key_counts: tl.tensor, value_counts: tl.tensor,
    kb: int, kg: int, kt: int, vb: int, vg: int, vt: int, kcb: int, kcg: int, kct: int, ksb: int, ksg: int, kst: int,
    vcb: int, vcg: int, vct: int, vsb: int, vsg: int, vst: int, groups: int, late: int, residual: int,
    D: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, SPAN: tl.constexpr, BLOCK_SPAN: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, BLOCK_VALUES: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) // groups
    head = tl.program_id(0) % groups
    part = tl.program_id(1)
    tokens = tl.load(positions + row) + 1
    levels: tl.constexpr = 2**BITS - 1
    s = tl.arange(0, BLOCK_SPAN)
    long_row = row.to(tl.int64)
    if part == residual // GROUP:
        # one value leaves the window
        if head == 0:
            tl.store(lengths + row, tokens)
            tl.store(key_counts + row, tokens // residual * residual)
            tl.store(value_counts + row, tl.maximum(tokens - residual, 0))
        token = tokens - 1 - residual
        if token >= 0:
            source = late_values + long_row * vb + head * vg + (token % late).to(tl.int64) * vt
            codes_of = value_codes + long_row * vcb + head * vcg + token.to(tl.int64) * vct
            scales_of = value_scales + long_row * vsb + head * vsg + token.to(tl.int64) * vst
            v = tl.arange(0, BLOCK_VALUES)
            packed = tl.zeros((BLOCK_SPAN,), tl.int32)
            for plane in tl.static_range(PLANES):
                c = plane * SPAN + s
                first = c // VALUE_GROUP * VALUE_GROUP
                valid = (s < SPAN)[:, None] & (v < VALUE_GROUP)[None, :]
                numbers = tl.load(source + first[:, None] + v[None, :], mask=valid, other=0.0).to(tl.float32)
                scale, low = _parameters(numbers, (v < VALUE_GROUP)[None, :], levels)
                own = tl.load(source + c, mask=s < SPAN, other=0.0).to(tl.float32)
                packed += _rounded(own, scale, low, levels) << (plane * BITS)
                place = scales_of + c // VALUE_GROUP
                tl.store(place, scale.to(tl.float16), mask=(s < SPAN) & (c == first))
                tl.store(place + D // VALUE_GROUP, low.to(tl.float16), mask=(s < SPAN) & (c == first))
            tl.store(codes_of + s, packed.to(tl.uint8), mask=s < SPAN)
    elif tokens % residual == 0:
        # a group of keys is full
        start = tokens - residual + part * GROUP
        t = tl.arange(0, BLOCK_GROUP)
        place = ((start + t) % late).to(tl.int64) * kt
        source = late_keys + long_row * kb + head * kg + place[None, :]
        number = (start // GROUP).to(tl.int64)
        codes_of = key_codes + long_row * kcb + head * kcg + number * kct
        scales_of = key_scales + long_row * ksb + head * ksg + number * kst
        valid = (s < SPAN)[:, None] & (t < GROUP)[None, :]
        packed = tl.zeros((BLOCK_SPAN, BLOCK_GROUP), tl.int32)
        for plane in tl.static_range(PLANES):
            c = plane * SPAN + s
            numbers = tl.load(source + c[:, None], mask=valid, other=0.0).to(tl.float32)
            scale, low = _parameters(numbers, (t < GROUP)[None, :], levels)
            packed += _rounded(numbers, scale[:, None], low[:, None], levels) << (plane * BITS)
            tl.store(scales_of + c, scale.to(tl.float16), mask=s < SPAN)
            tl.store(scales_of + D + c, low.to(tl.float16), mask=s < SPAN)
        tl.store(codes_of + (s * GROUP)[:, None] + t[None, :], packed.to(tl.uint8), mask=valid)


@kernel
def settle_kivi(store: KIVICodes, keys: Tensor, values: Tensor, positions: Tensor, residual: int) -> None:
    """Put the token at `positions`, int32 [B], into the store and quantise as KIVI does.

    `keys` and `values` [B, G, 1, d] go to the late tokens' slot, of at least `residual` + 1. Where the tokens are now a
    multiple of `residual`, the last `residual` keys are quantised; the value of the token that is `residual` tokens
    old is quantised. The store's `lengths`, `quantised_keys` and `quantised_values`, int32 [B], are written.
    Raises KVBenchError where shapes do not fit.
    """
    batch, groups, _, dim = keys.shape
    late = store.late_keys.shape[2]
    check_rows("late keys", store.late_keys, batch, groups, dim)
    if late <= residual or store.late_values.shape[2] != late or residual % store.group:
        raise KVBenchError(
            f"{late} and {store.late_values.shape[2]} slots for late keys and values, and groups of {store.group}: "
            f"more than the residual of {residual} tokens, a multiple of the group, are expected."
        )
    insert(store.late_keys, store.late_values, keys, values, positions, window=late)
    if not compiled(keys):
        _twin(store, positions, residual)
        return
    span, parts = dim * store.bits // 8, (
        store.late_keys, store.late_values, store.key_codes, store.key_scales, store.value_codes, store.value_scales
    )  # fmt: skip
    with device_of(keys):
        _settle[(batch * groups, residual // store.group + 1)](
            *parts, positions, store.lengths, store.quantised_keys, store.quantised_values,
            *(stride for part in parts for stride in part.stride()[:3]), groups, late, residual,
            dim, store.bits, 8 // store.bits, span, next_power_of_2(span), store.group, next_power_of_2(store.group),
            store.value_group, next_power_of_2(store.value_group), num_warps=4,
        )  # fmt: skip


def _coded(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Packed codes [..., bytes], and scales and minima [..., 2s], of numbers in groups [..., s, n]."""
    groups = groups.float()
    low = groups.amin(-1).half()
    scale = ((groups.amax(-1) - low) / (2**bits - 1)).half().clamp_min(torch.finfo(torch.float16).tiny)
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 2**bits - 1).int().flatten(-2)
    planes = codes.view(*codes.shape[:-1], 8 // bits, -1)
    shifts = torch.arange(8 // bits, device=codes.device, dtype=torch.int32)[:, None] * bits
    return (planes << shifts).sum(-2).to(torch.uint8), torch.cat([scale, low], dim=-1)


def _twin(store: KIVICodes, positions: Tensor, residual: int) -> None:
    tokens, late = positions.long() + 1, store.late_keys.shape[2]
    store.lengths.copy_(tokens)
    store.quantised_keys.copy_(tokens // residual * residual)
    store.quantised_values.copy_((tokens - residual).clamp_min(0))
    row = torch.arange(len(tokens), device=tokens.device)
    place = tokens[:, None] - residual + torch.arange(residual, device=tokens.device)
    keys = store.late_keys[row[:, None], :, place % late].transpose(1, 2)
    keys = keys.reshape(*keys.shape[:2], -1, store.group, keys.shape[3])
    codes, scales = _coded(keys.transpose(-1, -2), store.bits)
    number = (tokens - residual)[:, None] // store.group + torch.arange(residual // store.group, device=tokens.device)
    full = (tokens % residual == 0) & (tokens > 0)
    _put(store.key_codes, codes, row, number, full)
    _put(store.key_scales, scales, row, number, full)
    token = tokens[:, None] - 1 - residual
    values = store.late_values[row[:, None], :, token % late].transpose(1, 2)
    values = values.reshape(*values.shape[:3], -1, store.value_group)
    codes, scales = _coded(values, store.bits)
    _put(store.value_codes, codes, row, token, token[:, 0] >= 0)
    _put(store.value_scales, scales, row, token, token[:, 0] >= 0)


def _put(target: Tensor, rows: Tensor, row: Tensor, numbers: Tensor, where: Tensor) -> None:
    """Write `rows` [B, G, m, x] at `numbers` [B, m] of the rows of the batch that `where` [B] marks."""
    if not target.shape[2]:
        return
    at = row[:, None], slice(None), numbers.clamp(0, target.shape[2] - 1)
    target[at] = torch.where(where[:, None, None, None], rows.transpose(1, 2), target[at])
