"""MagicPIG (arXiv 2410.16179): sample keys by locality-sensitive hashing, and weigh them by importance."""

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.attention import scores
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.indexes.lsh import HashTables, collision_probability
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
        layer.state["random"] = torch.Generator().manual_seed(self.options.seed)
        layer.state["tables"] = HashTables(
            layer.rows * layer.kv_heads, layer.head_dim, bits=self.options.bits, tables=self.options.tables,
            seed=self.options.seed * 1_000_003 + layer.index,
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
            lots = torch.rand(ids.shape[1:], generator=layer.state["random"]).expand_as(ids).masked_fill(ids < 0, -1)
            ids = ids.gather(-1, lots.topk(min(wanted, ids.shape[-1]), dim=-1).indices)
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
