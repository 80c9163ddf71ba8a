"""Fixed steps of policies that keep sinks and a window and choose from all other tokens, on the device or the host."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.contract.host import host_empty
from kvbench.contract.layer import Layer
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.contract.storage import TokenBuffer
from kvbench.kernels.attention import Segment, attend
from kvbench.kernels.hot import HotSlots, fetch, hold_hot
from kvbench.kernels.insert import insert
from kvbench.kernels.score import scores
from kvbench.kernels.select import IN_REGISTERS, select_top


class SettingAside(Protocol):
    """What a step asks of its policy (`SelectingPolicy`)."""

    offload: ClassVar[bool]
    options: Any

    def period(self, layer: Layer, most: int) -> int:
        """How many tokens leave the window at a time."""


@dataclass(frozen=True)
class Start:
    """Where decoding starts, for each row: int32 [B] on the device, and each head's budget, int32 [B, G]."""

    tokens: Tensor
    """Tokens of the context when a token last left the window, or at the prompt's end."""
    aside: Tensor
    """Tokens set aside."""
    period: Tensor
    """Tokens that leave the window at a time."""
    budget: Tensor


class Window:
    """Which tokens are static and how many may be chosen beside them: the same for all layers of one budget.

    After `update`: `aside` and `static` int32 [B], tokens set aside and static; `left` int32 [B, G or H], tokens that
    each head may choose;
    `slots` int32 [B, 1, s], where the static tokens lie, −1 for none.
    """

    aside: Tensor
    static: Tensor
    left: Tensor
    slots: Tensor

    def __init__(self, clock: Clock, start: Start, sinks: int, longest: int, ring: int | None, share: int) -> None:
        """`longest`: most static tokens; `ring`: slots of the window, None for tokens that lie by their id."""
        self._positions, self._start, self._sinks, self._ring = clock.positions, start, sinks, ring
        self._budget = start.budget.repeat_interleave(share, dim=1) if share > 1 else start.budget
        self._order = torch.arange(longest, dtype=torch.int32, device=clock.positions.device)

    def update(self) -> None:
        """Look at the step's positions; the step's own token is in the window."""
        start, now = self._start, self._positions + 1
        gone = now - start.tokens
        self.aside = start.aside + gone - gone % start.period
        self.static = now - self.aside
        self.left = (self._budget - self.static[:, None]).clamp_min(0)
        places = self._order + self.aside[:, None]
        there = (places < now[:, None]) | (self._order < self._sinks)
        if self._ring is not None:
            places = (places - self._sinks) % self._ring + self._sinks
        places = torch.where(self._order < self._sinks, self._order, places)
        self.slots = torch.where(there, places, -1)[:, None]


class AsideStep(FixedStep):
    """Sinks, a window, and what `choose` takes of the tokens set aside, whose slots count from 0.

    On the device all tokens lie in one store by their ids. With the set-aside ones on the host, sinks and a ring for
    the window stay on the device, and every new token is written to both at once: it is attended to in the ring until
    the window has moved past it, and in the host's store from then on.
    """

    per_head = True
    """Whether every query head chooses for itself, or each key/value head for its group."""

    def __init__(self, policy: SettingAside, parts: Sequence[Part], clock: Clock) -> None:
        layer = parts[0].layer
        store, device = layer.store, clock.positions.device
        self._clock, self.scaling, self.batch = clock, layer.scaling, clock.batch
        self.heads, self.kv_heads = layer.heads, layer.kv_heads
        self.sinks, self.recent = store.aside_start, sum(layer.static) - store.aside_start
        periods = [policy.period(part.layer, _beyond(part.layer) + clock.new_tokens) for part in parts]
        self.start = _start(parts, periods, clock, self.kv_heads)
        offload = store.aside_keys.device.type != device.type or policy.offload
        shape, capacity = (clock.batch, layer.kv_heads), max(part.layer.tokens for part in parts) + clock.new_tokens
        self._ring = self.recent + max(periods) - 1 if offload else None
        held = capacity if self._ring is None else self.sinks + self._ring
        sample = store.static_parts()[0][:2]
        self.keys, self.values = (like.new_zeros(*shape, held, like.shape[3]) for like in sample)
        self.capacity = capacity - self.sinks
        self._host = self._host_memory(parts, sample) if offload else ()
        if offload:
            self.aside_keys, self.aside_values = (part[:, :, : self.capacity] for part in self._host)
        else:
            self.aside_keys, self.aside_values = (part[:, :, self.sinks :] for part in (self.keys, self.values))
        for part in parts:
            self._take(part)
        longest = self.sinks + self.recent + max(periods) - 1
        share = self.heads // self.kv_heads if self.per_head else 1
        key = (
            "window", self.sinks, longest, self._ring, share,
            *(tuple(part.flatten().tolist()) for part in vars(self.start).values()),
        )  # fmt: skip
        self._first = key not in clock.shared
        if self._first:
            clock.shared[key] = Window(clock, self.start, self.sinks, longest, self._ring, share)
        self.window: Window = clock.shared[key]
        room = int(self.start.budget.max()) - self.sinks - self.recent
        self.most = max(min(room, self.capacity), 1)
        self._all = all(part.layer.budget.covers_all for part in parts)
        self._hot = _Fetched(self, clock, getattr(policy.options, "hot", 0)) if offload and not self._all else None

    def _host_memory(self, parts: Sequence[Part], sample: Sequence[Tensor]) -> Sequence[Tensor]:
        """The memory of the tokens on the host: what holds them already, where that is all rows' and has the room."""
        aside = parts[0].layer.store.aside
        if parts[0].rows is None and isinstance(aside, TokenBuffer) and aside.capacity >= self.capacity:
            memory = list(aside.take(0))
            parts[0].layer.store.release_aside()
        else:
            shape = (self.batch, self.kv_heads, self.capacity)
            device = self._clock.positions.device
            memory = [host_empty((*shape, like.shape[3]), like.dtype, device) for like in sample]
        for part in memory:
            part[:, :, int(self.start.aside.min()) :].zero_()
        return memory

    def _take(self, part: Part) -> None:
        """Move a part's tokens where they shall lie, and empty its store."""
        store = part.layer.store
        rows = torch.arange(self.batch) if part.rows is None else part.rows.cpu()
        static, moved = store.static_ids.cpu(), store.aside_stop - store.aside_start
        if store.holds_aside:
            for aside, given in ((self.aside_keys, store.aside_keys), (self.aside_values, store.aside_values)):
                _place(aside, rows, torch.arange(moved), given)
        keys, values, _ = store.static_parts()[0]
        for held, aside, tokens in (
            (self.keys, self.aside_keys, keys),
            (self.values, self.aside_values, values),
        ):
            slots = static
            if self._ring is not None:
                late = static >= self.sinks
                _place(aside, rows, static[late] - self.sinks, tokens[:, :, late.to(tokens.device)])
                slots = torch.where(late, (static - self.sinks) % self._ring + self.sinks, static)
            _place(held, rows, slots, tokens)
        store.release_static(0)
        store.release_aside()

    @abstractmethod
    def choose(self, queries: Tensor) -> Sequence[Segment]:
        """The set-aside tokens to attend to, for `queries` [B, H, 1, d]."""

    def observe(self, keys: Tensor, values: Tensor) -> None:
        """See the step's token before anything is chosen."""

    def _take_in(self, keys: Tensor, values: Tensor) -> Segment:
        """Take the token in; gives the static tokens."""
        if self._first:
            self.window.update()
        if self._ring is None:
            insert(self.keys, self.values, keys, values, self._clock.positions)
        else:
            insert(self.keys, self.values, keys, values, self._clock.positions, sinks=self.sinks, window=self._ring)
            insert(self.aside_keys, self.aside_values, keys, values, self._clock.positions - self.sinks)
        self.observe(keys, values)
        return Segment(self.keys, self.values, ids=self.window.slots.expand(-1, self.kv_heads, -1))

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take the token in, choose, and attend."""
        static = self._take_in(keys, values)
        chosen = [self.everything()] if self._all else self.choose(queries)
        if self._hot is not None:
            chosen = [self._hot(segment) if segment.keys is self.aside_keys else segment for segment in chosen]
        return attend(queries, static, *chosen, scaling=self.scaling, dtype=queries.dtype)[0]

    def everything(self) -> Segment:
        """All tokens set aside."""
        return Segment(self.aside_keys, self.aside_values, self.window.aside)

    def index_bytes(self) -> int:
        """Bytes of what finds the tokens."""
        return 0

    def index_reads(self, share: float) -> dict[str, int]:
        """Fewest bytes that finding the tokens reads, where `share` of the room for set-aside tokens is taken."""
        return {"device": 0, "host": 0}

    def bytes(self) -> dict[str, int]:
        """Keys and values on the device and the host, and the index."""
        offloaded = sum(part.nbytes for part in self._host)
        resident = self.keys.nbytes + self.values.nbytes + (0 if self._hot is None else self._hot.nbytes)
        return {"resident": resident, "offloaded": offloaded, "index": self.index_bytes()}

    def hits(self) -> tuple[int, int]:
        """Tokens found in the hot set, and those looked up in it."""
        return (0, 0) if self._hot is None else self._hot.hits()

    def reads(self, tokens: int) -> dict[str, int]:
        """The static set, the tokens chosen (once for each key/value head), and what finding them reads."""
        token = (self.keys.nbytes + self.values.nbytes) // self.keys.shape[2]
        static = self.sinks + self.recent
        aside = max(tokens - static, 0)
        chosen = int((self.start.budget - static).clamp(0, aside).float().mean() * token)
        tier = "device" if self._ring is None else "host"
        found = {"device": 0, "host": 0} if self._all else self.index_reads(aside / self.capacity)
        found["device"] += static * token
        found[tier] += chosen
        return self._with_hits(found, chosen)

    def _with_hits(self, reads: dict[str, int], chosen: int) -> dict[str, int]:
        """Bytes read, of which the hot set has its share of those of the `chosen` tokens."""
        found, asked = self.hits()
        had = chosen * found // asked if asked else 0
        return {"device": reads["device"] + had, "host": reads["host"] - had}

    def changed(self) -> Sequence[Tensor]:
        """Nothing on the host; the ring loses a token at each step, and the hot set changes."""
        hot = [] if self._hot is None else self._hot.changed()
        return hot if self._ring is None else [self.keys, self.values, *hot]


class _Fetched:
    """Brings the tokens chosen from the host to the device: to memory that all layers share, or to a hot set."""

    def __init__(self, step: AsideStep, clock: Clock, hot: int) -> None:
        sets = step.heads if step.per_head else step.kv_heads
        self._positions = clock.positions
        self._slots: HotSlots | None = None
        if hot and hot < step.most:
            raise KVBenchError(
                f"A hot set of {hot} tokens has no room for the {step.most} tokens that a step chooses: ask for at "
                "least so many with -o hot, or for 0."
            )
        room = hot or step.most
        shape, held = (clock.batch, sets, room), (step.keys, step.values)
        key = "fetched", *shape, *((part.shape[3], part.dtype) for part in held)
        if hot:
            self._slots = HotSlots.empty(clock.batch, sets, step.capacity, room, clock.positions.device)
            self._held = [part.new_zeros(*shape, part.shape[3]) for part in held]
        else:
            if key not in clock.shared:
                clock.shared[key] = [part.new_zeros(*shape, part.shape[3]) for part in held]
            self._held = clock.shared[key]
        # query heads of a group look into one store
        self._store = [part.view(clock.batch, step.kv_heads, -1, part.shape[3]) for part in self._held]

    def __call__(self, segment: Segment) -> Segment:
        ids, slots = segment.ids, None
        assert ids is not None and segment.unit == 1
        if self._slots is not None:
            slots, ids = hold_hot(ids, self._slots, self._positions)
        places = fetch(ids, segment.keys, segment.values, self._held[0], self._held[1], slots)
        return Segment(self._store[0], self._store[1], ids=places, bias=segment.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of a hot set: tokens and their table; memory that layers share does not count."""
        return 0 if self._slots is None else self._slots.nbytes + sum(part.nbytes for part in self._held)

    def hits(self) -> tuple[int, int]:
        """Tokens found in the hot set, and those looked up in it."""
        if self._slots is None:
            return 0, 0
        _, found, asked = self._slots.turn.sum((0, 1)).tolist()
        return found, asked

    def changed(self) -> list[Tensor]:
        """The hot set's table."""
        return [] if self._slots is None else self._slots.tensors()


def best_of(found: Tensor, counts: Tensor, most: int) -> Tensor:
    """`select_top`; of long rows the best `most` first, which torch finds with many programs a row."""
    if found.shape[2] <= IN_REGISTERS:
        return select_top(found, counts, most)
    first = found.topk(most, dim=-1, sorted=False)
    places = select_top(first.values, counts, most)
    ids = first.indices.gather(-1, places.long().clamp_min(0))
    return torch.where(places < 0, -1, ids).int()


class TopStep(AsideStep):
    """Chooses the set-aside tokens of the best scores."""

    @abstractmethod
    def scores(self, queries: Tensor) -> Tensor:
        """Scores, float32 [B, H or G, n], of the n slots for set-aside tokens; −∞ for those that are not in use."""

    def choose(self, queries: Tensor) -> Sequence[Segment]:
        """The best tokens, as many as the budget leaves."""
        best = best_of(self.scores(queries), self.window.left, self.most)
        return [Segment(self.aside_keys, self.aside_values, ids=best)]


def _place(target: Tensor, rows: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """Write `tokens` [b, G, t, d] to `slots` [t] of `rows` [b] of the target [B, G, n, d]."""
    whole = rows.shape[0] == target.shape[0] and bool((rows == torch.arange(rows.shape[0])).all())
    first, count = int(slots[0]) if len(slots) else 0, len(slots)
    if bool((slots == torch.arange(first, first + count)).all()):
        piece = target[:, :, first : first + count]
        if whole:
            piece.copy_(tokens)
        else:
            piece[rows.to(target.device)] = tokens.to(target.device)
        return
    where = rows.to(target.device)[:, None], slice(None), slots.to(target.device)[None]
    target[where] = tokens.to(target.device).transpose(1, 2)


def _beyond(layer: Layer) -> int:
    """Static tokens that have grown out of the window."""
    return layer.store.static_tokens - sum(layer.static)


def _start(parts: Sequence[Part], periods: Sequence[int], clock: Clock, groups: int) -> Start:
    device = clock.positions.device
    tokens, aside, period = (torch.zeros_like(clock.positions) for _ in range(3))
    budget = torch.zeros(clock.batch, groups, dtype=torch.int32, device=device)
    for part, every in zip(parts, periods, strict=True):
        layer, store = part.layer, part.layer.store
        rows = slice(None) if part.rows is None else part.rows.to(device)
        own = layer.budget
        tokens[rows] = layer.tokens - _beyond(layer)
        aside[rows] = store.aside_stop - store.aside_start
        period[rows] = every
        left = (
            2 * (layer.tokens + clock.new_tokens) if own.covers_all else own.tokens if own.heads is None else own.heads
        )
        budget[rows] = torch.as_tensor(left).to(budget)
    return Start(tokens, aside, period, budget)


class ScoreStep(TopStep):
    """Scores every set-aside key exactly, where the keys lie."""

    def scores(self, queries: Tensor) -> Tensor:
        """Inner products with all keys."""
        return scores(queries, self.aside_keys, self.window.aside)

    def index_reads(self, share: float) -> dict[str, int]:
        """All keys; the chosen ones are read again beside their values and counted with them."""
        keys = int(self.aside_keys.nbytes * share)
        return {"device": keys, "host": 0} if self._ring is None else {"device": 0, "host": keys}
