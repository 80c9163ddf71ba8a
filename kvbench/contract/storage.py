"""The key/value store of one layer: a static set, a set-aside set (resident or offloaded), and the bytes of each.

Tokens are named by their position in the context, 0 to `tokens` − 1. Every stored token is either *static* (attended
at every step) or *set aside* (attended when a policy selects it); evicted tokens are gone from memory.
Attention does not depend on the order of its keys, so the static set is kept in slots, in any order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from kvbench.contract.attention import scores, weighted_sum
from kvbench.contract.host import copy_to_host, host_empty, pins
from kvbench.contract.saved import Saveable

HOST = torch.device("cpu")
ROOM = 64
"""Tokens that pinned memory has room for beside those offloaded, or a sixteenth of these where that is more: a decoding
step in fixed shapes adds to it in place."""


def pick(buffer: Tensor, slots: Tensor, heads: int) -> Tensor:
    """Copy the rows `slots` [B, H or G, k] of a contiguous `buffer` [B, G, t, d]; `heads` is H or G."""
    batch, groups, capacity, dim = buffer.shape
    share = torch.arange(heads, device=slots.device) // (heads // groups)
    first = (torch.arange(batch, device=slots.device)[:, None] * groups + share) * capacity
    flat = (slots + first[:, :, None]).reshape(-1)
    return buffer.view(-1, dim).index_select(0, flat).view(batch, heads, -1, dim)


class Storage(Saveable, ABC):
    """How the set-aside tokens of a layer are held: as they are (`TokenBuffer`), or in a format of the policy's own.

    A policy hands a factory, called with the tokens' keys and values [B, G, t, d] where they shall lie, to
    `KVStore.set_aside(..., storage=...)`. Slots count from 0, in the tokens' order. What is held between steps is plain
    tensors; whatever is decoded for a step is dropped after it. The defaults decode everything.
    """

    length: int
    """Tokens held."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all memory held, spare room and quantisation parameters included."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of it that stay on the model's device even where the tokens are offloaded; none by default."""
        return 0

    @property
    @abstractmethod
    def keys(self) -> Tensor:
        """All keys [B, G, t, d], decoded."""

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """All values [B, G, t, d], decoded."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens, `keys` and `values` [B, G, m, d], at the end."""

    def decoded(self) -> tuple[Tensor, Tensor]:
        """All keys and all values, two [B, G, t, d]."""
        return self.keys, self.values

    def pick(self, slots: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values, two [B, H or G, k, d], of the tokens in `slots` [B, H or G, k]; `heads` is H or G."""
        return TokenBuffer(*self.decoded()).pick(slots, heads)

    def scores(self, queries: Tensor, scaling: float) -> Tensor:
        """Scaled inner products, float32 [B, H, t], of `queries` [B, H, 1, d] with all keys; −inf masks a token."""
        keys = self.keys
        return scores(queries.to(keys.device), keys, scaling)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum, float32 [B, H, 1, d], of all values with `weights` [B, H, t]."""
        return weighted_sum(weights, self.values)


StorageFactory = Callable[[Tensor, Tensor], Storage]

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Makes keys and values [B, H, t, d] of what is held of tokens, two [B, G, t, r], such as their latents."""


class TokenBuffer(Storage):
    """Keys and values of a growing number of tokens, [B, G, t, d], in memory that grows by a sixteenth at a time."""

    def __init__(self, keys: Tensor, values: Tensor, room: int = 64, length: int | None = None) -> None:
        """Take over `keys` and `values` [B, G, t, d] without a copy where they are contiguous.

        Memory that has to grow gets room for at least `room` more tokens. Only the first `length` tokens are in use.
        """
        self._room = room
        self._keys = keys.contiguous()
        self._values = values.contiguous()
        self.length = keys.shape[2] if length is None else length

    def saved(self) -> dict[str, Any]:
        """All attributes; room that no token uses is emptied first."""
        for held in (self._keys, self._values):
            held[:, :, self.length :] = 0
        return super().saved()

    @property
    def capacity(self) -> int:
        """Tokens that there is memory for."""
        return self._keys.shape[2]

    @property
    def keys(self) -> Tensor:
        """The keys [B, G, t, d], a view."""
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """The values [B, G, t, d], a view."""
        return self._values[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory held, spare room included."""
        held = (self._keys, self._values)
        # pinned tensors share their memory with others
        return sum(part.nbytes if part.is_pinned() else part.untyped_storage().nbytes() for part in held)

    @property
    def raw(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they are held, views."""
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens at the end."""
        start, stop = self.length, self.length + keys.shape[2]
        if stop > self._keys.shape[2]:
            capacity = stop + max(self._room, stop // 16)
            self._keys = self._grown(self._keys, capacity)
            self._values = self._grown(self._values, capacity)
        self._keys[:, :, start:stop] = keys
        self._values[:, :, start:stop] = values
        self.length = stop

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        shape = (*old.shape[:2], capacity, old.shape[3])
        new = host_empty(shape, old.dtype, torch.device("cuda")) if old.is_pinned() else old.new_empty(shape)
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def take(self, spare: int) -> tuple[Tensor, Tensor]:
        """Hand over the memory, keys and values [B, G, c, d] with room for `spare` tokens more, and hold nothing."""
        if self._keys.shape[2] < self.length + spare:
            self._keys = self._grown(self._keys, self.length + spare)
            self._values = self._grown(self._values, self.length + spare)
        keys, values = self._keys, self._values
        self._keys, self._values, self.length = keys[:, :, :0].clone(), values[:, :, :0].clone(), 0
        return keys, values

    def pick(self, slots: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Copy the tokens in `slots` [B, H or G, k] (for `heads` H or G heads) as two tensors [B, H or G, k, d]."""
        return pick(self._keys, slots, heads), pick(self._values, slots, heads)

    def fill_from_end(self, slots: Tensor) -> None:
        """Overwrite, for each row and head, the token in `slots` [B, G] by the last one, and forget the last slot."""
        last = self.length - 1
        for buffer in (self._keys, self._values):
            places = slots[:, :, None, None].expand(*slots.shape, 1, buffer.shape[3])
            buffer.scatter_(2, places, buffer[:, :, last : last + 1].clone())
        self.length = last

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Move the tokens in slots `sources` [c] to `targets` [c] and forget all slots from `length` on."""
        for buffer in (self._keys, self._values):
            buffer[:, :, targets] = buffer[:, :, sources]
        self.length = length


class RaggedBuffer(Saveable):
    """Keys and values of a fixed set of tokens that has a different size for each row and head, without padding."""

    def __init__(self, keys: Tensor, values: Tensor, kept: Tensor) -> None:
        """Copy the tokens that `kept`, bool [B, G, n], marks out of `keys` and `values` [B, G, n, d]."""
        self.keys, self.values = keys[kept], values[kept]
        self.lengths = kept.sum(-1)
        rank = torch.arange(int(self.lengths.max()), device=kept.device)
        first = (self.lengths.reshape(-1).cumsum(0) - self.lengths.reshape(-1)).view(self.lengths.shape)
        self.mask = rank < self.lengths[..., None]
        self._slots = torch.where(self.mask, first[..., None] + rank, 0)

    def replace(self, slots: Tensor, where: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put `keys` and `values` [B, G, d] into `slots` [B, G] of the rows and heads that `where` [B, G] marks."""
        places = self._slots.gather(-1, slots.clamp(max=self._slots.shape[-1] - 1)[..., None]).squeeze(-1)[where]
        self.keys[places], self.values[places] = keys[where], values[where]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and the slot table."""
        return sum(t.untyped_storage().nbytes() for t in (self.keys, self.values, self.mask, self._slots))

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, G, t, d] padded to the longest head for one step, and their mask [B, G, t]."""
        return self.keys[self._slots], self.values[self._slots], self.mask


class KVStore(Saveable):
    """Keys and values of one layer for rows of equal length."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Hold a whole prompt, `keys` and `values` [B, G, n, d], as the static set."""
        self.tokens = keys.shape[2]
        self._heads = tuple(keys.shape[:2])
        self._static = self._buffer(keys, values)
        self._static_ids = torch.arange(self.tokens, device=keys.device)
        self._ragged: RaggedBuffer | None = None
        self._ragged_kept: Tensor | None = None
        self._aside: Storage | None = None
        self.aside_start = self.aside_stop = 0
        self._offloaded = False
        self._device = keys.device
        self.index_bytes = 0
        self.storage: StorageFactory = TokenBuffer
        """What makes the storage of tokens that are set aside without one."""

    def saved(self) -> dict[str, Any]:
        """All but the factory, which is a policy's to set again (`KVCachePolicy.load_state`)."""
        return {name: part for name, part in super().saved().items() if name != "storage"}

    @classmethod
    def restored(cls, parts: dict[str, Any]) -> Self:
        """The store as it was."""
        made = super().restored(parts)
        made.storage = TokenBuffer
        return made

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the static set lies: the device of the model's layer."""
        return self._static_ids.device

    @property
    def static_tokens(self) -> int:
        """Tokens in the static set, per head (the mean over heads, rounded down, where they differ)."""
        if self._ragged is None:
            return self._static.length
        return self._static.length + int(self._ragged.lengths.float().mean())

    @property
    def ragged(self) -> bool:
        """Whether heads hold different numbers of static tokens."""
        return self._ragged is not None

    @property
    def static_ids(self) -> Tensor:
        """Ids of the static tokens: [t] where all heads share them, else [B, G, t], −1 where padded."""
        if self._ragged is None:
            return self._static_ids
        assert self._ragged_kept is not None
        return torch.cat([self._ragged_kept, self._static_ids.expand(*self._ragged_kept.shape[:2], -1)], dim=-1)

    @property
    def holds_aside(self) -> bool:
        """Whether the set-aside tokens are here: some were, and no other structure has taken them over."""
        return self._aside is not None

    @property
    def aside(self) -> Storage:
        """The set-aside tokens `aside_start` to `aside_stop` − 1, in order, where they lie."""
        assert self._aside is not None, "no tokens are set aside"
        return self._aside

    @property
    def aside_keys(self) -> Tensor:
        """Keys [B, G, m, d] of the set-aside tokens, in order, where they lie."""
        return self.aside.keys

    @property
    def aside_values(self) -> Tensor:
        """Values [B, G, m, d] of the set-aside tokens, in order, where they lie."""
        return self.aside.values

    def static_parts(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """The static set as keys [B, G, t, d], values [B, G, t, d] and a mask [B, G, t] or None."""
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        if self._ragged is not None:
            parts.append(self._ragged.padded())
        if self._static.length or not parts:
            parts.append((*self._static.decoded(), None))
        return parts

    def raw(self) -> tuple[Tensor, Tensor]:
        """The static set as it is held, two [B, G, t, d], where all heads have the same tokens."""
        return self._static.raw

    def decode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, two [B, H or G, t, d], of tokens as they are held, two [B, G, t, d]: the same here."""
        return keys, values

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Copy the set-aside tokens `ids` [B, H or G, k] (−1 gives any token) as keys and values [B, H or G, k, d].

        The copies lie where the tokens lie: on the host where they are offloaded, unless the storage brings them back.
        """
        assert self._aside is not None, "a policy selected tokens, but set none aside"
        slots = (ids.to(self._device) - self.aside_start).clamp_min(0)
        return self._aside.pick(slots, ids.shape[1])

    @property
    def resident_bytes(self) -> int:
        """Bytes on the model's device."""
        ragged = self._ragged.nbytes if self._ragged is not None else 0
        aside = 0 if self._aside is None else self._aside.nbytes - self.offloaded_bytes
        return self._static.nbytes + ragged + aside

    @property
    def offloaded_bytes(self) -> int:
        """Bytes in the host's memory, the set-aside tier of policies that offload."""
        return self._aside.nbytes - self._aside.resident_bytes if self._aside is not None and self._offloaded else 0

    # -- what policies do --------------------------------------------------------------------------------------------

    def keep(self, kept: Tensor) -> None:
        """Evict all static tokens but the `kept`, and free their memory; the set-aside ones stay.

        `kept` is int64 [t] or [B, G, t], ids of static tokens to keep per head, or bool [B, G, n] over all n = `tokens`
        ids where heads keep different numbers; marks of tokens that are not static say nothing. ValueError for ids that
        are not static or come twice, and for marks of another shape.
        """
        kept = kept.to(self._static_ids.device)
        if kept.dtype == torch.bool:
            heads, ids = self._heads, self.static_ids
            if kept.shape != (*heads, self.tokens):
                raise ValueError(f"marks of shape {list(kept.shape)}: expected {[*heads, self.tokens]}")
            ids = ids.expand(*heads, -1)
            self._hold(kept.gather(-1, ids.clamp_min(0)) & (ids >= 0))
            return
        self._static, self._static_ids = self._kept(self._slots(kept)), kept.clone()
        self._ragged = self._ragged_kept = None

    def _buffer(self, keys: Tensor, values: Tensor) -> TokenBuffer:
        return TokenBuffer(keys, values)

    def _kept(self, slots: Tensor) -> TokenBuffer:
        """A copy of the static tokens in the slots."""
        return TokenBuffer(*self._picked(slots))

    def set_aside(self, start: int, stop: int, *, offload: bool, storage: StorageFactory | None = None) -> None:
        """Move the prompt's tokens `start` to `stop` − 1 out of the static set, to the host where `offload`.

        `storage` (by default the store's own) makes what holds them from then on, from copies of their keys and values
        [B, G, t, d] on the device where they shall lie. Called once, in `prefill` or `after_prompt`; later tokens
        follow with `advance`.
        ValueError where tokens were set aside before, or where one of these is not static in every head.
        """
        if self._aside is not None:
            raise ValueError(f"tokens {self.aside_start} to {self.aside_stop - 1} were set aside before")
        if storage is not None and self.storage is not TokenBuffer:
            raise ValueError("the policy holds tokens in a format of its own, so another policy cannot hold them")
        if storage is None and self.storage is not TokenBuffer:
            storage = self.storage
        if not 0 <= start <= stop <= self.tokens:
            raise ValueError(f"tokens {start} to {stop - 1} cannot be set aside: there are {self.tokens} tokens")
        ids = self._static_ids
        device = HOST if offload else ids.device
        if self._ragged is None and ids.shape == (self.tokens,) and bool((ids.diff() > 0).all()):
            keys, values = self._static.raw
            parts = keys[:, :, start:stop], values[:, :, start:stop]
            moved = parts if storage is None else self.decode(*parts)
            pinned = offload and pins(ids.device)
            room = max(ROOM, (stop - start) // 16) if pinned and storage is None and type(self) is KVStore else 0
            aside_keys, aside_values = (
                copy_to_host(part, room) if pinned else part.to(device, copy=True) for part in moved
            )
            rest = torch.cat([ids[:start], ids[stop:]])
            self._static, self._static_ids = self._buffer(keys[:, :, rest], values[:, :, rest]), rest
            if pinned:
                torch.cuda.current_stream(ids.device).synchronize()
            if room:
                self._aside = TokenBuffer(aside_keys, aside_values, length=stop - start)
            else:
                self._aside = (storage or self._buffer)(aside_keys, aside_values)
        else:
            slots = self._slots(torch.arange(start, stop, device=ids.device))
            aside_keys, aside_values = (part.to(device) for part in self._picked(slots))
            self._drop(slots)
            self._aside = (storage or TokenBuffer)(aside_keys, aside_values)
        self._device, self._offloaded = device, offload
        self.aside_start, self.aside_stop = start, stop

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add new tokens as they are held, two [B, G, m, d], to the static set; the session calls this."""
        new = torch.arange(self.tokens, self.tokens + keys.shape[2], device=self._static_ids.device)
        self._static.append(keys, values)
        shape = (*self._static_ids.shape[:-1], keys.shape[2])
        self._static_ids = torch.cat([self._static_ids, new.expand(shape)], dim=-1)
        self.tokens += keys.shape[2]

    def advance(self, count: int) -> tuple[Tensor, Tensor]:
        """Move the `count` oldest tokens of the window from the static to the set-aside set.

        Returns their keys and values [B, G, count, d].
        """
        if self._aside is None:
            raise ValueError("no tokens are set aside")
        slots = self._slots_of(self.aside_stop, count)
        keys, values = self._picked(slots)
        if slots.dim() == 1 and isinstance(self._aside, type(self._static)):
            held_keys, held_values = self._static.raw
            self._aside.append(held_keys[:, :, slots], held_values[:, :, slots])
        else:
            self._aside.append(keys, values)
        self.aside_stop += count
        self._drop(slots)
        return keys, values

    def release_static(self, spare: int) -> tuple[Tensor, Tensor]:
        """Hand over the static set's memory, keys and values [B, G, c, d] with room for `spare` more, and forget it.

        Only where all heads hold the same tokens are these the whole static set.
        """
        keys, values = self._static.take(spare)
        self._ragged = self._ragged_kept = None
        self._static_ids = self._static_ids[..., :0]
        return keys, values

    def release_aside(self) -> None:
        """Forget the set-aside tokens, which another structure has taken over."""
        self._aside = None

    def evict(self, start: int, count: int) -> None:
        """Evict the static tokens `start` to `start + count − 1`; ValueError where a head does not hold one."""
        self._drop(self._slots_of(start, count))

    def evict_slots(self, slots: Tensor) -> None:
        """Evict a static token of each row and head, the one in `slots` [B, G]; the last slot's token takes its place.

        Slots count as in `static_ids`, in `static_parts` and in the weights that `attend` gives on request; slots that
        `static_ids` marks with −1 hold nothing to evict.
        """
        if not self._static.length:
            self._drop(slots[..., None])
            return
        last, fixed = self._static.length - 1, 0
        self._static_ids = self._static_ids.expand(*slots.shape, -1).contiguous()
        newest = self._static_ids[..., last:]
        if self._ragged is not None:
            assert self._ragged_kept is not None
            fixed = self._ragged_kept.shape[-1]
            inside = slots < fixed
            self._ragged.replace(slots, inside, self._static.keys[:, :, last], self._static.values[:, :, last])
            held = self._ragged_kept.gather(-1, slots.clamp(max=fixed - 1)[..., None])
            self._ragged_kept.scatter_(
                -1, slots.clamp(max=fixed - 1)[..., None], torch.where(inside[..., None], newest, held)
            )
            slots = torch.where(inside, last + fixed, slots)
        self._static.fill_from_end(slots - fixed)
        self._static_ids = self._static_ids.scatter(-1, (slots - fixed)[..., None], newest)[..., :last]

    # Slots [t] count within `_static`, where all heads hold the same tokens; slots [B, G, t] as in `static_ids`.

    def _slots_of(self, start: int, count: int) -> Tensor:
        """Slots of the tokens `start` to `start + count` − 1, in their order; quick where they are in `_static`."""
        ids = self._static_ids
        if ids.dim() == 1:
            slots = ((ids >= start) & (ids < start + count)).nonzero().squeeze(-1)
            if slots.shape[0] == count:
                return slots[ids[slots].argsort()]
        return self._slots(torch.arange(start, start + count, device=ids.device))

    def _slots(self, wanted: Tensor) -> Tensor:
        """Slots of the static tokens `wanted` [t] or [B, G, t]; ValueError where one is not static, or comes twice."""
        ids, heads = self.static_ids, self._heads
        if ids.dim() != 1 or wanted.dim() != 1:
            ids, wanted = ids.expand(*heads, -1), wanted.expand(*heads, -1)
        slot = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
        table = torch.full((*ids.shape[:-1], self.tokens + 1), -1, device=ids.device)
        table.scatter_(-1, torch.where(ids < 0, self.tokens, ids), slot)[..., self.tokens] = -1
        inside = (wanted >= 0) & (wanted < self.tokens)
        slots = table.gather(-1, torch.where(inside, wanted, self.tokens))
        if bool((slots < 0).any()):
            raise ValueError(f"token {int(wanted[slots < 0][0])} is not static in every head, or was never there")
        ordered = slots.sort(dim=-1).values
        if bool((ordered.diff(dim=-1) == 0).any()):
            raise ValueError("a token comes twice in the same head")
        return slots

    def _picked(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values [B, G, t, d] in the slots."""
        if slots.dim() == 1:
            keys, values = self._static.raw
            return self.decode(keys[:, :, slots], values[:, :, slots])
        places = slots[..., None]
        keys, values = self._whole()
        return tuple(part.gather(2, places.expand(-1, -1, -1, part.shape[-1])) for part in (keys, values))  # type: ignore[return-value]

    def _whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, t, d] as in `static_ids`; anything where that has −1."""
        keys, values, _ = zip(*self.static_parts(), strict=True)
        return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys, dim=2), torch.cat(values, dim=2))

    def _hold(self, marks: Tensor) -> None:
        """Evict all but the static tokens that `marks`, bool [B, G, t] as in `static_ids`, marks."""
        (keys, values), ids, counts = self._whole(), self.static_ids.expand(marks.shape), marks.sum(-1)
        most = int(counts.max())
        slots = marks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
        if most == int(counts.min()):
            keys, values = (
                part.gather(2, slots[..., None].expand(*slots.shape, part.shape[-1])) for part in (keys, values)
            )
            self._ragged = self._ragged_kept = None
            self._static, self._static_ids = TokenBuffer(keys, values), ids.gather(-1, slots)
            return
        self._ragged = RaggedBuffer(keys, values, marks)
        self._ragged_kept = torch.where(self._ragged.mask, ids.gather(-1, slots), -1)
        self._static = TokenBuffer(keys[:, :, :0].clone(), values[:, :, :0].clone())
        self._static_ids = torch.arange(0, device=marks.device)

    def _drop(self, slots: Tensor) -> None:
        if slots.dim() > 1:
            held = self.static_ids.expand(*slots.shape[:2], -1) >= 0
            self._hold(held.scatter(-1, slots, False))
            return
        stop = self._static.length - slots.shape[0]
        tail = torch.arange(stop, self._static.length, device=slots.device)
        movers = tail[~torch.isin(tail, slots)]
        gaps = slots[slots < stop].sort().values
        self._static.move(movers, gaps, stop)
        ids = self._static_ids.clone()
        ids[gaps] = ids[movers]
        self._static_ids = ids[:stop]
