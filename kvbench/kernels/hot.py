"""Fetches chosen tokens from the host, and keeps those fetched last in a hot set on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.kernels.support import compiled, device_of, jit, kernel, next_power_of_2

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit
def _fetch(
    ids: tl.tensor, slots: tl.tensor, keys: tl.tensor, values: tl.tensor, keys_out: tl.tensor, values_out: tl.tensor,
    places: tl.tensor, kb: int, kg: int, kt: int, vb: int, vg: int, vt: int, k: int, room: int, sets: int, share: int,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TOKENS: tl.constexpr,
    PLACED: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(1).to(tl.int64)
    row, group = program // sets, program % sets // share
    at = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token = tl.load(ids + program * k + at, mask=at < k, other=-1).to(tl.int64)
    there = (token >= 0)[:, None]
    c, cv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask, value_mask = there & (c < D)[None, :], there & (cv < DV)[None, :]
    key = tl.load(keys + row * kb + group * kg + token[:, None] * kt + c[None, :], mask=mask, other=0.0)
    value = tl.load(values + row * vb + group * vg + token[:, None] * vt + cv[None, :], mask=value_mask, other=0.0)
    slot = tl.where(token >= 0, at, -1)
    if PLACED:
        slot = tl.load(slots + program * k + at, mask=at < k, other=-1)
    tl.store(
        places + program * k + at, tl.where(slot < 0, -1, slot + (program % share).to(tl.int32) * room), mask=at < k
    )
    target = (program * room + slot.to(tl.int64))[:, None]
    tl.store(keys_out + target * D + c[None, :], key, mask=mask)
    tl.store(values_out + target * DV + cv[None, :], value, mask=value_mask)


@kernel
def fetch(
    ids: Tensor, keys: Tensor, values: Tensor, keys_out: Tensor, values_out: Tensor, slots: Tensor | None = None
) -> Tensor:
    """Copy the tokens `ids`, contiguous int32 [B, G or H, k], −1 for none, out of `keys` and `values` [B, G, n, d].

    Those may lie in pinned host memory. The outputs are contiguous [B, G or H, room, d]; token j goes to slot j, or
    where `slots`, like the ids, says. Gives the slots, int32 [B, G or H, k], as they count in a group's part of the
    outputs, [B, G, heads · room, d]; −1 where there is none. Raises KVBenchError where shapes do not fit.
    """
    batch, sets, count = ids.shape
    for what, rows, out in (("keys", keys, keys_out), ("values", values, values_out)):
        expected = (batch, sets, keys_out.shape[2], rows.shape[3])
        if tuple(out.shape) != expected or not out.is_contiguous() or sets % rows.shape[1] or rows.stride(3) != 1:
            raise KVBenchError(f"{what} {list(rows.shape)} do not fit into a contiguous {list(out.shape)}.")
    if slots is None and keys_out.shape[2] < count:
        raise KVBenchError(f"{count} tokens are more than the {keys_out.shape[2]} slots for them.")
    share = sets // keys.shape[1]
    if not compiled(keys_out):
        place = ids.clamp_min(0).long().to(keys.device)
        row = torch.arange(batch, device=keys.device)[:, None, None]
        head = torch.arange(sets, device=keys.device)[:, None]
        spot = torch.arange(count, device=ids.device).expand(ids.shape) if slots is None else slots.long()
        there = ids >= 0
        for rows, out in ((keys, keys_out), (values, values_out)):
            found = rows[row, head // share, place].to(out.device)
            flat = torch.where(there, spot, out.shape[2])  # one more slot, which is left out again
            wide = torch.cat([out, out[:, :, :1]], dim=2)
            wide.scatter_(2, flat[..., None].expand(-1, -1, -1, out.shape[3]), found)
            out.copy_(wide[:, :, :-1])
        spot = torch.where(there, spot, -1) if slots is None else slots
        return torch.where(spot < 0, -1, spot + head % share * keys_out.shape[2]).int()
    tokens, dim, wide_dim = 16, keys.shape[3], values.shape[3]
    places = torch.empty_like(ids)
    with device_of(keys_out):
        _fetch[(-(-count // tokens), batch * sets)](
            ids, ids if slots is None else slots, keys, values, keys_out, values_out, places, *keys.stride()[:3],
            *values.stride()[:3], count, keys_out.shape[2], sets, share, dim, wide_dim, next_power_of_2(dim),
            next_power_of_2(wide_dim), tokens, slots is not None, num_warps=2,
        )  # fmt: skip
    return places


@dataclass(frozen=True)
class HotSlots:
    """Which tokens a hot set of C slots holds, for each of S sets (key/value or query heads) of n tokens.

    `slot_of` int32 [B, S, n], −1 for tokens that are not held; `token_in` int32 [B, S, C], −1 for free slots; `used`
    int32 [B, S, C], when a slot was last used; `turn` int32 [B, S, 3]: where the search for a slot goes on, tokens
    found, tokens asked for. All are contiguous.
    """

    slot_of: Tensor
    token_in: Tensor
    used: Tensor
    turn: Tensor

    @classmethod
    def empty(cls, batch: int, sets: int, tokens: int, slots: int, device: torch.device) -> HotSlots:
        """A set that holds nothing."""
        sizes = (tokens, slots, slots, 3)
        slot_of, token_in, used, turn = (
            torch.full((batch, sets, size), -1, dtype=torch.int32, device=device) for size in sizes
        )
        return cls(slot_of, token_in, used, turn.zero_())

    def tensors(self) -> list[Tensor]:
        """All of it."""
        return [self.slot_of, self.token_in, self.used, self.turn]

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return sum(part.nbytes for part in self.tensors())


@jit
def _hold(
    ids: tl.tensor, slot_of: tl.tensor, token_in: tl.tensor, used: tl.tensor, turn: tl.tensor, positions: tl.tensor,
    slots: tl.tensor, missing: tl.tensor, free: tl.tensor, n: int, room: int, k: int, sets: int,
    K: tl.constexpr, ROOM: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    now = tl.load(positions + program // sets)
    slot_of += program * n
    token_in += program * room
    used += program * room
    free += program * room
    turn += program * 3
    j = tl.arange(0, K)
    token = tl.load(ids + program * k + j, mask=j < k, other=-1)
    real = token >= 0
    slot = tl.load(slot_of + token, mask=real, other=-1)
    hit = slot >= 0
    tl.store(used + slot, tl.zeros((K,), tl.int32) + now, mask=hit)
    tl.debug_barrier()
    start = tl.load(turn)
    i = tl.arange(0, ROOM)
    around = (start + i) % room
    idle = (i < room) & (tl.load(used + around, mask=i < room, other=0) != now)
    rank = tl.cumsum(idle.to(tl.int32), 0) - 1
    tl.store(free + rank, around, mask=idle)
    tl.debug_barrier()
    miss = real & (hit == 0)
    number = tl.cumsum(miss.to(tl.int32), 0) - 1
    fresh = tl.load(free + number, mask=miss, other=0)
    old = tl.load(token_in + fresh, mask=miss, other=-1)
    tl.store(slot_of + old, tl.full((K,), -1, tl.int32), mask=miss & (old >= 0))
    tl.debug_barrier()
    tl.store(token_in + fresh, token, mask=miss)
    tl.store(used + fresh, tl.zeros((K,), tl.int32) + now, mask=miss)
    tl.store(slot_of + token, fresh, mask=miss)
    tl.store(slots + program * k + j, tl.where(hit, slot, tl.where(miss, fresh, -1)), mask=j < k)
    tl.store(missing + program * k + j, tl.where(miss, token, -1), mask=j < k)
    count = tl.sum(miss.to(tl.int32), 0)
    last = tl.load(free + tl.maximum(count - 1, 0))
    tl.store(turn, tl.where(count > 0, (last + 1) % room, start))
    tl.store(turn + 1, tl.load(turn + 1) + tl.sum(hit.to(tl.int32), 0))
    tl.store(turn + 2, tl.load(turn + 2) + tl.sum(real.to(tl.int32), 0))


@kernel
def hold_hot(ids: Tensor, hot: HotSlots, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Find slots for the tokens `ids`, contiguous int32 [B, S, k], no more than there are slots, −1 for none.

    Gives the slots, int32 [B, S, k], and the tokens that must be fetched into theirs, −1 where the set has them or
    there is none. They take slots that this step does not use, in turns. `positions`, int32 [B], tell the steps apart.
    Raises KVBenchError where shapes do not fit.
    """
    batch, sets, count = ids.shape
    room = hot.token_in.shape[2]
    if hot.token_in.shape[:2] != (batch, sets) or room < count or not ids.is_contiguous():
        raise KVBenchError(f"{list(ids.shape)} tokens do not fit a hot set of {list(hot.token_in.shape)} slots.")
    if not compiled(ids):
        return _hold_twin(ids, hot, positions)
    slots, missing = torch.empty_like(ids), torch.empty_like(ids)
    free = torch.empty_like(hot.token_in)
    with device_of(ids):
        _hold[(batch * sets,)](
            ids, *hot.tensors(), positions, slots, missing, free, hot.slot_of.shape[2], room, count, sets,
            next_power_of_2(count), next_power_of_2(room), num_warps=8,
        )  # fmt: skip
    return slots, missing


def _hold_twin(ids: Tensor, hot: HotSlots, positions: Tensor) -> tuple[Tensor, Tensor]:
    batch, sets, _ = ids.shape
    room = hot.token_in.shape[2]
    now = positions[:, None, None].expand(batch, sets, 1)
    real = ids >= 0
    slot = torch.where(real, hot.slot_of.gather(-1, ids.clamp_min(0).long()), -1)
    hit = slot >= 0

    def put(target: Tensor, places: Tensor, numbers: Tensor, where: Tensor) -> None:
        wide = torch.nn.functional.pad(target, (0, 1))
        wide.scatter_(
            -1, torch.where(where, places, target.shape[2]).long(), numbers.to(target.dtype).expand(ids.shape)
        )
        target.copy_(wide[..., :-1])

    put(hot.used, slot, now, hit)
    order = (hot.turn[..., :1] + torch.arange(room, device=ids.device)) % room
    idle = hot.used.gather(-1, order.long()) != now
    free = order.gather(-1, (~idle).to(torch.uint8).argsort(dim=-1, stable=True))
    miss = real & ~hit
    number = (miss.cumsum(-1) - 1).clamp_min(0)
    fresh = free.gather(-1, number)
    old = hot.token_in.gather(-1, fresh.long())
    put(hot.slot_of, old, torch.full_like(ids, -1), miss & (old >= 0))
    put(hot.token_in, fresh, ids, miss)
    put(hot.used, fresh, now, miss)
    put(hot.slot_of, ids, fresh, miss)
    missed = miss.sum(-1)
    last = free.gather(-1, (missed[..., None] - 1).clamp_min(0)).squeeze(-1)
    hot.turn[..., 0] = torch.where(missed > 0, (last + 1) % room, hot.turn[..., 0]).int()
    hot.turn[..., 1] += hit.sum(-1).int()
    hot.turn[..., 2] += real.sum(-1).int()
    return torch.where(hit, slot, torch.where(miss, fresh, -1)).int(), torch.where(miss, ids, -1)
