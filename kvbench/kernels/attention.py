"""Attention of one query per head over segments of a key/value store: dense rows, token ids, block ids, ragged heads.

Split-K (Flash-Decoding, Dao et al. 2023): each program reads a part of one head's tokens, and `merge` joins the parts.
Lengths, offsets and ids are read on the device, so a launch can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.merge import launch_merge
from kvbench.kernels.segments import one_segment, three_segments, two_segments
from kvbench.kernels.sq8 import check_codes, decoded
from kvbench.kernels.support import (
    check_grouped,
    check_rows,
    compiled,
    device_of,
    dots_in_float32,
    empty_or,
    kernel,
    next_power_of_2,
    per_group,
    split_count,
    tile,
)


@dataclass(frozen=True)
class Segment:
    """Stored tokens that a query attends to, in one of three forms.

    `keys` [B, G, t, d] and `values` [B, G, t, d'], any strides but a contiguous last dimension, on the queries' device
    or in pinned host memory, which the kernel reads in place.

    - Dense: the first `lengths` rows, int32 [B] or [B, G], on the queries' device.
    - Selected: the tokens `ids`, int32 or int64 [B, G, k], or [B, H, k] with a set for each query head; −1 is none.
      With `unit` u an id names the block of tokens u·id to u·id + u − 1. Tokens from `lengths` on, where given, are
      left out.
    - Ragged: flat `keys` [n, d] and `values` [n, d'], where head g of row b has `lengths` [B, G] rows from `offsets`,
      int32 or int64 [B, G], on.

    Where `keys` or `values` are uint8 codes, `key_range` or `value_range` are their channels' minima and ranges,
    float32 [B, G, 2, d] (see `sq8`).

    `bias`, any float [B, G or H, t] (selected: [B, G or H, k·u]), is added to the scaled scores; −∞ masks a token.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor | None = None
    ids: Tensor | None = None
    unit: int = 1
    offsets: Tensor | None = None
    bias: Tensor | None = None
    key_range: Tensor | None = None
    value_range: Tensor | None = None

    def groups(self) -> int:
        """Key/value heads."""
        return self.keys.shape[1] if self.offsets is None else self.offsets.shape[1]


@dataclass(frozen=True)
class _Plan:
    """A checked segment's launch: its programs, its splits, its run-time and its compile-time arguments."""

    programs: int
    splits: int
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]


def _plan(segment: Segment, queries: Tensor, heads: int, splits: int | None) -> tuple[_Plan, int, int]:
    """The launch of a segment, and its tile's warps and stages."""
    keys, values, ids, bias = segment.keys, segment.values, segment.ids, segment.bias
    batch, groups = queries.shape[0], segment.groups()
    if segment.offsets is None:
        key_strides, value_strides = keys.stride()[:3], values.stride()[:3]
        count = keys.shape[2]
    else:
        key_strides, value_strides = (0, 0, keys.stride(0)), (0, 0, values.stride(0))
        count = keys.shape[0]
    sets, unit = groups, 0
    id_strides: tuple[int, ...] = (0, 0)
    if ids is not None:
        sets, unit, count, id_strides = ids.shape[1], segment.unit, ids.shape[2] * segment.unit, ids.stride()[:2]
    lengths = None if segment.lengths is None else per_group(segment.lengths, batch, groups, "lengths")
    bias_strides: tuple[int, ...] = (0, 0, 0)
    if bias is not None:
        share = heads // groups
        across = bias.stride(1)
        bias_strides = (
            (bias.stride(0), across, 0) if bias.shape[1] == groups else (bias.stride(0), across * share, across)
        )
    upcast = dots_in_float32(queries, keys, values)
    row_bytes = sum(rows.shape[-1] * (4 if upcast else rows.element_size()) for rows in (keys, values))
    tokens, warps, stages = tile(row_bytes, unit > 0, upcast)
    programs = batch * sets
    if splits is None:
        splits = split_count(queries.device, programs, -(-count // tokens))
    arguments = (
        keys, values,
        *(
            queries if tensor is None else tensor
            for tensor in (segment.key_range, segment.value_range, lengths, segment.offsets, ids, bias)
        ),
        *key_strides, *value_strides, *((0, 0) if lengths is None else lengths.stride()), *id_strides, *bias_strides,
        count, splits,
    )  # fmt: skip
    per_head = ids is not None and sets != groups
    given = (lengths, segment.offsets, bias, segment.key_range, segment.value_range)
    constants = (upcast, tokens, unit, per_head, *(tensor is not None for tensor in given))
    return _Plan(programs * splits, splits, arguments, constants), warps, stages


def _check(segment: Segment, batch: int, heads: int, dim: int, value_dim: int) -> None:
    keys, values, groups = segment.keys, segment.values, segment.groups()
    if segment.offsets is None:
        check_rows("keys", keys, batch, groups, dim)
        check_rows("values", values, batch, groups, value_dim)
    elif keys.dim() != 2 or values.dim() != 2 or keys.shape[1] != dim or keys.stride(1) != 1 or values.stride(1) != 1:
        raise KVBenchError(f"ragged keys {list(keys.shape)} and values {list(values.shape)} are not rows [n, {dim}].")
    elif segment.lengths is None or not segment.offsets.is_contiguous():
        raise KVBenchError("ragged heads need contiguous offsets [B, G] and lengths [B, G].")
    check_codes("keys", keys, segment.key_range, (batch, groups), dim)
    check_codes("values", values, segment.value_range, (batch, groups), value_dim)
    if keys.shape[-2] != values.shape[-2]:
        raise KVBenchError(f"{keys.shape[-2]} keys and {values.shape[-2]} values: one of each for a token is expected.")
    for what, listed, last in (("ids", segment.ids, None), ("bias", segment.bias, True)):
        if listed is None:
            continue
        if listed.dim() != 3 or listed.shape[0] != batch or listed.shape[1] not in (groups, heads):
            raise KVBenchError(f"{what} {list(listed.shape)} are not [{batch}, {groups} or {heads}, k].")
        expected = keys.shape[-2] if segment.ids is None else segment.ids.shape[2] * segment.unit
        if last and listed.shape[2] < expected:
            raise KVBenchError(f"{what} {list(listed.shape)} are fewer than the segment's {expected} tokens.")
        if listed.stride(2) != 1 and listed.shape[2] > 1:
            raise KVBenchError(f"{what} have strides {list(listed.stride())}: the last must be contiguous.")
    if segment.ids is not None and (segment.offsets is not None or segment.unit < 1):
        raise KVBenchError(f"a segment has ids or offsets, not both, and a unit of at least 1, not {segment.unit}.")


@kernel
def attend(
    queries: Tensor,
    *segments: Segment,
    scaling: float | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    output: Tensor | None = None,
    lse: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of `queries` [B, H, 1, d] over the tokens of all `segments` together.

    Gives the output [B, H, 1, d'] in `dtype` and the log-sum-exp of the scaled scores [B, H] in float32, written to
    `output` and `lse` where given. Scores are scaled by `scaling` (d^−½), then capped as c·tanh(x / c) by `softcap`.
    A head with no token has output 0 and log-sum-exp −∞. Products of float16 and bfloat16 are summed in float32; where
    types differ all is float32. `splits` overrides into how many parts each head's tokens are cut.
    Raises KVBenchError where shapes, types or strides do not fit.
    """
    if not segments:
        raise KVBenchError("attention needs at least one segment of keys and values.")
    groups = segments[0].groups()
    batch, heads, dim = check_grouped(queries, groups)
    value_dim = segments[0].values.shape[-1]
    for segment in segments:
        if segment.groups() != groups:
            raise KVBenchError(f"segments have {groups} and {segment.groups()} key/value heads.")
        _check(segment, batch, heads, dim, value_dim)
    scaling = dim**-0.5 if scaling is None else scaling
    output = empty_or(output, (batch, heads, 1, value_dim), dtype, queries.device)
    lse = empty_or(lse, (batch, heads), torch.float32, queries.device)
    if compiled(queries):
        _launch(queries, segments, scaling, softcap, output, lse, splits)
    else:
        _twin(queries, segments, scaling, softcap, output, lse)
    return output, lse


def _launch(
    queries: Tensor,
    segments: tuple[Segment, ...],
    scaling: float,
    softcap: float | None,
    output: Tensor,
    lse: Tensor,
    splits: int | None,
) -> None:
    batch, heads, _, dim = queries.shape
    value_dim, groups = output.shape[-1], segments[0].groups()
    plans = [_plan(segment, queries, heads, splits) for segment in segments]
    count = sum(plan.splits for plan, _, _ in plans)
    parts = queries.new_empty((count, batch, heads, 1, value_dim), dtype=torch.float32)
    part_lses = queries.new_empty((count, batch, heads), dtype=torch.float32)
    shape = (
        groups, heads // groups, dim, value_dim, max(16, next_power_of_2(dim)), max(16, next_power_of_2(value_dim)),
        max(16, next_power_of_2(heads // groups)), softcap is not None,
    )  # fmt: skip
    shared = (queries, parts, part_lses, queries.stride(0), queries.stride(1), scaling, softcap or 0.0, batch)
    first = 0
    with device_of(queries):
        if len(plans) == 2:
            (one, warps, stages), (two, _, other_stages) = plans
            two_segments[(one.programs + two.programs,)](
                *shared, one.programs, *one.arguments, *two.arguments, *shape, *one.constants, *two.constants,
                num_warps=warps, num_stages=min(stages, other_stages),
            )  # fmt: skip
        elif len(plans) == 3:
            (one, warps, stages), (two, _, second), (three, _, third) = plans
            three_segments[(one.programs + two.programs + three.programs,)](
                *shared, one.programs, two.programs, *one.arguments, *two.arguments, *three.arguments, *shape,
                *one.constants, *two.constants, *three.constants,
                num_warps=warps, num_stages=min(stages, second, third),
            )  # fmt: skip
        else:
            for plan, warps, stages in plans:
                one_segment[(plan.programs,)](
                    *shared, first, *plan.arguments, *shape, *plan.constants, num_warps=warps, num_stages=stages
                )
                first += plan.splits
        launch_merge(parts, part_lses, output, lse)


def _twin(
    queries: Tensor,
    segments: tuple[Segment, ...],
    scaling: float,
    softcap: float | None,
    output: Tensor,
    lse: Tensor,
) -> None:
    heads = queries.shape[1]
    all_logits, all_values = [], []
    for segment in segments:
        keys, values, valid = _tokens(segment, queries)
        keys, values = decoded(keys, segment.key_range), decoded(values, segment.value_range)
        grouped = queries.float().reshape(queries.shape[0], keys.shape[1], -1, queries.shape[3])
        logits = (grouped @ keys.transpose(-1, -2)).flatten(1, 2) * scaling
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        if segment.bias is not None:
            bias = segment.bias[..., : logits.shape[2]].float()
            logits = logits + bias.repeat_interleave(heads // bias.shape[1], dim=1)
        valid = valid.repeat_interleave(heads // valid.shape[1], dim=1)
        all_logits.append(logits.masked_fill(~valid, -torch.inf))
        all_values.append(values)
    joined = torch.cat(all_logits, dim=-1)
    lse.copy_(joined.logsumexp(-1))
    weights = (joined - torch.where(lse.isfinite(), lse, 0)[..., None]).exp()
    total, first = torch.zeros((), device=queries.device), 0
    for logits, values in zip(all_logits, all_values, strict=True):
        part = weights[..., first : first + logits.shape[2]]
        part = part.reshape(len(values), values.shape[1], heads // values.shape[1], logits.shape[2])
        total = total + (part @ values).flatten(1, 2)
        first += logits.shape[2]
    output.copy_(total[:, :, None])


def _tokens(segment: Segment, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values [B, G or H, n, d] and which of them count, bool [B, G or H, n], on the queries' device."""
    keys, values, ids, device = segment.keys, segment.values, segment.ids, queries.device
    batch, groups = queries.shape[0], segment.groups()
    lengths = None if segment.lengths is None else per_group(segment.lengths, batch, groups, "lengths")
    if segment.offsets is not None:
        assert lengths is not None
        longest = int(lengths.max()) if device.type == "cpu" else keys.shape[0]
        place = torch.arange(longest, device=device)
        valid = place < lengths[..., None]
        rows = (segment.offsets[..., None] + place).masked_fill(~valid, 0).to(keys.device)
        return keys[rows].to(device), values[rows].to(device), valid
    if ids is None:
        count = keys.shape[2]
        if lengths is not None and device.type == "cpu":
            count = min(count, int(lengths.max()))
        place = torch.arange(count, device=device)
        valid = (place < lengths[..., None]) if lengths is not None else place.new_ones((1, 1, 1), dtype=torch.bool)
        return keys[:, :, :count].to(device), values[:, :, :count].to(device), valid.expand(batch, groups, count)
    token = ids[..., None] * segment.unit + torch.arange(segment.unit, device=ids.device)
    token = token.masked_fill(ids[..., None] < 0, -1).flatten(2).long()
    share = ids.shape[1] // groups
    valid = token >= 0
    if lengths is not None:
        valid &= token < lengths.repeat_interleave(share, dim=1)[..., None]
    rows = token.masked_fill(~valid, 0).to(keys.device)
    row = torch.arange(batch, device=keys.device)[:, None, None]
    head = (torch.arange(ids.shape[1], device=keys.device) // share)[:, None]
    return keys[row, head, rows].to(device), values[row, head, rows].to(device), valid


def decode(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`attend` to the first `lengths` of `keys` [B, G, t, d] and `values`; options are those of `attend`."""
    return attend(queries, Segment(keys, values, lengths), **options)


def gather(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    *,
    unit: int = 1,
    lengths: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`attend` to the tokens or blocks `ids` [B, G or H, k], read in place; options are those of `attend`."""
    return attend(queries, Segment(keys, values, lengths, ids, unit, bias=bias), **options)


def ragged(
    queries: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, lengths: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`attend` to heads of unequal length in flat `keys` [n, d]; options are those of `attend`."""
    return attend(queries, Segment(keys, values, lengths, offsets=offsets), **options)
