"""A yardstick: random tokens, the lower bound of any informed choice."""

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
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

    def build(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Seed the layer's draws."""
        layer.state["draws"] = torch.Generator().manual_seed(self.options.seed * 1_000_003 + layer.index)

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Draw without replacement."""
        store = layer.store
        lots = torch.rand(layer.heads, store.aside_stop - store.aside_start, generator=layer.state["draws"])
        drawn = lots.topk(wanted, dim=-1).indices + store.aside_start
        return Selection(drawn.to(queries.device).expand(layer.rows, -1, -1), evaluations=0.0)
