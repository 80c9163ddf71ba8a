"""A yardstick: random tokens, the lower bound of any informed choice."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.kernels.lots import lots, seeds
from kvbench.strategies.selecting.aside import TopStep
from kvbench.strategies.selecting.static_set import StaticSetOptions
from kvbench.strategies.selecting.tiers import SelectingPolicy


class Random(SelectingPolicy):
    """Attends to sinks, window and, per query head, to random tokens, drawn anew at each step.

    The draws depend on the seed, the layer, the step and the head, not on the batch.
    """

    name = "random"
    summary = "Yardstick: sinks, window and random tokens, drawn per query head at each step."
    head_budgets = True
    query_window = 0

    class Options(StaticSetOptions):
        """Options of the random choice."""

        seed: int = Field(0, ge=0, description="seed of the draws")

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Draw without replacement."""
        store = layer.store
        step, count = torch.tensor(
            [[layer.tokens - 1], [store.aside_stop - store.aside_start]], dtype=torch.int32, device=queries.device
        )
        heads = seeds(self.options.seed, layer.ordinal, layer.heads, queries.device)
        found = lots(heads, step, count, store.aside_stop - store.aside_start)
        drawn = found.topk(wanted, dim=-1).indices + store.aside_start
        return Selection(drawn.expand(layer.rows, -1, -1), evaluations=0.0)

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep:
        """The same draws in fixed shapes."""
        return _RandomStep(self, parts, clock)


class _RandomStep(TopStep):
    def __init__(self, policy: Random, parts: Sequence[Part], clock: Clock) -> None:
        super().__init__(policy, parts, clock)
        layer = parts[0].layer
        self._heads = seeds(policy.options.seed, layer.ordinal, layer.heads, clock.positions.device)

    def scores(self, queries: Tensor) -> Tensor:
        return lots(self._heads, self._clock.positions, self.window.aside, self.capacity)
