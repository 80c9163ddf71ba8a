"""MagicPIG (arXiv 2410.16179): sample keys by locality-sensitive hashing, and weigh them by importance."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.attention import scores
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.indexes.lsh import HashTables, collision_probability
from kvbench.kernels.attention import Segment, attend
from kvbench.kernels.hashing import buckets, centred_cosines, hash_buckets, keep_collisions
from kvbench.kernels.hot import fetch
from kvbench.kernels.lots import lots, lots_of, seeds
from kvbench.kernels.merge import merge
from kvbench.strategies.selecting.aside import AsideStep, best_of
from kvbench.strategies.selecting.static_set import StaticSetOptions
from kvbench.strategies.selecting.tiers import SelectingPolicy


class MagicPIG(SelectingPolicy):
    """Attends, per query head, to the keys that share the query's bucket in at least two of L hash tables.

    A key is sampled with a known probability u, so softmax(q·k/√d − log u) over the sample estimates attention
    without bias in numerator and denominator. Keys are centred before they are hashed, which moves all scores of a
    query by the same amount. How many are sampled depends on K and L and on the data; where the sample is larger than
    the budget, a uniformly random part of it is attended to, and u shrinks accordingly.
    """

    name = "magicpig"
    summary = "Samples offloaded keys by hash tables (LSH) and weighs them by their sampling probability."
    reference = "Chen et al., MagicPIG: LSH Sampling for Efficient LLM Generation, arXiv 2410.16179"
    head_budgets = True
    offload = True
    query_window = 0

    class Options(StaticSetOptions):
        """Options of MagicPIG; sinks and window of the preset `small` are the paper's."""

        bits: int = Field(10, ge=1, le=16, description="K: hash bits of a table")
        tables: int = Field(150, ge=2, le=10_000, description="L: number of hash tables")
        seed: int = Field(0, ge=0, description="seed of the hyperplanes")

    def build(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Centre the keys and hash them."""
        layer.state["mean"] = keys.float().mean(2, keepdim=True).cpu()
        layer.state["tables"] = HashTables(
            layer.rows * layer.kv_heads, layer.head_dim, bits=self.options.bits, tables=self.options.tables,
            seed=self.options.seed * 1_000_003 + layer.ordinal,
        )  # fmt: skip
        layer.state["norms"] = torch.empty(layer.rows, layer.kv_heads, 0)
        self.grow(layer, keys, values)

    def grow(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Hash further keys, centred by the prompt's mean."""
        tables: HashTables = layer.state["tables"]
        centred = keys.cpu().float() - layer.state["mean"]
        tables.insert(centred.flatten(0, 1))
        layer.state["norms"] = torch.cat([layer.state["norms"], centred.norm(dim=-1)], dim=-1)
        layer.store.index_bytes = tables.nbytes + layer.state["norms"].nbytes

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Sample the keys that collide at least twice, and weigh them by −log u."""
        here = queries.squeeze(2).cpu().float()
        sampled = layer.state["tables"].collisions(here.flatten(0, 1), least=2)
        sizes = torch.tensor([len(ids) for ids in sampled]).view(layer.rows, layer.heads)
        room = torch.as_tensor(self.room(layer, wanted, layer.heads)).cpu().expand(*sizes.shape, 1)
        ids = torch.full((layer.rows * layer.heads, max(int(sizes.max()), 1)), -1)
        for head, found in enumerate(sampled):
            ids[head, : len(found)] = torch.from_numpy(found)
        ids = ids.view(layer.rows, layer.heads, -1)
        if (sizes[..., None] > room).any():
            step, heads = (
                torch.tensor([layer.tokens - 1]),
                seeds(self.options.seed, layer.ordinal, layer.heads, ids.device),
            )
            drawn = lots_of(heads, step, ids.clamp_min(0)).masked_fill(ids < 0, -1)
            ids = ids.gather(-1, drawn.topk(min(wanted, ids.shape[-1]), dim=-1).indices)
        share = layer.heads // layer.kv_heads
        norms = layer.state["norms"].repeat_interleave(share, dim=1).gather(-1, ids.clamp_min(0))
        mean = layer.state["mean"].repeat_interleave(share, dim=1)
        taken = (sizes[..., None] / room.clamp_min(1)).clamp_min(1).log()
        ids = torch.where(ids < 0, -1, ids + layer.store.aside_start)
        products = scores(here[:, :, None], layer.store.gather(ids)[0].float(), 1.0) - scores(
            here[:, :, None], mean, 1.0
        )
        cosines = products / (norms * here.norm(dim=-1, keepdim=True)).clamp_min(1e-12)
        u = collision_probability(cosines, self.options.bits, self.options.tables)
        log_weights = (taken - u.clamp_min(torch.finfo(u.dtype).tiny).log()).float()
        return Selection(ids, padded=True, log_weights=log_weights, evaluations=sizes.double())

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep:
        """The buckets of all keys are compared on the device; the sample is read from the host."""
        return _SamplingStep(self, parts, clock)


class _SamplingStep(AsideStep):
    """Compares buckets instead of walking through tables: the same keys collide.

    The sample's keys and values are fetched once, since its weights depend on the keys.
    """

    def __init__(self, policy: MagicPIG, parts: Sequence[Part], clock: Clock) -> None:
        states, device, layer = [dict(part.layer.state) for part in parts], clock.positions.device, parts[0].layer
        super().__init__(policy, parts, clock)
        self._hot = None  # the sample is fetched here
        self._bits, self._tables = policy.options.bits, policy.options.tables
        self._heads = seeds(policy.options.seed, layer.ordinal, layer.heads, device)
        self._planes: Tensor = states[0]["tables"].planes.to(device)
        shape, dim = (clock.batch, layer.kv_heads), layer.head_dim
        self._mean = torch.zeros(*shape, 1, dim, device=device)
        self._codes = torch.zeros(*shape, self._tables, self.capacity, dtype=torch.int16, device=device)
        self._asked = torch.zeros(clock.batch, layer.heads, self._tables, dtype=torch.int16, device=device)
        key = (
            "sampled",
            clock.batch,
            layer.heads,
            self.most,
            self.keys.shape[3],
            self.values.shape[3],
            self.keys.dtype,
        )
        if key not in clock.shared:
            clock.shared[key] = [
                like.new_zeros(clock.batch, layer.heads, self.most, like.shape[3]) for like in (self.keys, self.values)
            ]
        self._sample = clock.shared[key]
        self._outputs = torch.zeros(2, clock.batch, layer.heads, 1, self.values.shape[3], device=device)
        self._lses = torch.zeros(2, clock.batch, layer.heads, device=device)
        for part, state in zip(parts, states, strict=True):
            rows = range(clock.batch) if part.rows is None else part.rows.tolist()
            self._mean[list(rows)] = state["mean"].to(device)
            for row in rows:
                self._hash_row(row, part.layer.tokens - self.sinks)
            part.layer.state.clear()

    def _hash_row(self, row: int, tokens: int) -> None:
        """Note the buckets of a row's keys, those of the window, too."""
        step = max(2**22 // self._planes.shape[1], 1)
        for group in range(self.kv_heads):
            for first in range(0, tokens, step):
                stop = min(first + step, tokens)
                keys = self.aside_keys[row, group, first:stop].to(self._codes.device)
                found = buckets(keys, self._planes, self._bits, self._mean[row, group])
                self._codes[row, group, :, first:stop] = found.T

    def observe(self, keys: Tensor, values: Tensor) -> None:
        """Note the token's buckets; they are looked at once it is set aside."""
        place = self._clock.positions - self.sinks
        hash_buckets(keys, self._planes, self._bits, self._codes, place, self._mean)

    def choose(self, queries: Tensor) -> Sequence[Segment]:
        """Not asked: the sample is attended to apart."""
        raise NotImplementedError

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take the token in, sample, weigh the sample and attend."""
        if self._all:
            return super().__call__(queries, keys, values)
        static = self._take_in(keys, values)
        hash_buckets(queries, self._planes, self._bits, self._asked)
        found = lots(self._heads, self._clock.positions, self.window.aside, self.capacity)
        keep_collisions(found, self._codes, self._asked, 2)
        sizes = (found > -torch.inf).sum(-1, dtype=torch.int32)
        left = self.window.left
        ids = best_of(found, left, self.most)
        keys, values = self._sample
        fetch(ids, self.aside_keys, self.aside_values, keys, values)
        cosines = centred_cosines(queries, keys, self._mean)
        u = collision_probability(cosines, self._bits, self._tables)
        taken = (sizes / left.clamp_min(1)).clamp_min(1).log()[..., None]
        bias = (taken - u.clamp_min(torch.finfo(u.dtype).tiny).log()).float()
        sample = Segment(keys, values, sizes.minimum(left), bias=bias)
        attend(queries, static, scaling=self.scaling, output=self._outputs[0], lse=self._lses[0])
        attend(queries, sample, scaling=self.scaling, output=self._outputs[1], lse=self._lses[1])
        return merge(self._outputs, self._lses, dtype=queries.dtype)[0]

    def index_bytes(self) -> int:
        """Buckets, hyperplanes and means."""
        return self._codes.nbytes + self._planes.nbytes + self._mean.nbytes

    def index_reads(self, share: float) -> dict[str, int]:
        """All buckets, and the hyperplanes."""
        return {"device": int(self._codes.nbytes * share) + self._planes.nbytes, "host": 0}
