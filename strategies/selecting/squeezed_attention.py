"""SqueezedAttention (arXiv 2411.09688): attend to the clusters of keys whose centroids promise enough attention."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.indexes.kmeans import cluster_sums, kmeans
from kvbench.kernels.attention import Segment
from kvbench.kernels.score import scores
from kvbench.strategies.selecting.aside import AsideStep
from kvbench.strategies.selecting.clusters import Clusters
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
    grows = True
    head_budgets = True
    query_window = CALIBRATION
    query_aware = "its threshold is calibrated on the prompt's last queries"

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

    def leave(self, layer: Layer, beyond: int) -> bool:
        """Generated tokens stay in the window."""
        return False

    def period(self, layer: Layer, most: int) -> int:
        """No token leaves the window."""
        return most + 1

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

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep:
        """The clusters' estimates on the device."""
        return _ThresholdStep(self, parts, clock)


class _ThresholdStep(AsideStep):
    def __init__(self, policy: SqueezedAttention, parts: Sequence[Part], clock: Clock) -> None:
        states = [dict(part.layer.state) for part in parts]
        super().__init__(policy, parts, clock)
        device, most = clock.positions.device, max(int(state["sizes"].shape[2]) for state in states)
        # where heads have budgets of their own, none takes another's share
        self._joint = all(part.layer.budget.heads is None for part in parts)
        if self._joint:
            self.most = min(self.most * self.heads, self.capacity)
        shape = (self.batch, self.kv_heads, most)
        self._clusters = Clusters(*shape, self.capacity, device)
        self._centroids = torch.zeros(*shape, states[0]["centroids"].shape[3], device=device)
        self._threshold = torch.zeros(self.batch, 1, 1, device=device)
        for part, state in zip(parts, states, strict=True):
            rows = torch.arange(self.batch, device=device) if part.rows is None else part.rows.to(device)
            self._clusters.add(rows, state["sizes"], state["assigned"], 0, 0)
            self._centroids[rows, :, : state["sizes"].shape[2]] = state["centroids"]
            covered = part.layer.budget.covers_all
            self._threshold[rows, :, 0] = -torch.inf if covered else state["threshold"]
            part.layer.state.clear()
        share = self.heads // self.kv_heads
        self._sizes = self._clusters.sizes.repeat_interleave(share, dim=1)
        self._masses = self._sizes.log()

    def choose(self, queries: Tensor) -> Sequence[Segment]:
        """The clusters above the threshold, the best first, up to the budget of all heads, or each of its own."""
        logits = scores(queries, self._centroids, scaling=self.scaling)
        estimates = (logits - (logits + self._masses).logsumexp(-1, keepdim=True)).exp()
        sizes, left = self._sizes, self.window.left[..., None]
        if self._joint:
            estimates, sizes = estimates.view(self.batch, 1, -1), sizes.view(self.batch, 1, -1)
            left = left[:, :1] * self.heads
        order = estimates.sort(-1, descending=True)
        within = sizes.gather(-1, order.indices).cumsum(-1) <= left
        taken = torch.zeros_like(within).scatter_(-1, order.indices, within & (order.values >= self._threshold))
        ids = self._clusters.tokens(taken.view(logits.shape), self.most)
        return [Segment(self.aside_keys, self.aside_values, ids=ids)]

    def index_bytes(self) -> int:
        """Centroids, sizes and members of the clusters."""
        return self._centroids.nbytes + self._clusters.nbytes + self._sizes.nbytes + self._masses.nbytes

    def index_reads(self, share: float) -> dict[str, int]:
        """Centroids and sizes."""
        sizes = self._clusters.sizes
        return {"device": round((self._centroids.nbytes + sizes.nbytes) * float((sizes > 0).float().mean())), "host": 0}
