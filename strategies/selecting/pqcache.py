"""PQCache (arXiv 2407.12820): find the best keys by product-quantised codes."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.selection import Selection
from kvbench.indexes.kmeans import kmeans, nearest
from kvbench.strategies.selecting.static_set import StaticSetOptions
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
    head_budgets = True
    offload = True
    query_window = 0

    class Options(StaticSetOptions):
        """Options of PQCache; the paper's other setting is subspaces=4, bits=8."""

        subspaces: int = Field(2, ge=1, description="m: parts that a key is cut into")
        bits: int = Field(6, ge=1, le=8, description="b: bits of a part's code")
        rounds: int = Field(10, ge=1, le=10_000, description="k-means rounds")

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
        rows, groups, m = layer.rows, layer.kv_heads, self.options.subspaces
        share, centroids, codes = layer.heads // groups, layer.state["centroids"], layer.state["codes"]
        parts = queries.reshape(rows, groups, share, m, -1).transpose(2, 3).flatten(0, 2).float()
        table = (centroids @ parts.transpose(1, 2)) * layer.scaling  # [B·G·m, 2^b, H/G]
        first = torch.arange(len(table), dtype=torch.int32, device=table.device)[:, None] * table.shape[1]
        entries = (codes.int() + first).view(rows * groups, m, -1).transpose(1, 2)
        logits = functional.embedding_bag(entries.flatten(0, 1), table.flatten(0, 1), mode="sum")
        weights = logits.view(rows, groups, -1, share).softmax(2).sum(-1)
        best = weights.topk(wanted, dim=-1).indices
        return Selection(best + layer.store.aside_start, evaluations=float(weights.shape[2]))
