"""Fixed decoding steps that many policies share: tokens that only grow in number, and a ring of recent ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbench.contract.compression import best, due, head_budgets, scored, to_the_front
from kvbench.contract.held import HeldTokens
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.step import Clock, FixedStep, Held, Part, hold_static
from kvbench.kernels.attention import decode
from kvbench.kernels.insert import insert


class HeldStep(FixedStep):
    """Attends to all tokens that are held; subclasses say where a new token goes."""

    def __init__(self, parts: Sequence[Part], clock: Clock, spare: int, also: Sequence[str] = ()) -> None:
        self.held: Held = hold_static(parts, clock.batch, spare, also)
        self.scaling = parts[0].layer.scaling

    def attend(self, queries: Tensor) -> Tensor:
        """Attend to the tokens held: output [B, H, 1, d]."""
        held = self.held
        return decode(queries, held.keys, held.values, held.lengths, scaling=self.scaling, dtype=queries.dtype)[0]

    def bytes(self) -> dict[str, int]:
        """Keys and values, on the device."""
        return {"resident": self.held.nbytes, "offloaded": 0, "index": 0}

    def reads(self, tokens: int) -> dict[str, int]:
        """All tokens held."""
        share = float(self.held.lengths.float().mean()) / self.held.keys.shape[2]
        return {"device": round(self.held.nbytes * share), "host": 0}

    def changed(self) -> Sequence[Tensor]:
        """The lengths."""
        return [self.held.lengths]


class GrowingStep(HeldStep):
    """Keeps what the prompt left and every new token: `full`, and policies that evict from the prompt alone."""

    def __init__(self, parts: Sequence[Part], clock: Clock, padding: Tensor | None = None) -> None:
        """`padding` [B]: tokens at the start of each row to leave out."""
        super().__init__(parts, clock, clock.new_tokens)
        held = self.held
        for row, pad in enumerate([] if padding is None else padding.tolist()):
            if pad:
                for tokens in (held.keys, held.values):
                    tokens[row, :, :-pad] = tokens[row, :, pad:].clone()
                held.lengths[row] -= pad
        self._token_bytes = self.held.nbytes // self.held.keys.shape[2]
        self._evicted = float(clock.positions.float().mean() - self.held.lengths.float().mean())

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append and attend."""
        insert(self.held.keys, self.held.values, keys, values, self.held.lengths)
        self.held.lengths.add_(1)
        return self.attend(queries)

    def reads(self, tokens: int) -> dict[str, int]:
        """The tokens held at that length."""
        return {"device": round(self._token_bytes * (tokens - self._evicted)), "host": 0}


class RingStep(HeldStep):
    """Keeps the first `sinks` tokens and a ring of the latest ones: a new token takes the oldest one's place."""

    def __init__(self, parts: Sequence[Part], clock: Clock, sinks: int) -> None:
        super().__init__(parts, clock, 0)
        self._sinks, self._window = sinks, self.held.lengths - sinks
        self._next = torch.zeros_like(self._window)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Replace the oldest token of the ring and attend."""
        insert(self.held.keys, self.held.values, keys, values, self._next + self._sinks)
        self._next.add_(1).remainder_(self._window)
        return self.attend(queries)

    def changed(self) -> Sequence[Tensor]:
        """The ring's place, and the tokens, since one is overwritten."""
        return [self._next, self.held.keys, self.held.values]


class CompressingStep(HeldStep):
    """Keeps every new token, and between steps cuts what is held down to the budget where a compression is due."""

    def __init__(self, policy: KVCachePolicy, parts: Sequence[Part], clock: Clock) -> None:
        first, device = parts[0].layer, clock.positions.device
        self._policy, self._parts, self._every = policy, parts, first.budget.every
        self._before = first.tokens - first.prompt_tokens
        self._context = [part.layer.tokens for part in parts]
        budgets = [head_budgets(part.layer.budget, (part.layer.rows, first.kv_heads)) for part in parts]
        most = max(int(budget.max()) for budget in budgets)
        self._budget = sum(float(budget.sum()) for budget in budgets) / (clock.batch * first.kv_heads)
        longest = max(int(part.layer.store.static_ids.shape[-1]) for part in parts)
        spare = min(clock.new_tokens, max(most - longest, 0) + self._every)
        window = policy.compression_window(self._every)
        super().__init__(parts, clock, spare, policy.running)
        held = self.held
        self.running = {name: tensor.float().contiguous() for name, tensor in held.also.items()}
        shape = clock.batch, first.heads, window, first.head_dim
        self._queries = torch.zeros(*shape, dtype=held.keys.dtype, device=device)
        for part in parts:
            if part.layer.latest_queries is not None:
                self._queries[_rows(part, device)] = part.layer.latest_queries
        self._place = torch.tensor([self._before % max(window, 1)], device=device)
        self._mean, self._since, self._taken = float(held.lengths.float().mean()), 0, 0
        self._start = self._mean

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append, note the queries and attend."""
        insert(self.held.keys, self.held.values, keys, values, self.held.lengths)
        self.held.lengths.add_(1)
        if self._queries.shape[2]:
            self._queries.index_copy_(2, self._place, queries.to(self._queries.dtype))
            self._place.add_(1).remainder_(self._queries.shape[2])
        return self.attend(queries)

    def between(self, taken: int) -> None:
        """Cut what is held down to the budget where that is due."""
        count = self._before + taken - 1
        if due(self._every, count):
            appended = taken - 1 - self._since
            for part, context in zip(self._parts, self._context, strict=True):
                self._compress(part, context + taken - 1, appended)
            self._since, self._mean = taken - 1, float(self.held.lengths.float().mean())
        self._taken = taken

    def _compress(self, part: Part, tokens: int, appended: int) -> None:
        held, rows = self.held, _rows(part, self.held.keys.device)
        keys, values, lengths = held.keys[rows], held.values[rows], held.lengths[rows].long()[..., None]
        slot = torch.arange(keys.shape[2], device=keys.device)
        new = (slot >= lengths - appended) & (slot < lengths)
        ids = torch.where(new, tokens - lengths + slot, held.ids[rows].long())
        queries = self._queries[rows]
        if queries.shape[2]:
            queries = queries.roll(-int(self._place), 2)
        running = {name: tensor[rows] for name, tensor in self.running.items()}
        found = HeldTokens(keys, values, ids, queries, tokens, running)
        marks = best(scored(self._policy, part.layer, found), ids, part.layer.budget)
        front = to_the_front(marks)
        count = marks.sum(-1)
        empty = slot >= count[..., None]
        for whole, mine in ((held.keys, keys), (held.values, values)):
            whole[rows, :, : front.shape[-1]] = mine.gather(2, front[..., None].expand(*front.shape, mine.shape[3]))
        for whole, mine, nothing in ((held.ids, ids.int(), -1), *((self.running[n], running[n], 0) for n in running)):
            kept = mine.gather(-1, front).masked_fill(empty[..., : front.shape[-1]], nothing)
            whole[rows] = nothing
            whole[rows, :, : front.shape[-1]] = kept
        held.lengths[rows] = count.int()

    def held_tokens(self) -> float:
        """The tokens after the latest compression, and those that came since."""
        return self._mean + self._taken - self._since

    def reads(self, tokens: int) -> dict[str, int]:
        """The tokens held at that length: the budget, where they were cut down to it, and what came since."""
        longest = max(self._context)
        count = self._before + max(tokens - longest, 0)
        held = self._start + tokens - longest
        if count >= self._every:
            held = min(held, self._budget + count % self._every)
        return {"device": round(self.held.nbytes / self.held.keys.shape[2] * held), "host": 0}

    def changed(self) -> Sequence[Tensor]:
        """Lengths, the ring's place and the running scores."""
        return [self.held.lengths, self._place, *self.running.values()]


def _rows(part: Part, device: torch.device) -> slice | Tensor:
    return slice(None) if part.rows is None else part.rows.to(device)
