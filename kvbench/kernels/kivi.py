"""Attention over KIVI's codes (arXiv 2402.02750), decoded inside the kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.kivi_parts import any_tokens, coded_tiles, joined
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


_WARPS, _STAGES = 2, 2  # on an H200 at 128K: 150 us; 181 with 4 warps, 174 with 1 stage, 535 token by token


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
    lb: int, lg: int, nkb: int, nkg: int, nvb: int, nvg: int, late_k: int, late_v: int, splits: int, whole: int,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_SPAN: tl.constexpr, GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, TOKENS: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, BLOCK_R: tl.constexpr, NUMBER: tl.constexpr, WIDTH: tl.constexpr,
    LIKE: tl.constexpr, OFFSET: tl.constexpr,
) -> None:  # fmt: skip
    """One part of one head's tokens: the first `whole` of the `splits` parts have whole tiles of codes alone.

    With NUMBER 0 there are no such parts.
    """
    split = tl.program_id(0) % splits
    program = tl.program_id(0) // splits
    row = program // G
    group = program % G
    tokens = tl.load(lengths + row * lb + group * lg)
    coded_keys = tl.load(key_counts + row * nkb + group * nkg)
    coded_values = tl.load(value_counts + row * nvb + group * nvg)
    long_row = row.to(tl.int64)
    q += long_row * qb
    key_codes += long_row * kcb + group * kcg
    key_scales += long_row * ksb + group * ksg
    value_codes += long_row * vcb + group * vcg
    value_scales += long_row * vsb + group * vsg
    late_keys += long_row * kb + group * kg
    late_values += long_row * vb + group * vg
    place = (split * batch + row).to(tl.int64) * (G * R) + group * R
    start = 0
    if NUMBER > 0:
        tiles = tl.minimum(tl.minimum(coded_keys, coded_values), tokens) // (NUMBER * GROUP)
        start = tiles * (NUMBER * GROUP)
        if split < whole:
            each = tl.cdiv(tiles, whole)
            peak, total, sums0, sums1, sums2, sums3 = coded_tiles(
                split * each, tl.minimum(split * each + each, tiles), q, qh, scale, cap, group * R,
                key_codes, key_scales, value_codes, value_scales, kct, kst, vct, vst,
                R, D, BITS, SPAN, GROUP, VALUE_GROUP, BLOCK_R, NUMBER, WIDTH, CAPPED, LIKE, OFFSET,
            )  # fmt: skip
            best = tl.max(tl.reshape(peak, (NUMBER, BLOCK_R)), 0)
            best = tl.where(best == float("-inf"), 0.0, best)
            every = tl.reshape(tl.broadcast_to(best[None, :], (NUMBER, BLOCK_R)), (NUMBER * BLOCK_R,))
            fade = tl.exp2(peak - every)
            total = tl.sum(tl.reshape(total * fade, (NUMBER, BLOCK_R)), 0)
            r = tl.arange(0, BLOCK_R)
            filled = total > 0
            total = tl.where(filled, total, 1.0)
            found = tl.where(filled, (best + tl.log2(total)) * 0.6931471805599453, float("-inf"))
            tl.store(part_lses + place + r, found, mask=r < R)
            target = parts + (place + r)[:, None] * D + tl.arange(0, WIDTH)[None, :]
            mask = ((r < R) & filled)[:, None]
            tl.store(target, joined(sums0, fade, BLOCK_R, NUMBER) / total[:, None], mask=mask)
            if D // WIDTH > 1:
                tl.store(target + WIDTH, joined(sums1, fade, BLOCK_R, NUMBER) / total[:, None], mask=mask)
            if D // WIDTH > 2:
                tl.store(target + 2 * WIDTH, joined(sums2, fade, BLOCK_R, NUMBER) / total[:, None], mask=mask)
            if D // WIDTH > 3:
                tl.store(target + 3 * WIDTH, joined(sums3, fade, BLOCK_R, NUMBER) / total[:, None], mask=mask)
    if split >= whole:
        each = tl.cdiv(tl.cdiv(tokens - start, TOKENS), splits - whole) * TOKENS
        begin = start + (split - whole) * each
        peak, total, sums = any_tokens(
            begin, tl.minimum(begin + each, tokens), coded_keys, coded_values, q, qh, scale, cap, group * R,
            key_codes, key_scales, value_codes, value_scales, late_keys, late_values, kct, kst, vct, vst, kt, vt,
            late_k, late_v, R, D, ROWS, BITS, PLANES, SPAN, BLOCK_SPAN, GROUP, VALUE_GROUP, TOKENS, CAPPED, UPCAST,
        )  # fmt: skip
        r = tl.arange(0, ROWS)
        i = tl.arange(0, PLANES * BLOCK_SPAN)
        c = i // BLOCK_SPAN * SPAN + i % BLOCK_SPAN
        filled = total > 0
        total = tl.where(filled, total, 1.0)
        found = tl.where(filled, (peak + tl.log2(total)) * 0.6931471805599453, float("-inf"))
        tl.store(part_lses + place + r, found, mask=r < R)
        tl.store(
            parts + (place + r)[:, None] * D + c[None, :], sums / total[:, None],
            mask=((r < R) & filled)[:, None] & (i % BLOCK_SPAN < SPAN)[None, :],
        )  # fmt: skip


@dataclass(frozen=True)
class _Tiles:
    """How whole tiles of codes are read: BLOCK_R, NUMBER of groups in a tile (0: not at all), and WIDTH of a piece."""

    rows: int = 1
    number: int = 0
    width: int = 16


def _tiles(store: KIVICodes, share: int, dim: int) -> _Tiles:
    span, rows = dim * store.bits // 8, next_power_of_2(share)
    width = min(span, store.value_group)
    powers = all(size >= 16 and size == next_power_of_2(size) for size in (store.group, store.value_group, span, dim))
    if not powers or dim // width > 4 or rows > 16 or store.group > 128:
        return _Tiles()
    return _Tiles(rows, 16 // rows, width)


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
    check_store(store, rows, dim)
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
    tiles, whole = _tiles(store, heads // groups, dim), 0
    blocks = -(-capacity // (tiles.number * store.group or tokens))
    if splits is None:
        splits = split_count(queries.device, batch * groups, blocks)
    if tiles.number:  # what is not in whole tiles has parts of its own
        whole, splits = splits, splits + (4 if queries.is_cuda else 1)
    parts = queries.new_empty((splits, batch, heads, 1, dim), dtype=torch.float32)
    part_lses = queries.new_empty((splits, batch, heads), dtype=torch.float32)
    like = 0 if wide else 1 if queries.dtype == torch.float16 else 2
    offset = (0.0, 1024.0, 128.0 if store.bits <= 4 else 0.0)[like]
    rows_of = (store.key_codes, store.key_scales, store.value_codes, store.value_scales, store.late_keys)
    span = dim * store.bits // 8
    with device_of(queries):
        _kivi[(batch * groups * splits,)](
            queries, parts, part_lses, queries.stride(0), queries.stride(1), scaling, softcap or 0.0, batch,
            *rows_of, store.late_values, *counts,
            *(stride for part in (*rows_of, store.late_values) for stride in part.stride()[:3]),
            *(stride for part in counts for stride in part.stride()),
            store.late_keys.shape[2], store.late_values.shape[2], splits, whole,
            groups, heads // groups, dim, max(16, next_power_of_2(heads // groups)), store.bits, 8 // store.bits,
            span, max(16 * store.bits // 8, next_power_of_2(span)), store.group, store.value_group, tokens,
            softcap is not None, wide, tiles.rows, tiles.number, tiles.width, like, offset,
            num_warps=8 if wide else _WARPS, num_stages=_STAGES,
        )  # fmt: skip
        launch_merge(parts, part_lses, output, lse)
    return output, lse


def check_store(store: KIVICodes, batch: int, dim: int) -> None:
    """Raise KVBenchError unless a store's tensors fit together, `batch` rows and heads of dimension `dim`."""
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


def decoded(packed: Tensor, scales: Tensor, bits: int, numbers: int) -> Tensor:
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
    keys = decoded(store.key_codes, store.key_scales, store.bits, store.group).transpose(3, 4).flatten(2, 3)
    values = decoded(store.value_codes, store.value_scales, store.bits, store.value_group).flatten(3)
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
