"""A yardstick: the exact top-k of each query head, which no policy that attends to as many tokens can beat."""

from collections.abc import Sequence

from torch import Tensor

from kvbench.contract.attention import scores
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.strategies.selecting.aside import ScoreStep
from kvbench.strategies.selecting.tiers import SelectingPolicy


class OracleTopK(SelectingPolicy):
    """Attends, per query head, to the tokens with the largest exact attention weights, beside the newest one.

    It scans every key at every step and keeps everything on the device: an upper bound on recovered attention mass,
    with neither sinks nor window to spend budget on, and no saving of memory or time.
    """

    name = "oracle_topk"
    summary = "Yardstick: the tokens with the largest exact attention weights, per query head; saves nothing."
    head_budgets = True
    batch = 1
    query_window = 0

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The newest token."""
        return 0, 1

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Take the largest inner products."""
        keys = layer.store.aside_keys
        best = scores(queries, keys, layer.scaling).topk(wanted, dim=-1).indices
        return Selection(best + layer.store.aside_start, evaluations=float(keys.shape[2]))

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep:
        """Scores of all keys on the device."""
        return ScoreStep(self, parts, clock)
