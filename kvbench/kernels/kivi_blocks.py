"""Attention over chosen blocks of tokens in KIVI's codes (arXiv 2402.02750), decoded inside the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.kivi import KIVICodes, check_store, decoded
from kvbench.kernels.merge import launch_merge
from kvbench.kernels.segments import capped
from kvbench.kernels.support import (
    check_grouped,
    compiled,
    device_of,
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

_TOKENS = 32


@jit
def _blocks(
    q: tl.tensor, parts: tl.tensor, part_lses: tl.tensor, qb: int, qh: int, scale: float, cap: float, batch: int,
    key_codes: tl.tensor, key_scales: tl.tensor, value_codes: tl.tensor, value_scales: tl.tensor,
    late_keys: tl.tensor, late_values: tl.tensor, lengths: tl.tensor, key_counts: tl.tensor, value_counts: tl.tensor,
    ids: tl.tensor, kcb: int, kcg: int, kct: int, ksb: int, ksg: int, kst: int, vcb: int, vcg: int, vct: int,
    vsb: int, vsg: int, vst: int, kb: int, kg: int, kt: int, vb: int, vg: int, vt: int,
    lb: int, lg: int, nkb: int, nkg: int, nvb: int, nvg: int, ib: int, ih: int, late_k: int, late_v: int,
    count: int, splits: int, UNIT: tl.constexpr, H: tl.constexpr, SHARE: tl.constexpr, SET_SHARE: tl.constexpr,
    D: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, SPAN: tl.constexpr, BLOCK_SPAN: tl.constexpr,
    GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, TOKENS: tl.constexpr, CAPPED: tl.constexpr,
) -> None:  # fmt: skip
    """One part of one query head's tokens, of `count`; H query heads, SHARE of which have one key/value head."""
    split = tl.program_id(0) % splits
    program = tl.program_id(0) // splits
    row = program // H
    head = program % H
    group = head // SHARE
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
    ids += long_row * ib + head // SET_SHARE * ih
    s = tl.arange(0, BLOCK_SPAN)
    i = tl.arange(0, PLANES * BLOCK_SPAN)  # channels in the order in which planes unpack
    c = i // BLOCK_SPAN * SPAN + i % BLOCK_SPAN
    real = i % BLOCK_SPAN < SPAN
    shifts = tl.arange(0, PLANES) * BITS
    stored = tl.load(q + long_row * qb + head * qh + c, mask=real, other=0.0)
    query = stored.to(tl.float32)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((PLANES * BLOCK_SPAN,), tl.float32)
    each = tl.cdiv(tl.cdiv(count, TOKENS), splits) * TOKENS
    stop = tl.minimum(split * each + each, count)
    for at in range(split * each, stop, TOKENS):
        slot = at + tl.arange(0, TOKENS)
        inside = slot < stop
        block = tl.load(ids + slot // UNIT, mask=inside, other=-1).to(tl.int64)
        t = block * UNIT + slot % UNIT
        valid = inside & (block >= 0) & (t < tokens)
        t = tl.where(valid, t, 0)
        coded = valid & (t < coded_keys)
        packed = tl.load(
            key_codes + (t // GROUP * kct + t % GROUP)[None, :] + (s * GROUP)[:, None],
            mask=coded[None, :] & (s < SPAN)[:, None], other=0,
        )  # fmt: skip
        codes = (packed[None, :, :].to(tl.int32) >> shifts[:, None, None]) & (2**BITS - 1)
        codes = tl.reshape(codes, (PLANES * BLOCK_SPAN, TOKENS)).to(tl.float32)
        place = key_scales + (t // GROUP * kst)[None, :] + c[:, None]
        steps = tl.load(place, mask=coded[None, :] & real[:, None], other=0.0).to(tl.float32)
        lows = tl.load(place + D, mask=coded[None, :] & real[:, None], other=0.0).to(tl.float32)
        late = tl.load(
            late_keys + (t % late_k * kt)[None, :] + c[:, None],
            mask=(valid & (t >= coded_keys))[None, :] & real[:, None], other=0.0,
        )  # fmt: skip
        rows = tl.where(coded[None, :], lows + steps * codes, late.to(tl.float32)).to(stored.dtype).to(tl.float32)
        logits = tl.sum(query[:, None] * rows, 0) * scale
        if CAPPED:
            logits = capped(logits, cap)
        logits = tl.where(valid, logits * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift)
        fade = tl.exp2(peak - shift)
        peak = higher
        total = total * fade + tl.sum(weights, 0)
        coded = valid & (t < coded_values)
        packed = tl.load(
            value_codes + (t * vct)[:, None] + s[None, :], mask=coded[:, None] & (s < SPAN)[None, :], other=0
        )
        codes = (packed[:, None, :].to(tl.int32) >> shifts[None, :, None]) & (2**BITS - 1)
        codes = tl.reshape(codes, (TOKENS, PLANES * BLOCK_SPAN)).to(tl.float32)
        place = value_scales + (t * vst)[:, None] + (c // VALUE_GROUP)[None, :]
        steps = tl.load(place, mask=coded[:, None] & real[None, :], other=0.0).to(tl.float32)
        lows = tl.load(place + D // VALUE_GROUP, mask=coded[:, None] & real[None, :], other=0.0).to(tl.float32)
        late = tl.load(
            late_values + (t % late_v * vt)[:, None] + c[None, :],
            mask=(valid & (t >= coded_values))[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        rows = tl.where(coded[:, None], lows + steps * codes, late.to(tl.float32)).to(stored.dtype).to(tl.float32)
        sums = sums * fade + tl.sum(weights[:, None] * rows, 0)
    filled = total > 0
    total = tl.where(filled, total, 1.0)
    place = (split * batch + row).to(tl.int64) * H + head
    tl.store(part_lses + place, tl.where(filled, (peak + tl.log2(total)) * 0.6931471805599453, float("-inf")))
    tl.store(parts + place * D + c, sums / total, mask=real)


@kernel
def attend_kivi_blocks(
    queries: Tensor,
    store: KIVICodes,
    ids: Tensor,
    *,
    unit: int = 1,
    scaling: float | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    output: Tensor | None = None,
    lse: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `queries` [B, H, 1, d] over the chosen blocks of a store of KIVI's codes and late tokens.

    `ids`, int32 or int64 [B, G or H, k], name blocks of `unit` tokens; −1 is none, and tokens from the store's
    lengths on are left out. Options, results and errors are those of `attend`.
    """
    batch, groups = store.key_codes.shape[:2]
    rows, heads, dim = check_grouped(queries, groups)
    check_store(store, rows, dim)
    if ids.dim() != 3 or ids.shape[0] != batch or ids.shape[1] not in (groups, heads) or ids.stride(2) != 1 or unit < 1:
        raise KVBenchError(
            f"ids {list(ids.shape)} of blocks of {unit} are not [{batch}, {groups} or {heads}, k], the last contiguous."
        )
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
        _twin(queries, store, counts, ids, unit, scaling, softcap, output, lse)
        return output, lse
    count, span = ids.shape[2] * unit, dim * store.bits // 8
    if splits is None:
        splits = split_count(queries.device, batch * heads, -(-count // _TOKENS))
    parts = queries.new_empty((splits, batch, heads, 1, dim), dtype=torch.float32)
    part_lses = queries.new_empty((splits, batch, heads), dtype=torch.float32)
    held = (
        store.key_codes, store.key_scales, store.value_codes, store.value_scales, store.late_keys, store.late_values
    )  # fmt: skip
    with device_of(queries):
        _blocks[(batch * heads * splits,)](
            queries, parts, part_lses, queries.stride(0), queries.stride(1), scaling, softcap or 0.0, batch,
            *held, *counts, ids, *(stride for part in held for stride in part.stride()[:3]),
            *(stride for part in counts for stride in part.stride()), *ids.stride()[:2],
            store.late_keys.shape[2], store.late_values.shape[2], count, splits,
            unit, heads, heads // groups, heads // ids.shape[1], dim, store.bits, 8 // store.bits, span,
            next_power_of_2(span), store.group, store.value_group, _TOKENS, softcap is not None, num_warps=4,
        )  # fmt: skip
        launch_merge(parts, part_lses, output, lse)
    return output, lse


def _twin(
    queries: Tensor, store: KIVICodes, counts: list[Tensor], ids: Tensor, unit: int, scaling: float,
    softcap: float | None, output: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    batch, heads, _, dim = queries.shape
    sets, groups = ids.shape[1], store.key_codes.shape[1]
    token = (ids[..., None] * unit + torch.arange(unit, device=ids.device)).flatten(2).long()
    wide = [numbers.repeat_interleave(sets // groups, dim=1)[..., None] for numbers in counts]
    valid = (ids >= 0).repeat_interleave(unit, dim=-1) & (token < wide[0])
    token = token.masked_fill(~valid, 0)
    row = torch.arange(batch, device=ids.device)[:, None, None]
    group = (torch.arange(sets, device=ids.device) // (sets // groups))[:, None]
    keys = decoded(store.key_codes, store.key_scales, store.bits, store.group).transpose(3, 4).flatten(2, 3)
    values = decoded(store.value_codes, store.value_scales, store.bits, store.value_group).flatten(3)
    rows = []
    for coded, late, number in ((keys, store.late_keys, wide[1]), (values, store.late_values, wide[2])):
        old = coded[row, group, token.clamp_max(max(coded.shape[2] - 1, 0))]
        new = late[row, group, token % late.shape[2]].float()
        rows.append(torch.where((token < number)[..., None], old, new))
    logits = (queries.float().reshape(batch, sets, -1, dim) @ rows[0].transpose(-1, -2)) * scaling
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(~valid[:, :, None], -torch.inf)
    peaks = logits.logsumexp(-1)
    weights = (logits - torch.where(peaks.isfinite(), peaks, 0)[..., None]).exp()
    lse.copy_(peaks.flatten(1, 2))
    output.copy_((weights @ rows[1]).view(batch, heads, 1, dim))
