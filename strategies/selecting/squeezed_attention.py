"""SqueezedAttention (arXiv 2411.09688): attend to the clusters of keys whose centroids promise enough attention."""

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.indexes.kmeans import cluster_sums, kmeans
from kvbench.strategies.selecting.tiers import SelectingPolicy, padded_ids

CALIBRATION = 64
"""Last queries of the prompt by which the threshold is calibrated."""


class SqueezedAttention(SelectingPolicy):
    """Attends, per query head, to the tokens of the clusters whose estimated weight exceeds a threshold.

    The prompt's keys are clustered by direction (k-means on L2-normalised keys); a centroid is the mean of its keys.
    The weight of a cluster's average token is exp(q·C_i/√d) / Σ_j N_j exp(q·C_j/√d). One threshold for the layer is
    calibrated so that the prompt's last queries take, on average over heads, what the budget leaves; where a step's
    queries would take more, only their best clusters up to the budget are attended to. Heads share the layer's
    budget, so one may attend to more than its mean, unless the budget gives each its own. Generated tokens stay
    attended, as the user's input does in the paper.
    """

    name = "squeezed_attention"
    summary = (
        "Attends to clusters of keys whose centroid exceeds a calibrated threshold; keeps everything on the device."
    )
    reference = "Hooper et al., Squeezed Attention: Accelerating Long Context Length LLM Inference, arXiv 2411.09688"
    adaptive = True
    grows = True
    head_budgets = True
    query_window = CALIBRATION

    class Options(Options):
        """Options of SqueezedAttention."""

        clusters: float = Field(0.05, gt=0, le=1, description="number of clusters, as a share of the clustered tokens")
        window: int | None = Field(
            None, ge=1, description="last tokens of the prompt, always attended; 100, but at most 2.5% of the prompt"
        )
        rounds: int = Field(10, ge=1, le=10_000, description="k-means rounds")

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The prompt's last tokens."""
        return 0, self.options.window or min(100, max(context // 40, 1))

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Generated tokens stay in the window."""

    def build(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Cluster the keys and calibrate the threshold by the prompt's last queries."""
        points = keys.flatten(0, 1).float()
        number = max(round(self.options.clusters * points.shape[1]), 1)
        _, assigned = kmeans(points, number, self.options.rounds, spherical=True)
        sums, sizes = cluster_sums(points, assigned, number)
        shape = (layer.rows, layer.kv_heads)
        layer.state["centroids"] = (sums / sizes.clamp_min(1)[..., None]).view(*shape, number, -1)
        layer.state["sizes"] = sizes.view(*shape, number)
        layer.state["assigned"] = assigned.to(torch.int32).view(*shape, -1)
        layer.store.index_bytes = sum(layer.state[name].nbytes for name in ("centroids", "sizes", "assigned"))
        room = self.room(layer, layer.budget.beside(layer.static[1], points.shape[1]), layer.heads)
        wanted = room * layer.heads if isinstance(room, int) else room.sum(1)
        estimates, sizes = self._estimates(layer, queries)
        order = estimates.sort(-1, descending=True)
        within = sizes.gather(-1, order.indices).cumsum(-1) <= wanted * queries.shape[2]
        layer.state["threshold"] = torch.where(within, order.values, torch.inf).amin(-1, keepdim=True)

    def _estimates(self, layer: Layer, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of an average token of each cluster and the clusters' sizes, [B, H·m·c], for queries [B, H, m, d]."""
        centroids, sizes = layer.state["centroids"], layer.state["sizes"][:, :, None]
        grouped = queries.float().reshape(layer.rows, layer.kv_heads, -1, layer.head_dim)
        logits = grouped @ centroids.transpose(-1, -2) * layer.scaling
        estimates = (logits - (logits + sizes.log()).logsumexp(-1, keepdim=True)).exp()
        return estimates.flatten(1), sizes.expand_as(logits).flatten(1)

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Take the clusters above the threshold, the best first, up to the budget of all heads, or each of its own."""
        room = self.room(layer, wanted, layer.heads)
        shape = (layer.rows, 1 if isinstance(room, int) else layer.heads, -1)
        estimates, sizes = (part.view(shape) for part in self._estimates(layer, queries))
        order = estimates.sort(-1, descending=True)
        within = sizes.gather(-1, order.indices).cumsum(-1) <= (wanted * layer.heads if isinstance(room, int) else room)
        above = order.values >= layer.state["threshold"][..., None]
        taken = torch.zeros_like(within).scatter(-1, order.indices, within & above)
        grouped = taken.view(layer.rows, layer.kv_heads, layer.heads // layer.kv_heads, -1)
        assigned = layer.state["assigned"].long()[:, :, None].expand(-1, -1, grouped.shape[2], -1)
        ids = padded_ids(grouped.gather(-1, assigned).flatten(1, 2), layer.store.aside_start)
        return Selection(ids, padded=True, evaluations=float(layer.state["centroids"].shape[2]))
