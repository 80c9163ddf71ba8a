"""RetroInfer (arXiv 2505.02922): a wave index of clusters, some attended exactly, some estimated, the rest dropped."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.indexes.kmeans import cluster_sums, kmeans, nearest
from kvbench.strategies.selecting.static_set import StaticSetOptions
from kvbench.strategies.selecting.tiers import SelectingPolicy, padded_ids


class RetroInfer(SelectingPolicy):
    """Attends to the steady zone, to the tokens of the best clusters (retrieval zone) and to the next ones' summaries.

    Keys are centred and clustered by direction, in segments of the prompt, with a last assignment over all of them. A
    cluster keeps the mean of its keys, the mean of its values and its size s. Clusters are ranked by the sum over
    the group of softmax(q·Cᵀ/√d). The best are attended to exactly, as many whole ones as the budget has room for;
    the next share of them (estimation zone) each stand in as one row of weight s·exp(q·C/√d), which by Jensen's
    inequality never exceeds its tokens' own. Those rows are read from the index and are not counted as tokens.
    """

    name = "retroinfer"
    summary = "Clusters offloaded keys; attends to the best clusters exactly and to the next by their means."
    reference = (
        "Chen et al., RetroInfer: A Vector-Storage Approach for Scalable Long-Context LLM Inference, arXiv 2505.02922"
    )
    adaptive = True
    head_budgets = True
    offload = True
    query_window = 0

    class Options(StaticSetOptions):
        """Options of RetroInfer; sinks and window of the preset `small` are the paper's steady zone."""

        cluster_size: int = Field(16, ge=1, description="mean number of tokens in a cluster")
        segment: int = Field(8192, ge=1, description="tokens that are clustered together")
        rounds: int = Field(
            10, ge=1, le=10_000, description="k-means rounds, the last one over all segments' centroids"
        )
        estimated: float = Field(0.232, ge=0, le=1, description="share of the clusters in the estimation zone")
        update_every: int = Field(
            1024, ge=1,
            description="tokens that leave the window for new clusters at a time; at most a quarter of what the budget "
            "leaves beside the steady zone",
        )  # fmt: skip

    def moves(self, layer: Layer, beyond: int) -> bool:
        """Every `update_every` tokens, or sooner where the window would take too much of the budget."""
        every: int = self.options.update_every
        if not layer.budget.covers_all:
            every = min(every, max((layer.budget.tokens - sum(layer.static)) // 4, self.options.cluster_size))
        return beyond >= every

    def build(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Cluster the prompt."""
        layer.state["mean"] = keys.float().mean(2, keepdim=True)
        self._add_clusters(layer, keys, values)

    def grow(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Cluster the tokens that left the window, beside the clusters there are."""
        self._add_clusters(layer, keys, values)

    def _add_clusters(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        points = functional.normalize((keys.float() - layer.state["mean"]).flatten(0, 1), dim=-1)
        centroids = [
            kmeans(part, -(-part.shape[1] // self.options.cluster_size), self.options.rounds - 1, spherical=True)[0]
            for part in torch.split(points, self.options.segment, dim=1)
        ]
        assigned = nearest(points, torch.cat(centroids, dim=1))
        number = sum(part.shape[1] for part in centroids)
        sums, sizes = cluster_sums(keys.flatten(0, 1).float(), assigned, number)
        value_sums, _ = cluster_sums(values.flatten(0, 1).float(), assigned, number)
        new = {
            "keys": sums / sizes.clamp_min(1)[..., None], "values": value_sums / sizes.clamp_min(1)[..., None],
            "sizes": sizes, "assigned": assigned.to(torch.int32),
        }  # fmt: skip
        shape = (layer.rows, layer.kv_heads)
        new = {name: tensor.view(*shape, *tensor.shape[1:]) for name, tensor in new.items()}
        old = layer.state.get("wave")
        if old is not None:
            new["assigned"] += old["sizes"].shape[2]
            new = {name: torch.cat([old[name], tensor], dim=2) for name, tensor in new.items()}
        layer.state["wave"] = new
        layer.store.index_bytes = sum(tensor.nbytes for tensor in new.values())

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Rank the clusters; retrieve the tokens of the best and estimate the next."""
        wave, share = layer.state["wave"], layer.heads // layer.kv_heads
        clusters = wave["sizes"].shape[2]
        grouped = queries.float().reshape(layer.rows, layer.kv_heads, share, layer.head_dim)
        logits = grouped @ wave["keys"].transpose(-1, -2) * layer.scaling
        logits = logits.masked_fill(wave["sizes"][:, :, None] == 0, -torch.inf)
        order = logits.softmax(-1).sum(2).argsort(-1, descending=True)
        fits = wave["sizes"].gather(-1, order).cumsum(-1) <= self.room(layer, wanted, layer.kv_heads)
        retrieved = torch.zeros_like(fits).scatter(-1, order, fits)
        ids = padded_ids(retrieved.gather(-1, wave["assigned"].long()), layer.store.aside_start)
        ranks = fits.sum(-1, keepdim=True) + torch.arange(round(self.options.estimated * clusters), device=order.device)
        zone = order.gather(-1, ranks.clamp(max=clusters - 1))
        sizes = wave["sizes"].gather(-1, zone).masked_fill(ranks >= clusters, 0)
        rows = logits.gather(-1, zone[:, :, None].expand(-1, -1, share, -1)) + sizes.log()[:, :, None]
        values = wave["values"].gather(2, zone[..., None].expand(*zone.shape, wave["values"].shape[-1]))
        return Selection(ids, padded=True, summary=(rows.flatten(1, 2), values), evaluations=float(clusters))
