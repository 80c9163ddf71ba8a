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

_DECIDING = ("prefill", "build", "select", "choose", "room", "attend", "insert", "grow", "after_prompt", "offload")


class SelectingPolicy(KVCachePolicy):
    """Sets all but sinks and window aside and chooses from it, at each step, what the budget leaves beside them.

    Subclasses write `choose`, and `build` and `grow` where they keep structures over the set-aside keys. Tokens that
    have grown out of the window join the set-aside ones once `moves` says so, and as soon as the static set alone
    would be over the budget.
    """

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

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Set aside what has grown out of the window."""
        store = layer.store
        beyond = store.static_tokens - sum(layer.static)
        if store.aside_stop == store.aside_start or beyond <= 0:
            return
        if self._over_budget(layer, beyond) or self.moves(layer, beyond):
            self.grow(layer, *store.advance(beyond))

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
