"""vAttention (arXiv 2510.05688): the heaviest tokens, and a random sample of the rest as large as its error demands."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.attention import scores
from kvbench.contract.budget import LayerBudget
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.kernels.attention import Segment
from kvbench.kernels.lots import lots, seeds
from kvbench.kernels.score import scores as all_scores
from kvbench.strategies.selecting.aside import AsideStep
from kvbench.strategies.selecting.static_set import StaticSetOptions
from kvbench.strategies.selecting.tiers import SelectingPolicy


@dataclass(frozen=True)
class _Plan:
    """What a choice takes: the options, and the normal quantile that `delta` asks for on both sides."""

    top: float
    base: float
    epsilon: float
    quantile: float

    @classmethod
    def of(cls, options: Any) -> "_Plan":
        quantile = torch.special.ndtri(torch.tensor(1 - options.delta / 2, dtype=torch.float64))
        return cls(options.top, options.base, options.epsilon, float(quantile))

    def choose(self, found: Tensor, known: Tensor, drawn: Tensor, room: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Slots [B, H, 2 · most], −1 for none, and log-weights.

        `found` [B, H, n] are the scaled scores of the tokens set aside, −∞ for none, `known` [B, H, 1] the static
        tokens' log-sum-exp, `drawn` [B, H, n] random numbers of at least 0, `room` [B, H, 1] how many may be chosen.
        """
        rank = torch.arange(most, device=found.device)
        heavy = (room * self.top).long()
        best = found.topk(most, dim=-1)
        top = torch.where((rank < heavy) & (best.values > -torch.inf), best.indices, -1)
        known = known.logaddexp(best.values.masked_fill(top < 0, -torch.inf).logsumexp(-1, keepdim=True))
        chosen = torch.zeros_like(found[..., :1]).expand(found.shape).clone()
        chosen.scatter_add_(-1, top.clamp_min(0), (top >= 0).to(chosen.dtype))
        residual = (chosen == 0) & (found > -torch.inf)
        rest = residual.sum(-1, keepdim=True)
        left = (room - (top >= 0).sum(-1, keepdim=True)).minimum(rest)
        order = drawn.masked_fill(~residual, -1).topk(most, dim=-1).indices
        # weights relative to what is known: static and heavy tokens together are 1
        weights = (found.gather(-1, order).double() - known.double()).exp()
        first = (rest * self.base).ceil().long().clamp_min(2).minimum(left)
        base = weights.masked_fill(rank >= first, 0)
        mean = base.sum(-1, keepdim=True) / first.clamp_min(1)
        spread = (base - mean).square().masked_fill(rank >= first, 0).sum(-1, keepdim=True) / (first - 1).clamp_min(1)
        needed = (self.quantile * rest / (self.epsilon * (1 + rest * mean))).square() * spread
        count = needed.ceil().clamp_max(2**31 - 1).long().maximum(first).minimum(left)
        sampled = torch.where(rank < count, order, -1)
        log_weight = (rest / count.clamp_min(1)).log().float()
        bias = torch.cat(
            [torch.zeros_like(best.values).float(), log_weight.expand(*log_weight.shape[:2], most)], dim=-1
        )
        return torch.cat([top, sampled], dim=-1), bias


class VAttention(SelectingPolicy):
    """Attends, per query head, to sinks, window, the heaviest tokens, and a uniform sample of all others.

    The sample is as large as the central limit theorem asks for, so that the softmax's denominator is within a share
    `epsilon` of its value with probability 1 − `delta`: (z · n · σ / (ε · D))² of the n other tokens, z the normal
    quantile of 1 − δ/2, with σ and D estimated from a first sample of `base` of them. Sampled tokens count n / (their
    number) times. The budget is the upper bound: where it cuts the sample there is no guarantee, and the results'
    density says how many tokens were taken. The heaviest are the exact ones, as with the paper's oracle; they take
    `top` of what the budget leaves.
    """

    name = "vattention"
    summary = "The heaviest tokens and a random sample of the rest, sized for an error bound (epsilon, delta)."
    reference = "Desai et al., vAttention: Verified Sparse Attention, arXiv 2510.05688"
    head_budgets = True
    query_window = 0

    class Options(StaticSetOptions):
        """Options of vAttention."""

        top: float = Field(
            0.5, ge=0, lt=1, description="share of the budget beside the static set for the heaviest tokens"
        )
        base: float = Field(0.02, gt=0, le=1, description="share of the other tokens in the first sample; two at least")
        epsilon: float = Field(0.1, gt=0, description="relative error of the softmax's denominator")
        delta: float = Field(0.1, gt=0, lt=1, description="probability that the error is larger")
        seed: int = Field(0, ge=0, description="seed of the draws")

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Take the heaviest and draw a sample."""
        store = layer.store
        known = [
            scores(queries, keys, layer.scaling).masked_fill(
                torch.zeros((), dtype=torch.bool, device=queries.device)
                if mask is None
                else ~mask.repeat_interleave(layer.heads // layer.kv_heads, dim=1),
                -torch.inf,
            )
            for keys, _, mask in store.static_parts()
        ]
        found = layer.capped(scores(queries, store.aside_keys, layer.scaling))
        step, count = torch.tensor([[layer.tokens - 1], [found.shape[2]]], dtype=torch.int32, device=queries.device)
        heads = seeds(self.options.seed, layer.ordinal, layer.heads, queries.device)
        room = torch.as_tensor(self.room(layer, wanted, layer.heads), device=found.device)
        slots, log_weights = _Plan.of(self.options).choose(
            found, layer.capped(torch.cat(known, dim=-1)).logsumexp(-1, keepdim=True),
            lots(heads, step, count, found.shape[2]).expand_as(found), room.expand(*found.shape[:2], 1), wanted,
        )  # fmt: skip
        ids = torch.where(slots < 0, -1, slots + store.aside_start)
        return Selection(ids, padded=True, log_weights=log_weights, evaluations=float(found.shape[2]))

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Choose within the budget; everything where all of it fits."""
        store = layer.store
        available = store.aside_stop - store.aside_start
        wanted = budget.beside(store.static_tokens, available)
        if not wanted:
            return Selection()
        if budget.covers_all or (wanted == available and budget.heads is None):
            return Selection(everything=True, evaluations=0.0)
        return self.choose(layer, queries, wanted)

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep:
        """The same choice in fixed shapes."""
        return _SampleStep(self, parts, clock)


class _SampleStep(AsideStep):
    def __init__(self, policy: VAttention, parts: Sequence[Part], clock: Clock) -> None:
        super().__init__(policy, parts, clock)
        layer = parts[0].layer
        self._plan, self._heads = _Plan.of(policy.options), seeds(
            policy.options.seed, layer.ordinal, layer.heads, clock.positions.device
        )  # fmt: skip

    def choose(self, queries: Tensor) -> Sequence[Segment]:
        """The heaviest and a sample of the rest."""
        window, positions = self.window, self._clock.positions
        whole = all_scores(queries, self.keys, positions + 1, scaling=self.scaling)
        slots = window.slots.long().expand(-1, self.heads, -1)
        static = whole.gather(-1, slots.clamp_min(0)).masked_fill(slots < 0, -torch.inf)
        place = torch.arange(self.capacity, device=whole.device)
        found = whole[..., self.sinks :].masked_fill(place >= window.aside[:, None, None], -torch.inf)
        drawn = lots(self._heads, positions, window.aside, self.capacity)
        room = window.left[..., None].minimum(window.aside[:, None, None])
        ids, bias = self._plan.choose(found, static.logsumexp(-1, keepdim=True), drawn, room, self.most)
        return [Segment(self.aside_keys, self.aside_values, ids=ids.int(), bias=bias)]

    def index_reads(self, share: float) -> dict[str, int]:
        """All keys."""
        return {"device": int(self.aside_keys.nbytes * share), "host": 0}
