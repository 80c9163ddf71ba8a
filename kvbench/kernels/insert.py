"""Writes new keys and values into a store of fixed capacity, at positions held on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import check_rows, compiled, device_of, jit, kernel, next_power_of_2, per_group

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _insert(
    key_store: tl.tensor, value_store: tl.tensor, keys: tl.tensor, values: tl.tensor, positions: tl.tensor,
    ksb: int, ksg: int, kst: int, vsb: int, vsg: int, vst: int, kb: int, kg: int, kt: int, vb: int, vg: int, vt: int,
    pb: int, pg: int, groups: int, capacity: int, sinks: int, window: int,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, RING: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    i = tl.program_id(1)
    position = tl.load(positions + row * pb + group * pg) + i
    slot = position
    if RING:
        slot = tl.where(position < sinks, position, sinks + (position - sinks) % window)
    fits = (position >= 0) & (slot < capacity)
    row = row.to(tl.int64)
    c = tl.arange(0, BLOCK)
    key = tl.load(keys + row * kb + group * kg + i * kt + c, mask=c < D, other=0.0)
    value = tl.load(values + row * vb + group * vg + i * vt + c, mask=c < DV, other=0.0)
    place = slot.to(tl.int64)
    key_store += row * ksb + group * ksg + place * kst
    value_store += row * vsb + group * vsg + place * vst
    tl.store(key_store + c, key.to(key_store.dtype.element_ty), mask=c < tl.where(fits, D, 0))
    tl.store(value_store + c, value.to(value_store.dtype.element_ty), mask=c < tl.where(fits, DV, 0))


@kernel
def insert(
    key_store: Tensor,
    value_store: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    sinks: int = 0,
    window: int | None = None,
) -> None:
    """Write `keys` and `values` [B, G, m, d] to the stores [B, G, capacity, d], any strides but a contiguous last.

    Token i of the m goes to slot p = `positions` + i, int32 [B] or [B, G]; with a `window`, a ring behind the first
    `sinks` slots, to slot p where p < sinks and to sinks + (p − sinks) mod window otherwise (m at most the window).
    Stores that are expanded over rows and heads (strides of 0) are one flat store. Tokens at negative positions, and at
    slots beyond the capacity, are not written. Raises KVBenchError where shapes, strides or the ring do not fit.
    """
    batch, groups, new = keys.shape[:3]
    check_rows("new keys", keys, batch, groups)
    check_rows("new values", values, batch, groups)
    check_rows("the store of keys", key_store, batch, groups, keys.shape[3])
    check_rows("the store of values", value_store, batch, groups, values.shape[3])
    capacity = key_store.shape[2]
    if value_store.shape[2] != capacity or values.shape[2] != new:
        raise KVBenchError(
            f"{new} keys and {values.shape[2]} values for stores of {capacity} and {value_store.shape[2]} tokens: "
            "as many values as keys are expected, and stores of one size."
        )
    if window is not None and (window < max(new, 1) or sinks < 0 or sinks + window > capacity):
        raise KVBenchError(f"{new} tokens, {sinks} sinks and a window of {window} do not fit a store of {capacity}.")
    positions = per_group(positions, batch, groups, "positions")
    if compiled(keys):
        dim, value_dim = keys.shape[3], values.shape[3]
        with device_of(keys):
            _insert[(batch * groups, new)](
                key_store, value_store, keys, values, positions, *key_store.stride()[:3], *value_store.stride()[:3],
                *keys.stride()[:3], *values.stride()[:3], *positions.stride(), groups, capacity, sinks, window or 1,
                dim, value_dim, next_power_of_2(max(dim, value_dim)), window is not None, num_warps=1,
            )  # fmt: skip
        return
    places = positions[..., None].long() + torch.arange(new, device=positions.device)
    slots = places if window is None else torch.where(places < sinks, places, sinks + (places - sinks) % window)
    fits = ((places >= 0) & (slots < capacity)).to(key_store.device)[..., None]
    at = slots.clamp(0, capacity - 1).to(key_store.device)
    row = torch.arange(batch, device=at.device)[:, None, None]
    group = torch.arange(groups, device=at.device)[:, None]
    # one token after the other: a token that is left out must not undo the write of its neighbour's slot
    for i in range(new):
        place = row, group, at[..., i : i + 1]
        for store, rows in ((key_store, keys), (value_store, values)):
            added = rows[:, :, i : i + 1].to(store.device, store.dtype)
            if max(store.stride(0) * (batch - 1), store.stride(1) * (groups - 1)) == 0 and batch * groups > 1:
                written = fits[:, :, i, 0]
                store[0, 0][at[..., i][written]] = added[:, :, 0][written]
            else:
                store[place] = torch.where(fits[:, :, i : i + 1], added, store[place])
