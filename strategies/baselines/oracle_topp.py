"""A yardstick: the fewest tokens whose exact attention weights reach a share p of the mass."""

from collections.abc import Sequence

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.attention import scores
from kvbench.contract.budget import LayerBudget
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.kernels.attention import Segment
from kvbench.kernels.score import scores as all_scores
from kvbench.strategies.selecting.aside import AsideStep
from kvbench.strategies.selecting.tiers import SelectingPolicy


class OracleTopP(SelectingPolicy):
    """Attends, per query head, to the newest token and the fewest others that bring the exact mass to `p`.

    What exact attention itself says is needed (Twilight's criterion, with exact weights). With `capped` no more tokens
    than the budget are taken, and a budget that covers everything attends to everything; without it the budget has no
    say, and the results' density tells how many tokens `p` takes.
    """

    name = "oracle_topp"
    summary = "Yardstick: the fewest tokens whose exact attention weights reach a share p, per query head."
    reference = "Lin et al., Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning, arXiv 2502.02770"
    head_budgets = True
    batch = 1
    query_window = 0

    class Options(extension.Options):
        """Options of the oracle."""

        p: float = Field(0.95, gt=0, le=1, description="share of the attention mass to reach")
        capped: bool = Field(True, description="take no more tokens than the budget")

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        if not self.options.capped:
            self.never_exact = f"tokens beyond {self.options.p:.0%} of the mass are left out whatever the budget"

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The newest token."""
        return 0, 1

    def most_attended(self, layer: Layer) -> int | None:
        """No limit where `p` alone decides."""
        return super().most_attended(layer) if self.options.capped else None

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Choose within the budget, or by `p` alone."""
        available = layer.store.aside_stop - layer.store.aside_start
        if self.options.capped or not available:
            return super().select(layer, queries, budget)
        return self.choose(layer, queries, available)

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Take the largest weights until they and the static set's reach `p`."""
        ((static, _, _),) = layer.store.static_parts()
        keys = layer.store.aside_keys
        found = [scores(queries, part, layer.scaling) for part in (static, keys)]
        logits = layer.capped(torch.cat(found, dim=-1))
        weights = logits.double().softmax(-1)
        best = weights[..., static.shape[2] :].topk(wanted, dim=-1)
        before = best.values.cumsum(-1) - best.values + weights[..., : static.shape[2]].sum(-1, keepdim=True)
        needed = before < self.options.p
        ids = torch.where(needed, best.indices + layer.store.aside_start, -1)[..., : int(needed.sum(-1).max())]
        return Selection(ids, padded=True, evaluations=float(keys.shape[2]))

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep:
        """As many places as the budget has, of which those beyond the mass stay empty."""
        return _TopPStep(self, parts, clock)


class _TopPStep(AsideStep):
    def __init__(self, policy: OracleTopP, parts: Sequence[Part], clock: Clock) -> None:
        super().__init__(policy, parts, clock)
        self._p, self._capped = policy.options.p, policy.options.capped
        if not self._capped:
            self._all, self.most = False, self.capacity
        self._rank = torch.arange(self.most, device=clock.positions.device)
        self._newest: Tensor | None = None
        self._chosen: Tensor | None = None

    def observe(self, keys: Tensor, values: Tensor) -> None:
        """The newest token is the static set."""
        self._newest = keys

    def choose(self, queries: Tensor) -> Sequence[Segment]:
        """The largest weights until they and the static set's reach `p`."""
        assert self._newest is not None
        newest = all_scores(queries, self._newest, scaling=self.scaling)
        found = all_scores(queries, self.aside_keys, self.window.aside, scaling=self.scaling)
        total = found.logsumexp(-1, keepdim=True).logaddexp(newest).double()
        best = found.topk(self.most, dim=-1)
        weights = (best.values.double() - total).exp()
        before = weights.cumsum(-1) - weights + (newest - total).exp()
        needed = (before < self._p) & (weights > 0)
        if self._capped:
            needed &= self._rank < self.window.left[..., None]
        self._chosen = torch.where(needed, best.indices, -1).int()
        return [Segment(self.aside_keys, self.aside_values, ids=self._chosen)]

    def index_reads(self, share: float) -> dict[str, int]:
        """All keys."""
        return {"device": int(self.aside_keys.nbytes * share), "host": 0}

    def reads(self, tokens: int) -> dict[str, int]:
        """As for a full budget; once a step was taken, with the tokens that it chose."""
        found = super().reads(tokens)
        if self._chosen is not None:
            token = (self.keys.nbytes + self.values.nbytes) // self.keys.shape[2]
            found = {"device": (self.sinks + self.recent) * token, "host": 0}
            found["device"] += self.index_reads((tokens - 1) / self.capacity)["device"]
            found["device"] += int((self._chosen >= 0).sum(-1).float().mean() * token)
        return found
