"""PQCache (arXiv 2407.12820): find the best keys by product-quantised codes."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.indexes.kmeans import kmeans, nearest
from kvbench.kernels.pq import pq_encode, pq_scores
from kvbench.kernels.weights import group_weights
from kvbench.strategies.selecting.aside import TopStep
from kvbench.strategies.selecting.static_set import HOT, StaticSetOptions
from kvbench.strategies.selecting.tiers import SelectingPolicy


class PQCache(SelectingPolicy):
    """Offloads keys and values, keeps codes of the keys, and fetches the tokens whose codes score best.

    Codes are the nearest of 2^bits centroids in each sub-space, learned by k-means from the prompt's keys, per
    key/value head. The approximate scores go through softmax per query head and are summed over the group, so that a
    group fetches one set of tokens. Tokens that leave the window are coded by the same centroids.
    """

    name = "pqcache"
    summary = "Top-k over offloaded keys by product-quantised codes, one set for each key/value head."
    reference = (
        "Zhang et al., PQCache: Product Quantization-based KVCache for Long Context LLM Inference, arXiv 2407.12820"
    )
    together = True
    head_budgets = True
    offload = True
    query_window = 0

    class Options(StaticSetOptions):
        """Options of PQCache; the paper's other setting is subspaces=4, bits=8."""

        subspaces: int = Field(2, ge=1, description="m: parts that a key is cut into")
        bits: int = Field(6, ge=1, le=8, description="b: bits of a part's code")
        rounds: int = Field(10, ge=1, le=10_000, description="k-means rounds")
        hot: int = HOT

    def build(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Learn the centroids [B·G·m, 2^b, d/m] and code the keys."""
        m = self.options.subspaces
        if layer.head_dim % m:
            raise KVBenchError(f"subspaces={m} does not divide the key dimension {layer.head_dim} of policy 'pqcache'.")
        parts = self._parts(keys)
        layer.state["centroids"], codes = kmeans(parts, min(2**self.options.bits, parts.shape[1]), self.options.rounds)
        layer.state["codes"] = codes.to(torch.uint8)
        self._count_bytes(layer)

    def grow(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Code further keys."""
        codes = nearest(self._parts(keys).float(), layer.state["centroids"]).to(torch.uint8)
        layer.state["codes"] = torch.cat([layer.state["codes"], codes], dim=1)
        self._count_bytes(layer)

    def _parts(self, keys: Tensor) -> Tensor:
        """Keys [B, G, n, d] by sub-space, [B·G·m, n, d/m]."""
        parts = keys.reshape(*keys.shape[:3], int(self.options.subspaces), -1)
        return parts.transpose(2, 3).flatten(0, 2)

    def _count_bytes(self, layer: Layer) -> None:
        layer.store.index_bytes = layer.state["codes"].nbytes + layer.state["centroids"].nbytes

    def choose(self, layer: Layer, queries: Tensor, wanted: int) -> Selection:
        """Add up the centroids' scores by code (ADC), softmax per query head, sum over the group, take the top."""
        weights = self._logits(layer, queries).softmax(2).sum(-1)
        best = _best(weights, wanted)
        return Selection(best + layer.store.aside_start, evaluations=float(weights.shape[2]))

    def choose_each(self, layer: Layer, queries: Tensor, wanted: Sequence[int]) -> Selection:
        """The same for several queries, whose scores are added up together."""
        block, share = len(wanted), layer.heads // layer.kv_heads
        logits = self._logits(layer, queries).reshape(layer.rows, layer.kv_heads, -1, share, block)
        weights = logits.softmax(2).sum(3).transpose(2, 3)  # [B, G, block, n]
        ids = torch.full((*weights.shape[:3], wanted[0]), -1, device=weights.device)
        for place, count in enumerate(wanted):
            ids[:, :, place, :count] = _best(weights[:, :, place], count) + layer.store.aside_start
        return Selection(ids.repeat_interleave(share, dim=1), padded=True)

    def _logits(self, layer: Layer, queries: Tensor) -> Tensor:
        """Approximate scaled scores of `queries` [B, H, q, d], [B, G, n, H/G · q]."""
        rows, groups, m = layer.rows, layer.kv_heads, self.options.subspaces
        centroids, codes = layer.state["centroids"], layer.state["codes"]
        parts = queries.reshape(rows, groups, -1, m, layer.head_dim // m).transpose(2, 3).flatten(0, 2).float()
        table = (centroids @ parts.transpose(1, 2)) * layer.scaling  # [B·G·m, 2^b, H/G · q]
        first = torch.arange(len(table), dtype=torch.int32, device=table.device)[:, None] * table.shape[1]
        entries = (codes.int() + first).view(rows * groups, m, -1).transpose(1, 2)
        logits = functional.embedding_bag(entries.flatten(0, 1), table.flatten(0, 1), mode="sum")
        return logits.view(rows, groups, -1, table.shape[2])

    def aside_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep:
        """Look-ups of codes on the device; the keys and values stay on the host."""
        return _PQStep(self, parts, clock)


def _best(weights: Tensor, count: int) -> Tensor:
    """Places of the largest `weights` [B, G, n], [B, G, count]."""
    if weights.is_cuda:  # of tokens with equal codes the first, as in a fixed step; a sort is no slower there
        return weights.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return weights.topk(count, dim=-1).indices


class _PQStep(TopStep):
    per_head = False

    def __init__(self, policy: PQCache, parts: Sequence[Part], clock: Clock) -> None:
        states = [part.layer.state for part in parts]
        super().__init__(policy, parts, clock)
        groups, m, device = self.kv_heads, int(policy.options.subspaces), clock.positions.device
        known, sub = max(state["centroids"].shape[1] for state in states), states[0]["centroids"].shape[2]
        self._centroids = torch.zeros(self.batch, groups, m, known, sub, device=device)
        # half of a centroid's squared length: beyond all where a row has fewer centroids
        self._offset = torch.full((self.batch * groups * m, 1, known), torch.inf, device=device)
        self._codes = torch.zeros(self.batch, groups, m, self.capacity, dtype=torch.uint8, device=device)
        for part, state in zip(parts, states, strict=True):
            rows = torch.arange(self.batch, device=device) if part.rows is None else part.rows.to(device)
            centroids, codes = (state[name].view(len(rows), groups, m, *state[name].shape[1:])
                                for name in ("centroids", "codes"))  # fmt: skip
            self._centroids[rows, :, :, : centroids.shape[3]] = centroids
            self._codes[rows, :, :, : codes.shape[3]] = codes
            lengths = centroids.square().sum(-1) / 2
            self._offset.view(self.batch, groups, m, known)[rows, :, :, : centroids.shape[3]] = lengths
            state.clear()
        # tokens of the window are coded as they come, with those that will be set aside
        self._code(clock, parts)

    def _code(self, clock: Clock, parts: Sequence[Part]) -> None:
        """Code the tokens of the window, which the prompt left there."""
        for part in parts:
            rows = torch.arange(self.batch) if part.rows is None else part.rows.cpu()
            for row in rows.tolist():
                first, stop = int(self.start.aside[row]), part.layer.tokens - self.sinks
                window = self.aside_keys[row : row + 1, :, first:stop].to(self._codes.device)
                flat = self._centroids[row].flatten(0, 1)
                self._codes[row, :, :, first:stop] = self._nearest(window, flat, self._row_offset(row)).view(
                    self.kv_heads, -1, stop - first
                )

    def _row_offset(self, row: int) -> Tensor:
        share = self._offset.shape[0] // self.batch
        return self._offset[row * share : (row + 1) * share]

    def _nearest(self, keys: Tensor, centroids: Tensor, offset: Tensor) -> Tensor:
        """Codes uint8 [b·G·m, n] of keys [b, G, n, d]."""
        m = self._centroids.shape[2]
        points = keys.reshape(*keys.shape[:3], m, -1).transpose(2, 3).flatten(0, 2).float()
        return torch.baddbmm(offset, points, centroids.transpose(1, 2), beta=-1).argmax(-1).to(torch.uint8)

    def observe(self, keys: Tensor, values: Tensor) -> None:
        """Code the token; it is looked at once it is set aside."""
        halves = self._offset.view(self._centroids.shape[:4])
        pq_encode(keys, self._centroids, halves, self._codes, self._clock.positions, self.sinks)

    def scores(self, queries: Tensor) -> Tensor:
        """Each query head's softmax over all tokens, summed over the group."""
        logits = pq_scores(queries, self._centroids, self._codes, self.window.aside, scaling=self.scaling)
        return group_weights(logits, self.kv_heads, "sum", self.window.aside)

    def index_bytes(self) -> int:
        """Codes and centroids."""
        return self._codes.nbytes + self._centroids.nbytes

    def index_reads(self, share: float) -> dict[str, int]:
        """All codes and centroids."""
        return {"device": int(self._codes.nbytes * share) + self._centroids.nbytes, "host": 0}
