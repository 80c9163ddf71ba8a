"""The static set of one layer's store: the tokens that are attended at every step, in slots.

Attention does not depend on the order of its keys, so tokens lie in any order. Heads may hold different numbers of
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.buffers import PartLogits, RaggedBuffer, StorageFactory, TokenBuffer, gathered
from kvbench.contract.coded import CodedBuffer, RaggedCodes
from kvbench.contract.saved import Saveable


class StaticSet(Saveable):
    """Keys and values of the tokens that are attended at every step, for rows of equal length."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Hold a whole prompt, `keys` and `values` [B, G, n, d]."""
        self.tokens = keys.shape[2]
        self._heads = tuple(keys.shape[:2])
        self._format: StorageFactory | None = None
        self.room = 0
        """Tokens that memory of kept ones has room for beside them, so that adding so many copies nothing."""
        self._static = self._buffer(keys, values)
        self._static_ids = torch.arange(self.tokens, device=keys.device)
        self._ragged: RaggedBuffer | None = None
        self._ragged_kept: Tensor | None = None

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
    def static_buffer(self) -> TokenBuffer:
        """What holds the static tokens of which all heads have equally many."""
        return self._static

    @property
    def ragged_buffer(self) -> RaggedBuffer | None:
        """What holds the static tokens before those of `static_buffer` where heads have different numbers of them."""
        return self._ragged

    @property
    def static_ids(self) -> Tensor:
        """Ids of the static tokens: [t] where all heads share them, else [B, G, t], −1 where padded."""
        if self._ragged is None:
            return self._static_ids
        assert self._ragged_kept is not None
        return torch.cat([self._ragged_kept, self._static_ids.expand(*self._ragged_kept.shape[:2], -1)], dim=-1)

    def static_parts(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """The static set as keys [B, G, t, d], values [B, G, t, d] and a mask [B, G, t] or None."""
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        if self._ragged is not None:
            parts.append(self._ragged.padded())
        if self._static.length or not parts:
            parts.append((*self._static.decoded(), None))
        return parts

    def attended(self, queries: Tensor, scaling: float) -> list[PartLogits]:
        """The static set, in the slots of `static_ids`, as `queries` [B, H, 1, d] meet it; nothing of it is copied."""
        parts: list[PartLogits] = [] if self._ragged is None else [self._ragged.attended(queries, scaling)]
        if self._static.length or not parts:
            parts.append(self._static.attended(queries, scaling))
        return parts

    def raw(self) -> tuple[Tensor, Tensor]:
        """The static set as it is held, two [B, G, t, d], where all heads have the same tokens."""
        return self._static.raw

    def decode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, two [B, H or G, t, d], of tokens as they are held, two [B, G, t, d]: the same here."""
        return keys, values

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

    def hold_static(self, storage: StorageFactory) -> None:
        """Hold the static set, and what is added to it, in a format of the policy's own from now on.

        `storage` makes what holds tokens from their keys and values [B, G, t, d], oldest first; where heads have
        different numbers of tokens each has one of its own, of [1, 1, t, d]. Reading decodes for the step. Tokens that
        leave one by one stay in memory until `kvbench.contract.coded.SPARE` of a head have, and are then encoded anew.
        """
        self._format = storage
        if self._ragged is not None:
            keys, values, mask = self._ragged.padded()
            self._ragged = RaggedCodes(storage, keys, values, mask)
        elif self._static_ids.shape[-1]:
            order = self._static_ids.argsort(dim=-1)
            keys, values = self._picked(order)
            self._static_ids = self._static_ids.gather(-1, order)
            self._static = self._buffer(keys, values)
            return
        self._static = self._buffer(*self._static.decoded())

    def keep_slots(self, marks: Tensor) -> None:
        """Evict all static tokens but those in the slots that `marks`, bool [B, G, t] as in `static_ids`, marks."""
        self._hold(marks & (self.static_ids >= 0))

    def _buffer(self, keys: Tensor, values: Tensor) -> TokenBuffer:
        return TokenBuffer(keys, values) if self._format is None else CodedBuffer(self._format, keys, values)

    def _chosen(self, keys: Tensor, values: Tensor, slots: Tensor) -> TokenBuffer:
        """Copies of the tokens in `slots` [B, G, k] of `keys` and `values` [B, G, t, d], with room for more."""
        if self._format is not None:
            return self._buffer(*(gathered(part, slots) for part in (keys, values)))
        kept_keys, kept_values = (gathered(part, slots, self.room) for part in (keys, values))
        return TokenBuffer(kept_keys, kept_values, length=slots.shape[-1])

    def _kept(self, slots: Tensor) -> TokenBuffer:
        """A copy of the static tokens in the slots."""
        return self._buffer(*self._picked(slots))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add new tokens as they are held, two [B, G, m, d], to the static set; the session calls this."""
        new = torch.arange(self.tokens, self.tokens + keys.shape[2], device=self._static_ids.device)
        self._static.append(keys, values)
        shape = (*self._static_ids.shape[:-1], keys.shape[2])
        self._static_ids = torch.cat([self._static_ids, new.expand(shape)], dim=-1)
        self.tokens += keys.shape[2]

    def release_static(self, spare: int) -> tuple[Tensor, Tensor]:
        """Hand over the static set's memory, keys and values [B, G, c, d] with room for `spare` more, and forget it.

        Only where all heads hold the same tokens are these the whole static set.
        """
        keys, values = self._static.take(spare)
        self._ragged = self._ragged_kept = None
        self._static_ids = self._static_ids[..., :0]
        return keys, values

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
            newest_keys, newest_values = self._static.last()
            self._ragged.replace(slots, inside, newest_keys, newest_values)
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
        keys, values = self.whole_static()
        return tuple(part.gather(2, places.expand(-1, -1, -1, part.shape[-1])) for part in (keys, values))  # type: ignore[return-value]

    def whole_static(self) -> tuple[Tensor, Tensor]:
        """Keys and values, two [B, G, t, d], of the static set as in `static_ids`; anything where that has −1."""
        keys, values, _ = zip(*self.static_parts(), strict=True)
        return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys, dim=2), torch.cat(values, dim=2))

    def _hold(self, marks: Tensor) -> None:
        """Evict all but the static tokens that `marks`, bool [B, G, t] as in `static_ids`, marks."""
        (keys, values), ids, counts = self.whole_static(), self.static_ids.expand(marks.shape), marks.sum(-1)
        most = int(counts.max())
        slots = marks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
        if most == int(counts.min()):
            self._ragged = self._ragged_kept = None
            self._static, self._static_ids = self._chosen(keys, values, slots), ids.gather(-1, slots)
            return
        self._ragged = (
            RaggedBuffer(keys, values, marks)
            if self._format is None
            else RaggedCodes(self._format, keys, values, marks)
        )
        self._ragged_kept = torch.where(self._ragged.mask, ids.gather(-1, slots), -1)
        self._static = self._chosen(keys, values, slots[..., :0])
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
