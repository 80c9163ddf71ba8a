"""RetroInfer (arXiv 2505.02922): a wave index of clusters, some attended exactly, some estimated, the rest dropped."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.indexes.kmeans import cluster_sums, kmeans, nearest
from kvbench.kernels.attention import Segment
from kvbench.kernels.score import scores
from kvbench.kernels.take import take_clusters
from kvbench.kernels.weights import group_weights
from kvbench.strategies.selecting.aside import AsideStep
from kvbench.strategies.selecting.clusters import Clusters
from kvbench.strategies.selecting.static_set import HOT, StaticSetOptions
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
    together = True
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
        hot: int = HOT

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
        new = self.clusters(keys, values, layer.state["mean"])
        old = layer.state.get("wave")
        if old is not None:
            new["assigned"] += old["sizes"].shape[2]
            new = {name: torch.cat([old[name], tensor], dim=2) for name, tensor in new.items()}
        layer.state["wave"] = new
        layer.store.index_bytes = sum(tensor.nbytes for tensor in new.values())

    def clusters(self, keys: Tensor, values: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """Cluster `keys` [B, G, n, d] and `values`: mean `keys`, `values`, `sizes`, and each token's in `assigned`."""
        points = keys.float().flatten(0, 1) - mean.flatten(0, 1)
        points /= points.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        segment = min(self.options.segment, points.shape[1])
        whole = points.shape[1] // segment * segment
        # all full segments of all heads at once, and the rest
        parts = points[:, :whole].reshape(-1, segment, points.shape[2]), points[:, whole:]
        centroids = [
            kmeans(part, self.number(part.shape[1]), self.options.rounds - 1, spherical=True)[0].view(
                len(points), -1, points.shape[2]
            )
            for part in parts
            if part.shape[1]
        ]
        assigned = nearest(points, torch.cat(centroids, dim=1))
        number = sum(part.shape[1] for part in centroids)
        sums, sizes = cluster_sums(keys.flatten(0, 1).float(), assigned, number)
        value_sums, _ = cluster_sums(values.flatten(0, 1).float(), assigned, number)
        new = {
            "keys": sums / sizes.clamp_min(1)[..., None], "values": value_sums / sizes.clamp_min(1)[..., None],
            "sizes": sizes, "assigned": assigned.to(torch.int32),
        }  # fmt: skip
        return {name: tensor.view(*keys.shape[:2], *tensor.shape[1:]) for name, tensor in new.items()}

    def number(self, tokens: int) -> int:
        """Clusters of so many tokens, segment by segment."""
        whole, rest = divmod(tokens, self.options.segment)
        size = self.options.cluster_size
        return int(whole * -(-self.options.segment // size) - (-rest // size))

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

    def choose_each(self, layer: Layer, queries: Tensor, wanted: Sequence[int]) -> Selection:
        """The same for several queries: each has rows for all clusters, of weight 0 outside its estimation zone."""
        wave, share, block = layer.state["wave"], layer.heads // layer.kv_heads, len(wanted)
        clusters, device = wave["sizes"].shape[2], queries.device
        grouped = queries.float().reshape(layer.rows, layer.kv_heads, share * block, layer.head_dim)
        logits = (grouped @ wave["keys"].transpose(-1, -2) * layer.scaling).unflatten(2, (share, block))
        logits = logits.masked_fill(wave["sizes"][:, :, None, None] == 0, -torch.inf)
        order = logits.softmax(-1).sum(2).argsort(-1, descending=True)  # [B, G, block, clusters]
        sizes = wave["sizes"][:, :, None].expand_as(order)
        room = torch.tensor(wanted, device=device)[:, None]
        fits = sizes.gather(-1, order).cumsum(-1) <= room
        retrieved = torch.zeros_like(fits).scatter(-1, order, fits)
        assigned = wave["assigned"].long()[:, :, None].expand(-1, -1, block, -1)
        ids = padded_ids(retrieved.gather(-1, assigned), layer.store.aside_start).repeat_interleave(share, dim=1)
        places = torch.arange(clusters, device=device)
        count, zone = fits.sum(-1, keepdim=True), round(self.options.estimated * clusters)
        estimated = torch.zeros_like(fits).scatter(-1, order, (places >= count) & (places < count + zone))
        rows = logits + sizes.log()[:, :, None]
        rows = rows.masked_fill(~estimated[:, :, None], -torch.inf).flatten(1, 2)
        return Selection(ids, padded=True, summary=(rows, wave["values"]), evaluations=float(clusters))

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep:
        """Ranking and estimation on the device; new clusters are made between the steps."""
        return _WaveStep(self, parts, clock)


class _WaveStep(AsideStep):
    per_head = False

    def __init__(self, policy: RetroInfer, parts: Sequence[Part], clock: Clock) -> None:
        waves, means = ([part.layer.state[name] for part in parts] for name in ("wave", "mean"))
        super().__init__(policy, parts, clock)
        device, groups = clock.positions.device, self.kv_heads
        self._policy, self._means = policy, means
        self._rows = [torch.arange(self.batch, device=device) if part.rows is None else part.rows.to(device)
                      for part in parts]  # fmt: skip
        self._counts = [int(wave["sizes"].shape[2]) for wave in waves]
        starts = [int(rows[0]) for rows in self._rows]
        self._periods = [int(self.start.period[row]) for row in starts]
        self._aside = [int(self.start.aside[row]) for row in starts]
        self._beyond = [int(clock.positions[row] - self.start.tokens[row]) for row in starts]
        most = max(
            count + (beyond + clock.new_tokens) // period * policy.number(period)
            for count, beyond, period in zip(self._counts, self._beyond, self._periods, strict=True)
        )
        shape, estimated = (self.batch, groups, most), policy.options.estimated
        self._clusters = Clusters(*shape, self.capacity, device)
        self._cluster_keys, self._cluster_values = (
            torch.zeros(*shape, waves[0][name].shape[3], device=device) for name in ("keys", "values")
        )
        self._number, self._zone = (torch.zeros(self.batch, dtype=torch.int32, device=device) for _ in range(2))
        self._most_estimated = max(round(estimated * most), 1)
        for place, (part, wave) in enumerate(zip(parts, waves, strict=True)):
            self._counts[place] = 0
            self._add(place, wave, 0)
            part.layer.state.clear()

    def _add(self, place: int, wave: dict[str, Tensor], token: int) -> None:
        rows, first, number = self._rows[place], self._counts[place], int(wave["sizes"].shape[2])
        self._clusters.add(rows, wave["sizes"], wave["assigned"], first, token)
        self._cluster_keys[rows, :, first : first + number] = wave["keys"]
        self._cluster_values[rows, :, first : first + number] = wave["values"]
        self._counts[place] = first + number
        self._number[rows] = first + number
        self._zone[rows] = round(self._policy.options.estimated * (first + number))

    def between(self, taken: int) -> None:
        """Cluster the tokens that leave the window at this step; the ring has them still."""
        for place, period in enumerate(self._periods):
            moved, rest = divmod(self._beyond[place] + taken, period)
            if rest or self._all:
                continue
            assert self._ring is not None
            first = self._aside[place] + (moved - 1) * period
            slots = torch.arange(first, first + period, device=self.keys.device) % self._ring + self.sinks
            rows = self._rows[place]
            keys, values = (held[:, :, slots][rows] for held in (self.keys, self.values))
            self._add(place, self._policy.clusters(keys, values, self._means[place]), first)

    def choose(self, queries: Tensor) -> Sequence[Segment]:
        """Whole clusters, the best first, and one row for each of the next."""
        held = self._clusters
        logits = scores(queries, self._cluster_keys, scaling=self.scaling)
        weights = group_weights(logits, self.kv_heads, "sum", sizes=held.sizes)
        tokens, zone, masses = take_clusters(
            weights.argsort(-1, descending=True), held.sizes, held.starts, held.members, self.window.left,
            self._zone, self._number, self.most, self._most_estimated,
        )  # fmt: skip
        return [
            Segment(self.aside_keys, self.aside_values, ids=tokens),
            Segment(self._cluster_keys, self._cluster_values, ids=zone, bias=masses),
        ]

    def index_bytes(self) -> int:
        """Means, sizes and members of the clusters."""
        return self._cluster_keys.nbytes + self._cluster_values.nbytes + self._clusters.nbytes

    def index_reads(self, share: float) -> dict[str, int]:
        """Sizes and mean keys of all clusters, and the mean values of the estimation zone."""
        used = float(self._number.float().mean()) / self._cluster_keys.shape[2]
        values = self._cluster_values.nbytes * used * self._policy.options.estimated
        return {"device": int((self._cluster_keys.nbytes + self._clusters.sizes.nbytes) * used + values), "host": 0}
