"""Attention over KIVI's codes (arXiv 2402.02750), decoded inside the kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.merge import launch_merge
from kvbench.kernels.segments import capped
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


@dataclass(frozen=True)
class KIVICodes:
    """A store of tokens whose older keys and values are codes of 1, 2, 4 or 8 `bits`, in the format of policy `kivi`.

    Keys are quantised in groups of `group` tokens per channel: `key_codes`, uint8 [B, G, t / group, bytes] with number
    i = channel · group + token, and `key_scales`, float16 [B, G, t / group, 2d], scales, then minima. Values are
    quantised in groups of `value_group` channels per token: `value_codes`, uint8 [B, G, t, bytes], and `value_scales`,
    float16 [B, G, t, 2d / value_group]. Number i of a row of P bytes lies in byte i mod P, from bit bits · ⌊i / P⌋ on.
    The first `quantised_keys` and `quantised_values`, int32 [B] or [B, G], of the `lengths` tokens are codes; token t
    of the others lies in slot t mod L of `late_keys` and `late_values` [B, G, L, d].
    """

    key_codes: Tensor
    key_scales: Tensor
    value_codes: Tensor
    value_scales: Tensor
    late_keys: Tensor
    late_values: Tensor
    lengths: Tensor
    quantised_keys: Tensor
    quantised_values: Tensor
    bits: int = 2
    group: int = 32
    value_group: int = 32


@jit
def _kivi(
    q: tl.tensor, parts: tl.tensor, part_lses: tl.tensor, qb: int, qh: int, scale: float, cap: float, batch: int,
    key_codes: tl.tensor, key_scales: tl.tensor, value_codes: tl.tensor, value_scales: tl.tensor,
    late_keys: tl.tensor, late_values: tl.tensor, lengths: tl.tensor, key_counts: tl.tensor, value_counts: tl.tensor,
    kcb: int, kcg: int, kct: int, ksb: int, ksg: int, kst: int, vcb: int, vcg: int, vct: int,
    vsb: int, vsg: int, vst: int, kb: int, kg: int, kt: int, vb: int, vg: int, vt: int,
    lb: int, lg: int, nkb: int, nkg: int, nvb: int, nvg: int, late_k: int, late_v: int, splits: int,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_SPAN: tl.constexpr, GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, TOKENS: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """A row's bytes hold SPAN channels (of SPAN·GROUP numbers for keys) a plane, padded to BLOCK_SPAN."""
    split = tl.program_id(0) % splits
    program = tl.program_id(0) // splits
    row = program // G
    group = program % G
    tokens = tl.load(lengths + row * lb + group * lg)
    coded_keys = tl.load(key_counts + row * nkb + group * nkg)
    coded_values = tl.load(value_counts + row * nvb + group * nvg)
    long_row = row.to(tl.int64)
    key_codes += long_row * kcb + group * kcg
    key_scales += long_row * ksb + group * ksg
    value_codes += long_row * vcb + group * vcg
    value_scales += long_row * vsb + group * vsg
    late_keys += long_row * kb + group * kg
    late_values += long_row * vb + group * vg
    r = tl.arange(0, ROWS)
    s = tl.arange(0, BLOCK_SPAN)
    i = tl.arange(0, PLANES * BLOCK_SPAN)  # channels in the order in which planes unpack
    c = i // BLOCK_SPAN * SPAN + i % BLOCK_SPAN
    real = i % BLOCK_SPAN < SPAN
    shifts = tl.arange(0, PLANES) * BITS
    head = group * R + r
    own = r < R
    queries = tl.load(q + long_row * qb + head[:, None] * qh + c[None, :], mask=own[:, None] & real[None, :], other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, PLANES * BLOCK_SPAN), tl.float32)
    each = tl.cdiv(tl.cdiv(tokens, TOKENS), splits) * TOKENS
    stop = tl.minimum(split * each + each, tokens)
    for at in range(split * each, stop, TOKENS):
        t = at + tl.arange(0, TOKENS)
        valid = t < stop
        coded = valid & (t < coded_keys)
        group_of = (t // GROUP).to(tl.int64)
        packed = tl.load(
            key_codes + (group_of * kct + t % GROUP)[None, :] + (s * GROUP)[:, None],
            mask=coded[None, :] & (s < SPAN)[:, None], other=0,
        )  # fmt: skip
        codes = (packed[None, :, :].to(tl.int32) >> shifts[:, None, None]) & (2**BITS - 1)
        codes = tl.reshape(codes, (PLANES * BLOCK_SPAN, TOKENS)).to(tl.float32)
        if GROUP % TOKENS == 0:  # the tile lies in one group
            first = key_scales + tl.cast(at // GROUP, tl.int64) * kst
            steps = tl.load(first + c, mask=real & (at + 0 * i < coded_keys), other=0.0)[:, None].to(tl.float32)
            lows = tl.load(first + D + c, mask=real & (at + 0 * i < coded_keys), other=0.0)[:, None].to(tl.float32)
        else:
            place = key_scales + (group_of * kst)[None, :] + c[:, None]
            steps = tl.load(place, mask=coded[None, :] & real[:, None], other=0.0).to(tl.float32)
            lows = tl.load(place + D, mask=coded[None, :] & real[:, None], other=0.0).to(tl.float32)
        late = tl.load(
            late_keys + ((t % late_k).to(tl.int64) * kt)[None, :] + c[:, None],
            mask=(valid & (t >= coded_keys))[None, :] & real[:, None], other=0.0,
        )  # fmt: skip
        rows = tl.where(coded[None, :], lows + steps * codes, late.to(tl.float32)).to(queries.dtype)
        logits = tl.dot(queries, rows, input_precision="ieee") * scale
        if CAPPED:
            logits = capped(logits, cap)
        logits = tl.where(valid[None, :], logits * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(peak - shift)
        peak = higher
        total = total * fade + tl.sum(weights, 1)
        coded = valid & (t < coded_values)
        packed = tl.load(
            value_codes + (t.to(tl.int64) * vct)[:, None] + s[None, :],
            mask=coded[:, None] & (s < SPAN)[None, :], other=0,
        )  # fmt: skip
        codes = (packed[:, None, :].to(tl.int32) >> shifts[None, :, None]) & (2**BITS - 1)
        if VALUE_GROUP % SPAN == 0:  # a plane's channels share a scale
            place = value_scales + (t.to(tl.int64) * vst)[:, None] + (shifts // BITS * SPAN // VALUE_GROUP)[None, :]
            steps = tl.load(place, mask=coded[:, None] & (shifts >= 0)[None, :], other=0.0).to(tl.float32)
            lows = tl.load(place + D // VALUE_GROUP, mask=coded[:, None] & (shifts >= 0)[None, :], other=0.0)
            rows = lows.to(tl.float32)[:, :, None] + steps[:, :, None] * codes.to(tl.float32)
            rows = tl.reshape(rows, (TOKENS, PLANES * BLOCK_SPAN))
        else:
            place = value_scales + (t.to(tl.int64) * vst)[:, None] + (c // VALUE_GROUP)[None, :]
            steps = tl.load(place, mask=coded[:, None] & real[None, :], other=0.0).to(tl.float32)
            lows = tl.load(place + D // VALUE_GROUP, mask=coded[:, None] & real[None, :], other=0.0).to(tl.float32)
            rows = lows + steps * tl.reshape(codes, (TOKENS, PLANES * BLOCK_SPAN)).to(tl.float32)
        late = tl.load(
            late_values + ((t % late_v).to(tl.int64) * vt)[:, None] + c[None, :],
            mask=(valid & (t >= coded_values))[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        rows = tl.where(coded[:, None], rows, late.to(tl.float32)).to(queries.dtype)
        sums = sums * fade[:, None] + tl.dot(weights.to(queries.dtype), rows, input_precision="ieee")
    filled = total > 0
    total = tl.where(filled, total, 1.0)
    place = (split * batch + row).to(tl.int64) * (G * R) + head
    tl.store(part_lses + place, tl.where(filled, (peak + tl.log2(total)) * 0.6931471805599453, float("-inf")), mask=own)
    tl.store(
        parts + place[:, None] * D + c[None, :], sums / total[:, None],
        mask=(own & filled)[:, None] & real[None, :],
    )  # fmt: skip


@kernel
def attend_kivi(
    queries: Tensor,
    store: KIVICodes,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    output: Tensor | None = None,
    lse: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `queries` [B, H, 1, d] over a store of KIVI's codes and late tokens.

    Options, results and errors are those of `attend`. Decoded keys and values take the queries' type.
    """
    batch, groups = store.key_codes.shape[:2]
    rows, heads, dim = check_grouped(queries, groups)
    _check(store, rows, dim)
    scaling = dim**-0.5 if scaling is None else scaling
    output = empty_or(output, (batch, heads, 1, dim), dtype, queries.device)
    lse = empty_or(lse, (batch, heads), torch.float32, queries.device)
    counts = [
        per_group(numbers, batch, groups, what)
        for what, numbers in (
            ("lengths", store.lengths),
            ("counts of quantised keys", store.quantised_keys),
            ("counts of quantised values", store.quantised_values),
        )
    ]
    if not compiled(queries):
        _twin(queries, store, counts, scaling, softcap, output, lse)
        return output, lse
    capacity = store.value_codes.shape[2] + store.late_values.shape[2]
    wide = dots_in_float32(queries)
    tokens = 16 if wide and dim > 128 else 32
    if splits is None:
        splits = split_count(queries.device, batch * groups, -(-capacity // tokens))
    parts = queries.new_empty((splits, batch, heads, 1, dim), dtype=torch.float32)
    part_lses = queries.new_empty((splits, batch, heads), dtype=torch.float32)
    rows_of = (store.key_codes, store.key_scales, store.value_codes, store.value_scales, store.late_keys)
    span = dim * store.bits // 8
    with device_of(queries):
        _kivi[(batch * groups * splits,)](
            queries, parts, part_lses, queries.stride(0), queries.stride(1), scaling, softcap or 0.0, batch,
            *rows_of, store.late_values, *counts,
            *(stride for part in (*rows_of, store.late_values) for stride in part.stride()[:3]),
            *(stride for part in counts for stride in part.stride()),
            store.late_keys.shape[2], store.late_values.shape[2], splits,
            groups, heads // groups, dim, max(16, next_power_of_2(heads // groups)), store.bits, 8 // store.bits,
            span, max(16 * store.bits // 8, next_power_of_2(span)), store.group, store.value_group, tokens,
            softcap is not None, wide, num_warps=8 if wide else 4, num_stages=2,
        )  # fmt: skip
        launch_merge(parts, part_lses, output, lse)
    return output, lse


def _check(store: KIVICodes, batch: int, dim: int) -> None:
    groups, bits = store.key_codes.shape[1], store.bits
    if bits not in (1, 2, 4, 8) or dim * bits % 8 or store.group < 1 or dim % store.value_group:
        raise KVBenchError(
            f"{bits} bits, groups of {store.group} tokens and {store.value_group} channels don't fit dimension {dim}: "
            "bits are 1, 2, 4 or 8, a row of codes fills bytes, and groups of channels divide the dimension."
        )
    for what, rows, width in (
        ("codes of keys", store.key_codes, dim * store.group * bits // 8),
        ("scales of keys", store.key_scales, 2 * dim),
        ("codes of values", store.value_codes, dim * bits // 8),
        ("scales of values", store.value_scales, 2 * dim // store.value_group),
        ("late keys", store.late_keys, dim),
        ("late values", store.late_values, dim),
    ):
        check_rows(what, rows, batch, groups, width)
    if store.key_codes.dtype != torch.uint8 or store.value_codes.dtype != torch.uint8:
        raise KVBenchError(f"codes are {store.key_codes.dtype} and {store.value_codes.dtype}, not torch.uint8.")


def _decoded(packed: Tensor, scales: Tensor, bits: int, numbers: int) -> Tensor:
    """Groups [..., s, numbers] from their codes [..., bytes] and scales and minima [..., 2s]."""
    codes = torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)
    steps, lows = scales.float().chunk(2, dim=-1)
    return codes.reshape(*steps.shape, numbers) * steps[..., None] + lows[..., None]


def _twin(
    queries: Tensor,
    store: KIVICodes,
    counts: list[Tensor],
    scaling: float,
    softcap: float | None,
    output: Tensor,
    lse: Tensor,
) -> None:
    lengths, coded_keys, coded_values = counts
    batch, heads, _, dim = queries.shape
    longest = (
        int(lengths.max()) if lengths.device.type == "cpu" else store.value_codes.shape[2] + store.late_values.shape[2]
    )
    place = torch.arange(longest, device=queries.device)
    keys = _decoded(store.key_codes, store.key_scales, store.bits, store.group).transpose(3, 4).flatten(2, 3)
    values = _decoded(store.value_codes, store.value_scales, store.bits, store.value_group).flatten(3)
    rows = []
    for coded, late, count in ((keys, store.late_keys, coded_keys), (values, store.late_values, coded_values)):
        old = coded[:, :, place.clamp_max(max(coded.shape[2] - 1, 0))] if coded.shape[2] else coded.new_zeros(1)
        new = late[:, :, place % late.shape[2]].float()
        rows.append(torch.where((place < count[..., None])[..., None], old, new))
    logits = (queries.float().reshape(batch, lengths.shape[1], -1, dim) @ rows[0].transpose(-1, -2)) * scaling
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill((place >= lengths[..., None])[:, :, None], -torch.inf)
    peaks = logits.logsumexp(-1)
    weights = (logits - torch.where(peaks.isfinite(), peaks, 0)[..., None]).exp()
    lse.copy_(peaks.flatten(1, 2))
    output.copy_((weights @ rows[1]).view(batch, heads, 1, dim))
