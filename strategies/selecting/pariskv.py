"""ParisKV (arXiv 2602.07721): rotated keys vote for themselves by their signs, and four bits rank the best again."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part, rows_of
from kvbench.kernels.attention import Segment
from kvbench.kernels.insert import insert
from kvbench.kernels.pq import pq_scores
from kvbench.strategies.compressing.kivi_storage import pack, unpack
from kvbench.strategies.compressing.turboquant import rotation
from kvbench.strategies.selecting.aside import AsideStep, best_of
from kvbench.strategies.selecting.static_set import HOT, StaticSetOptions
from kvbench.strategies.selecting.tiers import SelectingPolicy

TIERS = (0.05, 0.15, 0.30, 0.50, 0.75, 1.0)
"""Shares of the keys that collide, each a vote more for the best of them; the authors' code."""
LENGTHS = (5_000, 10_000, 30_000)
"""From so many keys on the next candidates and collisions hold."""
CANDIDATES, COLLISIONS = (0.50, 0.25, 0.20, 0.10), (0.50, 0.30, 0.25, 0.20)
"""Shares of the keys that are ranked again, and that collide in a block; the authors' code."""


@lru_cache
def magnitudes(size: int) -> Tensor:
    """The 8 levels of least squared error for |u|, a channel of a random direction in `size` dimensions, in order."""
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = (1 - x.square()).pow((size - 3) / 2)
    mass, moment = density.cumsum(0), (density * x).cumsum(0)
    found = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    zero = torch.zeros(1, dtype=torch.int64)
    for _ in range(5000):
        edges = torch.searchsorted(x, (found[1:] + found[:-1]) / 2)
        ends = torch.cat([zero, edges, torch.tensor([len(x)])])
        inside = [(part[ends[1:] - 1] - torch.where(ends[:-1] > 0, part[(ends[:-1] - 1).clamp_min(0)], 0))
                  for part in (mass, moment)]  # fmt: skip
        moved = inside[1] / inside[0]
        if float((moved - found).abs().max()) < 1e-9:
            break
        found = moved
    return found.float()


@dataclass(frozen=True)
class _Plan:
    """What coding and ranking share: the rotation, the levels, the size of a block of channels, and shares."""

    block: int
    turn: Tensor
    levels: Tensor
    lengths: Tensor
    candidates: Tensor
    collisions: Tensor
    tiers: Tensor

    @classmethod
    def of(cls, options: Any, dim: int, device: torch.device) -> "_Plan":
        return _plan(options.block, options.seed, options.candidates, options.collisions, dim, device)

    def encode(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of keys [B, G, n, d]: signs uint8 [B, G, n, b], four bits a channel [B, G, n, d / 2], weights [B, G, n, b].

        A block's weight, in float16, is its length by the product of its direction and the coded one, so that the
        estimate of the block's own inner product with itself is exact (RaBitQ, arXiv 2405.12497).
        """
        blocks = (keys.float() @ self.turn).view(*keys.shape[:3], -1, self.block)
        lengths = blocks.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        unit = blocks / lengths
        edges = (self.levels[1:] + self.levels[:-1]) / 2
        level, positive = torch.bucketize(unit.abs(), edges, out_int32=True), unit >= 0
        coded = self.levels[level]
        weights = lengths.squeeze(-1) / (coded * unit.abs()).sum(-1)
        bits = 1 << torch.arange(self.block, dtype=torch.int32, device=keys.device)
        signs = (positive * bits).sum(-1).to(torch.uint8)
        numbers = (level | (positive.int() << 3)).flatten(-2).to(torch.uint8)
        return signs, pack(numbers, 4), weights.clamp_max(torch.finfo(torch.float16).max).half()

    def rank(
        self, queries: Tensor, coded: Sequence[Tensor], histogram: Tensor, count: Tensor, wanted: Tensor, most: int
    ) -> tuple[Tensor, Tensor]:
        """Slots [B, G, most] of the candidates of `queries` [B, H, 1, d] and their weights, −∞ for none.

        `coded`: signs [B, G, b, n], channels [B, G, n, d / 2] and weights [B, G, n, b], of which the first `count`
        int32 [B] are there; `histogram` [B, G, b, 2^block] counts their signs; `wanted` [B, G] will be chosen.
        """
        signs, channels, weights = coded
        batch, groups, blocks, slots = signs.shape
        turned = queries.float() @ self.turn
        grouped = turned.view(batch, groups, -1, blocks, self.block)
        votes = self._votes(grouped.mean(2), histogram, count)
        each = queries.new_ones(batch, groups, 1, blocks, dtype=torch.float32)
        found = pq_scores(each, votes[..., None].contiguous(), signs, count).long()
        # of keys with as many votes the first; slots beyond the count last
        slot = torch.arange(slots, device=queries.device)
        ranked = torch.where(slot < count[:, None, None], found * slots + (slots - 1 - slot), -1)
        best = ranked.topk(most, dim=-1).indices
        number = self.count(count)[:, None].maximum(wanted).minimum(count[:, None])
        there = torch.arange(most, device=queries.device) < number[..., None]
        numbers = unpack(channels.gather(2, best[..., None].expand(-1, -1, -1, channels.shape[3])), 4).int()
        levels = self.levels[numbers & 7]
        vectors = torch.where(numbers >= 8, levels, -levels).view(*best.shape, blocks, self.block)
        scale = weights.gather(2, best[..., None].expand(-1, -1, -1, blocks)).float()
        estimates = grouped.flatten(3) @ (vectors * scale[..., None]).flatten(3).transpose(-1, -2)
        return best, estimates.masked_fill(~there[:, :, None], -torch.inf)

    def _votes(self, queries: Tensor, histogram: Tensor, count: Tensor) -> Tensor:
        """Votes, float32 [B, G, b, 2^block], of each pattern of signs for `queries` [B, G, b, block]."""
        pattern = torch.arange(2**self.block, device=queries.device)
        bits = (pattern[:, None] >> torch.arange(self.block, device=queries.device)) & 1
        order = (queries @ (2.0 * bits - 1).T).argsort(dim=-1, descending=True, stable=True)
        keys = histogram.gather(-1, order)
        before = keys.cumsum(-1) - keys
        targets = (self._share(count, self.collisions)[:, None] * self.tiers).ceil()
        tiers = (before[..., None] < targets[:, None, None, None]).sum(-1)
        return torch.zeros_like(before, dtype=torch.float32).scatter_(-1, order, tiers.float())

    def count(self, keys: Tensor) -> Tensor:
        """How many of `keys` int32 [B] keys are ranked again."""
        return self._share(keys, self.candidates).ceil().int()

    def most(self, keys: int) -> int:
        """The most of any number up to `keys`."""
        ends = [keys, *(length - 1 for length in LENGTHS if length <= keys)]
        return int(self.count(torch.tensor(ends, dtype=torch.int32, device=self.turn.device)).max())

    def _share(self, keys: Tensor, table: Tensor) -> Tensor:
        """Of `keys` int32 [B] keys, the share by their number, float64 [B]."""
        return table[torch.bucketize(keys, self.lengths, right=True)] * keys


@lru_cache
def _plan(
    block: int, seed: int, candidates: float | None, collisions: float | None, dim: int, device: torch.device
) -> _Plan:
    ranked, colliding = (
        torch.tensor(table if given is None else (given,) * len(table), dtype=torch.float64, device=device)
        for given, table in ((candidates, CANDIDATES), (collisions, COLLISIONS))
    )
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    tiers = torch.tensor(TIERS, dtype=torch.float64, device=device)
    return _Plan(block, rotation(dim, seed).to(device), magnitudes(block).to(device), lengths, ranked, colliding, tiers)


def _group_weights(estimates: Tensor, scaling: float) -> Tensor:
    """Each query head's softmax over its candidates, summed over the group: [B, G, c] of [B, G, H / G, c]."""
    found = (estimates * scaling).softmax(-1).sum(2)
    return found.masked_fill(estimates[:, :, 0] == -torch.inf, -torch.inf)


class ParisKV(SelectingPolicy):
    """Offloads keys and values; finds the best by votes of sign patterns and ranks the candidates in four bits.

    Keys are rotated at random (Hadamard's matrix with signs) and cut into blocks; a block's signs are one of 2^block
    centroids that depend on no data. In each block the patterns that a query scores highest collide, until a share of
    the keys has; the keys in the best of these get up to six votes. The keys with most votes are the candidates, whose
    inner products are estimated from a sign and one of eight magnitudes for each channel and a weight for each block.
    The votes are those of the group's mean query; the estimates go through softmax for each query head and are summed
    over the group, so that a group fetches one set of tokens.
    """

    name = "pariskv"
    summary = "Top-k over offloaded keys by votes of sign patterns and a four-bit estimate, with nothing learned."
    reference = (
        "Qi et al., ParisKV: Fast and Drift-Robust KV-Cache Retrieval for Long-Context LLMs, ICML 2026, "
        "arXiv 2602.07721"
    )
    head_budgets = True
    offload = True
    query_window = 0

    class Options(StaticSetOptions):
        """Options of ParisKV; the paper's static set is 4 sinks and 256 to 512 recent tokens."""

        block: int = Field(8, ge=2, le=8, description="channels of a block, whose signs are one pattern")
        candidates: float | None = Field(
            None, gt=0, le=1, description="share of the keys that is ranked again; by their number by default"
        )
        collisions: float | None = Field(
            None, gt=0, le=1, description="share of the keys that collide in a block; by their number by default"
        )
        update: int = Field(
            256, ge=1, description="tokens that leave the window at a time, at most a quarter of what the budget leaves"
        )
        seed: int = Field(0, ge=0, description="seed of the rotation")
        hot: int = HOT

    def moves(self, layer: Layer, beyond: int) -> bool:
        """Every `update` tokens."""
        most: int = min(self.options.update, (layer.budget.least - sum(layer.static)) // 4)
        return beyond >= max(most, 1)

    def build(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Code the keys."""
        if layer.head_dim % self.options.block or layer.head_dim % 2:
            raise KVBenchError(
                f"block={self.options.block} of policy 'pariskv' does not divide the key dimension {layer.head_dim}."
            )
        self.grow(layer, keys, values)

    def grow(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Code further keys."""
        signs, channels, weights = _Plan.of(self.options, layer.head_dim, keys.device).encode(keys)
        state = layer.state
        for name, more, along in (("signs", signs.transpose(2, 3), 3), ("channels", channels, 2),
                                  ("weights", weights, 2)):  # fmt: skip
            state[name] = torch.cat([state[name], more], dim=along) if name in state else more.contiguous()
        shape = (*signs.shape[:2], signs.shape[3], 2**self.options.block)
        counted = state.setdefault("histogram", torch.zeros(shape, dtype=torch.int32, device=keys.device))
        patterns = signs.transpose(2, 3).long()
        counted.scatter_add_(3, patterns, torch.ones_like(patterns, dtype=torch.int32))
        layer.store.index_bytes = sum(part.nbytes for part in state.values())

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Vote, estimate and take the best of the candidates."""
        state, plan = layer.state, _Plan.of(self.options, layer.head_dim, queries.device)
        coded = state["signs"], state["channels"], state["weights"]
        known = int(state["signs"].shape[3])
        count = torch.full((layer.rows,), known, dtype=torch.int32, device=queries.device)
        room = torch.as_tensor(self.room(layer, wanted, layer.kv_heads), device=queries.device)
        asked = room.int().expand(layer.rows, layer.kv_heads, 1).squeeze(-1)
        most = min(max(plan.most(known), wanted), known)
        slots, estimates = plan.rank(queries, coded, state["histogram"], count, asked, most)
        best = _group_weights(estimates, layer.scaling).topk(wanted, dim=-1).indices
        return Selection(slots.gather(-1, best) + layer.store.aside_start, evaluations=float(known))

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep:
        """Codes on the device; the keys and values stay on the host."""
        return _VotingStep(self, parts, clock)


class _VotingStep(AsideStep):
    per_head = False

    def __init__(self, policy: ParisKV, parts: Sequence[Part], clock: Clock) -> None:
        states, first, device = [dict(part.layer.state) for part in parts], parts[0].layer, clock.positions.device
        super().__init__(policy, parts, clock)
        self._plan = _Plan.of(policy.options, first.head_dim, device)
        shape, like = (self.batch, self.kv_heads), states[0]
        blocks = like["signs"].shape[2]
        self._signs = torch.zeros(*shape, blocks, self.capacity, dtype=torch.uint8, device=device)
        self._channels, self._weights = (
            like[name].new_zeros(*shape, self.capacity, like[name].shape[3]) for name in ("channels", "weights")
        )
        self._histogram = like["histogram"].new_zeros(*shape, *like["histogram"].shape[2:])
        self._counted = self.start.aside.clone()
        for part, state in zip(parts, states, strict=True):
            rows, stop = list(rows_of(part)), part.layer.tokens - self.sinks
            self._histogram[rows] = state["histogram"]
            known = self.aside_keys[rows, :, :stop].to(device)
            signs, self._channels[rows, :, :stop], self._weights[rows, :, :stop] = self._plan.encode(known)
            self._signs[rows, :, :, :stop] = signs.transpose(2, 3)
            part.layer.state.clear()
        self._coming = torch.arange(int(self.start.period.max()), device=device)
        self._most_candidates = min(max(self._plan.most(self.capacity), self.most), self.capacity)

    def observe(self, keys: Tensor, values: Tensor) -> None:
        """Code the token, and count the patterns of those that have been set aside."""
        signs, channels, weights = self._plan.encode(keys)
        places = self._clock.positions - self.sinks
        insert(self._channels, self._weights, channels, weights, places)
        self._signs.scatter_(
            3, places.long()[:, None, None, None].expand_as(signs.transpose(2, 3)), signs.transpose(2, 3)
        )
        slots = self._counted[:, None] + self._coming
        new = (slots < self.window.aside[:, None]).int()[:, None, None].expand(-1, *self._signs.shape[1:3], -1)
        places = slots.clamp_max(self.capacity - 1)[:, None, None].expand_as(new)
        self._histogram.scatter_add_(3, self._signs.gather(3, places).long(), new)
        self._counted.copy_(self.window.aside)

    def choose(self, queries: Tensor) -> Sequence[Segment]:
        """Vote, estimate and take the best of the candidates."""
        coded = self._signs, self._channels, self._weights
        slots, estimates = self._plan.rank(
            queries, coded, self._histogram, self.window.aside, self.window.left, self._most_candidates
        )
        counts = self.window.left.minimum(self.window.aside[:, None])
        best = best_of(_group_weights(estimates, self.scaling), counts, min(self.most, self._most_candidates))
        ids = torch.where(best < 0, -1, slots.gather(-1, best.long().clamp_min(0)))
        return [Segment(self.aside_keys, self.aside_values, ids=ids.int())]

    def index_bytes(self) -> int:
        """Codes and counts."""
        return sum(part.nbytes for part in (self._signs, self._channels, self._weights, self._histogram))

    def index_reads(self, share: float) -> dict[str, int]:
        """All signs, and the other codes of the candidates."""
        ranked = (self._channels.nbytes + self._weights.nbytes) * self._most_candidates / self.capacity
        return {"device": int((self._signs.nbytes + ranked) * share) + self._histogram.nbytes, "host": 0}

    def changed(self) -> Sequence[Tensor]:
        """The counts of patterns."""
        return [*super().changed(), self._histogram, self._counted]
