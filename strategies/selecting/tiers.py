"""What selecting policies share: sinks and window that stay, all else set aside, and a choice from it at each step."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.kernels.steps import GrowingStep

_DECIDING = (
    "prefill",
    "build",
    "select",
    "choose",
    "room",
    "attend",
    "insert",
    "leave",
    "grow",
    "after_prompt",
    "offload",
)


class SelectingPolicy(KVCachePolicy):
    """Sets all but sinks and window aside and chooses from it, at each step, what the budget leaves beside them.

    Subclasses write `choose`, and `build` and `grow` where they keep structures over the set-aside keys. Tokens that
    have grown out of the window join the set-aside ones once `moves` says so, and as soon as the static set alone
    would be over the budget.
    """

    together: ClassVar[bool] = False
    """Whether `choose_each` answers what `choose` does one by one: it looks at no step's number, and draws nothing."""
    offload: ClassVar[bool] = False
    """Whether the set-aside tokens lie in the host's memory."""
    batch: ClassVar[int] = 16
    """Tokens that leave the window at a time."""

    def static_tokens(self, context: int) -> tuple[int, int]:
        """Sinks and window, as the options say."""
        sinks, window = self.options.sizes()
        return sinks, window

    @abstractmethod
    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Choose at most `wanted` set-aside tokens per head, more than 0, for `queries`.

        With `head_budgets = True` the ids come best first, and `select` cuts each head's down to its own budget.
        """

    def choose_each(self, layer: Layer, queries: Tensor, wanted: Sequence[int]) -> Selection:
        """Choose at most `wanted[i]` tokens per head for each of `queries` [B, H, m, d]: ids [B, H, m, k].

        `wanted` falls, or stays, from query to query.
        """
        found = [
            self.choose(layer, queries[:, :, place : place + 1], count).ids if count else None
            for place, count in enumerate(wanted)
        ]
        longest = max(ids.shape[-1] for ids in found if ids is not None)
        chosen = queries.new_full((layer.rows, layer.heads, len(wanted), longest), -1, dtype=torch.long)
        for place, ids in enumerate(found):
            if ids is not None:
                chosen[:, :, place, : ids.shape[-1]] = ids.repeat_interleave(layer.heads // ids.shape[1], dim=1)
        return Selection(chosen, padded=True)

    def room(self, layer: Layer, wanted: int, heads: int) -> int | Tensor:
        """Tokens that each of `heads` H or G heads may choose: `wanted`, or [B, H or G, 1] where heads differ."""
        store = layer.store
        counts = layer.budget.counts(store.static_tokens, store.aside_stop - store.aside_start, heads)
        return wanted if counts is None else counts[..., None]

    def build(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Build structures over set-aside `keys` and `values` [B, G, m, d], on the device, given prompt `queries`."""

    def grow(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Add `keys` and `values` [B, G, m, d], the latest set-aside ones, to the structures."""

    def moves(self, layer: Layer, beyond: int) -> bool:
        """Whether the `beyond` oldest tokens of the window, more than 0, shall be set aside now."""
        return beyond >= self.batch

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Set the tokens between sinks and window aside and build."""
        sinks, window = layer.static
        stop = layer.tokens - window
        if stop > sinks:
            layer.store.set_aside(sinks, stop, offload=self.offload)
            self.build(layer, queries, keys[:, :, sinks:stop], values[:, :, sinks:stop])

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Choose what the budget leaves beside the static set; everything without asking where all of it fits."""
        store = layer.store
        available = store.aside_stop - store.aside_start
        if queries.shape[2] > 1:
            return self._select_each(layer, queries, budget)
        wanted = budget.beside(store.static_tokens, available)
        if not wanted:
            return Selection()
        whole = budget.heads is None or budget.covers_all
        if wanted == available and whole:
            return Selection(everything=True, evaluations=0.0)
        chosen = self.choose(layer, queries, wanted)
        if whole or chosen.ids is None:
            return chosen
        return replace(chosen, ids=budget.cut(chosen.ids, store.static_tokens), padded=True)

    def _select_each(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """`select` for a block of queries, each beside the static set of its own token."""
        store, block = layer.store, queries.shape[2]
        available = store.aside_stop - store.aside_start
        wanted = [budget.beside(store.static_tokens - later, available) for later in reversed(range(block))]
        if not wanted[0]:
            return Selection()
        if wanted[-1] == available:  # all of them, then (`at_once`)
            return Selection(everything=True, evaluations=0.0)
        return self.choose_each(layer, queries, wanted)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Set aside what has grown out of the window; of a block's tokens the first alone decides (`at_once`)."""
        store = layer.store
        beyond = store.static_tokens - (keys.shape[2] - 1) - sum(layer.static)
        if store.aside_stop == store.aside_start or beyond <= 0:
            return
        if self.leave(layer, beyond):
            self.grow(layer, *store.advance(beyond))

    def leave(self, layer: Layer, beyond: int) -> bool:
        """Whether the `beyond` oldest tokens leave the window now, since the policy wants it or the budget does."""
        return self._over_budget(layer, beyond) or self.moves(layer, beyond)

    def at_once(self, layer: Layer, most: int) -> int:
        """A token with which others leave the window, and those after it until the next does."""
        store, kind, budget = layer.store, type(self), layer.budget
        alike = kind.select is SelectingPolicy.select and kind.insert is SelectingPolicy.insert
        if not self.together or not alike or hasattr(self, "attend") or not (budget.covers_all or budget.heads is None):
            return 1
        if store.aside_stop == store.aside_start:
            return most
        beyond = store.static_tokens - sum(layer.static)
        moved = beyond + 1 if beyond >= 0 and self.leave(layer, beyond + 1) else 0
        beyond += 1 - moved
        static, available = store.static_tokens + 1 - moved, store.aside_stop - store.aside_start + moved

        def kind_of_choice(later: int) -> tuple[bool, bool]:
            wanted = budget.beside(static + later, available)
            return wanted == 0, wanted == available

        others = range(1, most)
        return next(
            (n for n in others if (beyond + n > 0 and self.leave(layer, beyond + n))
             or kind_of_choice(n) != kind_of_choice(0)),
            most,
        )  # fmt: skip

    def _over_budget(self, layer: Layer, beyond: int) -> bool:
        return sum(layer.static) + beyond > layer.budget.least and not layer.budget.covers_all

    def period(self, layer: Layer, most: int) -> int:
        """How many tokens leave the window at a time; more than `most` where none leaves it in `most` steps."""
        times = range(1, most + 1)
        return next((n for n in times if self._over_budget(layer, n) or self.moves(layer, n)), most + 1)

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """The step that `aside_step` gives; None where only some rows of the layer have tokens set aside."""
        aside = {part.layer.store.aside_stop > part.layer.store.aside_start for part in parts}
        if len(aside) > 1 or not self._steps_as_it_chooses():
            return None
        return self.aside_step(parts, clock) if aside.pop() else GrowingStep(parts, clock)

    def _steps_as_it_chooses(self) -> bool:
        """Whether `aside_step` was written for this policy's hooks, not for those of a class that it changes."""
        for kind in type(self).__mro__:
            if "aside_step" in vars(kind):
                return kind is not SelectingPolicy
            if any(name in vars(kind) for name in _DECIDING):
                return False
        return False

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """The step of fixed shapes for parts that have set tokens aside; None where the policy has none."""
        return None


def padded_ids(chosen: Tensor, first: int) -> Tensor:
    """Ids [..., k] of the tokens that `chosen`, bool [..., m], marks, counted from `first`; −1 fills short rows."""
    counts = chosen.sum(-1)
    longest = int(counts.max())
    slots = torch.arange(longest, device=chosen.device) < counts[..., None]
    ids = torch.full(slots.shape, -1, dtype=torch.long, device=chosen.device)
    ids[slots] = chosen.nonzero()[:, -1] + first
    return ids
