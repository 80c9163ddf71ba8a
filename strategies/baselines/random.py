"""A yardstick: random tokens, the lower bound of any informed choice."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
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
        step = torch.full((1,), layer.tokens - 1, device=queries.device)
        lots = draws(self.options.seed, layer, step, store.aside_stop - store.aside_start)
        drawn = lots.topk(wanted, dim=-1).indices + store.aside_start
        return Selection(drawn.expand(layer.rows, -1, -1), evaluations=0.0)

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep:
        """The same draws in fixed shapes."""
        return _RandomStep(self, parts, clock)


class _RandomStep(TopStep):
    def __init__(self, policy: Random, parts: Sequence[Part], clock: Clock) -> None:
        super().__init__(policy, parts, clock)
        self._seed, self._layer = policy.options.seed, parts[0].layer
        self._places = torch.arange(self.capacity, device=clock.positions.device)

    def scores(self, queries: Tensor) -> Tensor:
        lots = draws(self._seed, self._layer, self._clock.positions, self.capacity)
        return lots.masked_fill(self._places >= self.window.aside[:, None, None], -torch.inf)


def draws(seed: int, layer: Layer, steps: Tensor, count: int) -> Tensor:
    """Random numbers of 0 and more, float32 [s, H, count], for steps [s] that are named by their tokens' ids."""
    heads = _mixed(torch.arange(layer.heads, device=steps.device) + (seed * 1_000_003 + layer.index) * 1_009)
    lots = _mixed(heads ^ _mixed(steps.long())[:, None])[..., None] ^ torch.arange(count, device=steps.device)
    # the bits of positive floats, so that hardly any two are equal
    return (_mixed(lots) % 0x7F800000).int().view(torch.float32)


def _mixed(numbers: Tensor) -> Tensor:
    """A bijection of 32 bits whose every bit of input changes each bit of output half of the time (lowbias32).

    C. Wellons, Prospecting for Hash Functions, 2018.
    """
    x = numbers & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)
