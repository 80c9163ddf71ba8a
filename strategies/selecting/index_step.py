"""Steps of fixed shapes whose choice is a search in the host's memory, between two CUDA graphs of a layer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbench.contract.host import host_empty, seconds_of
from kvbench.contract.layer import Layer
from kvbench.contract.step import Clock, Part, SplitStep
from kvbench.indexes.base import Index
from kvbench.indexes.storage import as_bits, from_bits, rows_in_place
from kvbench.indexes.threads import assemble, dismiss, on_threads
from kvbench.indexes.weighing import score_rows, weigh_rows
from kvbench.kernels.attention import Segment, attend
from kvbench.kernels.insert import insert
from kvbench.kernels.merge import merge
from kvbench.kernels.weigh import weigh
from kvbench.strategies.selecting.aside import AsideStep, SettingAside

Where = Literal["auto", "host", "device"]
"""Where the found tokens are attended to: by a compiled loop on the host, or by the GPU, which reads them in place."""


class Searching(SettingAside, Protocol):
    """What a step asks of its policy."""

    def until(self, layer: Layer, most: int) -> int:
        """Tokens beyond the window when some leave it the next time."""


@dataclass(frozen=True)
class Turns:
    """When the tokens of a part leave the window: host numbers, which every step of the part's layers agrees on."""

    tokens: int
    aside: int
    beyond: int
    until: int
    period: int

    def at(self, taken: int) -> tuple[int, int]:
        """Tokens of the context and tokens set aside at the `taken`-th step, its own token included."""
        first = self.until - self.beyond
        gone = 0 if taken < first else self.until + (taken - first) // self.period * self.period
        return self.tokens + taken, self.aside + gone


class Numbers:
    """What changes from step to step, written by the host and copied to the device before the step.

    `slots` int32 [B, 1, s]: where the static tokens lie, −1 for none; `ring` and `host` int32 [B]: the new token's
    position, and its place in the host's store.
    """

    def __init__(
        self, turns: Sequence[Turns], rows: Sequence[slice], batch: int, sinks: int, longest: int, ring: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._turns, self._rows, self._sinks, self._ring = turns, rows, sinks, ring
        self._pinned = host_empty((batch, longest + 2), torch.int32, device)
        self._there = self._pinned.numpy()
        self._device = torch.zeros(batch, longest + 2, dtype=torch.int32, device=device)
        self.ring, self.host = self._device[:, 0], self._device[:, 1]
        self.slots = self._device[:, None, 2:]
        self._order = np.arange(longest, dtype=np.int32)

    def look(self, taken: int) -> None:
        """Write the numbers of the `taken`-th step."""
        for rows, turns in zip(self._rows, self._turns, strict=True):
            now, aside = turns.at(taken)
            own = self._there[rows]
            own[:, 0], own[:, 1] = now - 1, now - 1 - self._sinks
            places = np.where(self._order < self._sinks, self._order, self._order + aside)
            slots = np.where(places < self._sinks, places, (places - self._sinks) % self._ring + self._sinks)
            own[:, 2:] = np.where((places < now) & (slots >= 0), slots, -1)
        self._device.copy_(self._pinned, non_blocking=True)


class IndexStep(AsideStep, SplitStep):
    """Sinks and a window on the device, and what an index finds of the tokens on the host."""

    def __init__(self, policy: Searching, parts: Sequence[Part], clock: Clock, where: Where) -> None:
        order = [row for part in parts for row in (range(clock.batch) if part.rows is None else part.rows.tolist())]
        device = clock.positions.device
        mixed = order != sorted(order)
        # the step works in the order of its parts, whose rows lie side by side for their index
        self._order = torch.tensor(order, device=device) if mixed else None
        self._back = self._order.argsort() if self._order is not None else None
        indexes: list[Index] = [part.layer.state["index"] for part in parts]
        layers = [part.layer for part in parts]
        self._turns = [_turns(policy, layer, clock.new_tokens) for layer in layers]
        stops = np.cumsum([layer.rows for layer in layers]).tolist()
        self._rows = [slice(stop - layer.rows, stop) for stop, layer in zip(stops, layers, strict=True)]
        placed = [
            Part(layer, None if part.rows is None else torch.arange(rows.start, rows.stop))
            for part, layer, rows in zip(parts, layers, self._rows, strict=True)
        ]
        super().__init__(policy, placed, clock)
        assert self._ring is not None, "an index searches the host's memory"
        # on a CPU torch's own threads need the cores
        self._leads = device.type == "cuda" and clock.shared.setdefault("crew", self) is self
        if self._leads:
            assemble()
        self._parts = [
            _Searched(index, layer, rows, self.aside_keys, self.aside_values)
            for index, layer, rows in zip(indexes, layers, self._rows, strict=True)
        ]
        self.ended()
        longest = self.sinks + self._ring
        key = ("numbers", self.sinks, self._ring, tuple(self._turns), tuple(order))
        self._first = key not in clock.shared
        if self._first:
            clock.shared[key] = Numbers(self._turns, self._rows, self.batch, self.sinks, longest, self._ring, device)
        self._numbers: Numbers = clock.shared[key]
        self._taken, self._last = 1, clock.new_tokens
        shape, dim = (self.batch, self.heads), self.values.shape[3]
        most = max(min(int(self.start.budget.max()) - self.sinks - self.recent, self.capacity), 1)
        self.on_host = where != "device"  # docs/gpu.md has the measurement
        self._sent = host_empty((*shape, 1, self.keys.shape[3]), torch.float32, device)
        self._asked = self._sent.numpy()[:, :, 0]
        if self.on_host:
            self._found = (
                host_empty((*shape, 1, dim), torch.float32, device), host_empty(shape, torch.float32, device),
            )  # fmt: skip
        else:
            self._found = (
                host_empty((*shape, most), torch.float32, device), host_empty((*shape, most), torch.int32, device),
            )  # fmt: skip
        self._answers = tuple(part.numpy() for part in self._found)
        self._outputs = torch.zeros(2, *shape, 1, dim, device=device)
        self._lses = torch.zeros(2, *shape, device=device)
        self._spent: dict[str, float] = defaultdict(float)
        self._queries: Tensor

    def between(self, taken: int) -> None:
        """Write the step's numbers."""
        self._taken = taken
        if self._first:
            self._numbers.look(taken)
        if self._leads:
            assemble()

    def ended(self) -> None:
        """Let the searching threads sleep."""
        if self._leads:
            dismiss()

    def before(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Take the token in, in the ring and in the host's store, and send the queries."""
        if self._order is not None:
            queries, keys, values = (x.index_select(0, self._order) for x in (queries, keys, values))
        self._queries, numbers = queries, self._numbers
        insert(self.keys, self.values, keys, values, numbers.ring, sinks=self.sinks, window=self._ring)
        insert(self.aside_keys, self.aside_values, keys, values, numbers.host)
        self._sent.copy_(queries, non_blocking=True)

    def beside(self) -> None:
        """Attend to sinks and window."""
        static = Segment(self.keys, self.values, ids=self._numbers.slots.expand(-1, self.kv_heads, -1))
        attend(self._queries, static, scaling=self.scaling, output=self._outputs[0], lse=self._lses[0])

    def search(self) -> None:
        """Search every part's index, and attend to what is found where that is the host's work."""
        for part, turns, rows in zip(self._parts, self._turns, self._rows, strict=True):
            answers = tuple(answer[rows] for answer in self._answers)
            part.search(self._asked[rows], *turns.at(self._taken), answers, self.on_host, self.scaling, self._spent)

    def ahead(self) -> None:
        """Insert what leaves the window at the next step, if there is one; its keys are in the host's store."""
        if self._taken < self._last:
            for part, turns in zip(self._parts, self._turns, strict=True):
                part.insert(turns.at(self._taken + 1)[1], turns.at(self._taken)[0] - self.sinks, self._spent)

    def after(self) -> Tensor:
        """Merge the static set's attention with that over the found tokens."""
        fetched = self._fetch()
        if not self.on_host:
            self._weigh(*fetched)
        output = merge(self._outputs, self._lses, dtype=self._queries.dtype)[0]
        return output if self._back is None else output.index_select(0, self._back)

    def spent(self) -> dict[str, float]:
        """Seconds of the searches, of the attention on the host, and of insertions."""
        found = dict(self._spent)
        self._spent.clear()
        return found

    def apart(self) -> dict[str, float]:
        """Seconds of the copies to and from the host, and of the attention where it is the device's."""
        queries = torch.zeros_like(self._sent, device=self._outputs.device)
        found = {"transfer": seconds_of(lambda: (self._sent.copy_(queries, non_blocking=True), self._fetch()), queries)}
        if not self.on_host:
            answers = self._fetch()
            found["attention"] = seconds_of(lambda: self._weigh(*answers), queries)
        return found

    def _fetch(self) -> tuple[Tensor, ...]:
        if not self.on_host:
            return tuple(answer.to(self._outputs.device, non_blocking=True) for answer in self._found)
        targets = self._outputs[1], self._lses[1]
        return tuple(
            target.copy_(answer, non_blocking=True) for target, answer in zip(targets, self._found, strict=True)
        )

    def _weigh(self, scores: Tensor, ids: Tensor) -> None:
        weigh(scores, ids, self.aside_values, scaling=self.scaling, output=self._outputs[1], lse=self._lses[1])

    def index_bytes(self) -> int:
        """Bytes of the indexes."""
        return sum(part.index.nbytes for part in self._parts)

    def choose(self, queries: Tensor) -> Sequence[Segment]:
        """Not asked: the host searches."""
        raise NotImplementedError


class _Searched:
    """The rows of one part: their index, which reads keys and values where the step holds them."""

    def __init__(self, index: Index, layer: Layer, rows: slice, keys: Tensor, values: Tensor) -> None:
        self.index, self.budget, self._effort = index, layer.budget, layer.state.get("effort")
        self._keys = from_bits(*_bits(keys[rows], "keys"))
        found = rows_in_place(_bits(values[rows], "values")[0])
        assert found is not None
        self._values, self._stride = found
        index.keys.move(self._keys[:, : index.keys.n])
        index.reserve(self._keys.shape[1] - index.keys.n)
        share = layer.heads // layer.kv_heads
        own = layer.budget.heads
        each = np.full((layer.rows, layer.heads), layer.budget.most) if own is None else (
            own.cpu().numpy().repeat(share, axis=1)
        )  # fmt: skip
        self._budgets = each.reshape(-1).astype(np.int64)

    def insert(self, aside: int, stored: int, spent: dict[str, float]) -> None:
        """Take in those of the first `aside` tokens that the index lacks, where their keys are `stored`."""
        known = self.index.keys.n
        if known < aside <= stored:
            began = time.perf_counter()
            self.index.insert(self._keys[:, known:aside], storage=self._keys[:, :aside])
            _lap(spent, "insertion", began)

    def search(
        self, queries: NDArray[np.float32], tokens: int, aside: int, answers: tuple[NDArray[Any], ...], on_host: bool,
        scaling: float, spent: dict[str, float],
    ) -> None:  # fmt: skip
        self.insert(aside, aside, spent)
        began = time.perf_counter()
        static = tokens - aside
        heads, dim = len(self._budgets), queries.shape[-1]
        flat = queries.reshape(heads, dim)
        wanted = self.budget.beside(static, aside)
        counts = np.full(heads, wanted) if self.budget.covers_all else (self._budgets - static).clip(0, aside)
        if wanted == 0:
            ids, scores = np.full((heads, 1), -1, np.int32), np.zeros((heads, 1), np.float32)
        elif wanted == aside and (self.budget.heads is None or self.budget.covers_all):
            ids = np.broadcast_to(np.arange(aside, dtype=np.int32), (heads, aside)).copy()
            scores = np.empty((heads, aside), np.float32)
            stored = self.index.keys
            on_threads(score_rows, heads, stored.rows, stored.stride, stored.groups, aside, flat, scores)
        else:
            found = self.index.search(flat[:, None], wanted, effort=self._effort)
            ids, scores = found.ids[:, 0], found.scores[:, 0]
        began = _lap(spent, "search", began)
        if on_host:
            sums, lses = answers
            on_threads(
                weigh_rows, heads, self._values, self._stride, self.index.keys.groups, ids, scores, counts, scaling,
                sums.reshape(heads, -1), lses.reshape(heads), least=4,
            )  # fmt: skip
            _lap(spent, "attention", began)
            return
        out_scores, out_ids = (answer.reshape(heads, -1) for answer in answers)
        width = min(ids.shape[1], out_ids.shape[1])
        out_ids[:, width:] = -1
        out_ids[:, :width] = np.where(np.arange(width) < counts[:, None], ids[:, :width], -1)
        out_scores[:, :width] = np.where(out_ids[:, :width] >= 0, scores[:, :width], 0)


def _bits(tokens: Tensor, what: str) -> tuple[NDArray[Any], str]:
    """`as_bits` of [B, G, n, d] as [B · G, n, d], which must not be a copy."""
    return as_bits(tokens.view(-1, *tokens.shape[2:]), what)


def _turns(policy: Searching, layer: Layer, most: int) -> Turns:
    store = layer.store
    beyond = store.static_tokens - sum(layer.static)
    most += beyond
    return Turns(
        layer.tokens, store.aside_stop - store.aside_start, beyond, policy.until(layer, most),
        policy.period(layer, most),
    )  # fmt: skip


def _lap(spent: dict[str, float], name: str, began: float) -> float:
    now = time.perf_counter()
    spent[name] += now - began
    return now
