"""Quest (arXiv 2406.10774): select pages of keys by an upper bound of their scores."""

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection


class Quest(KVCachePolicy):
    """Selects, per query head, the pages whose channel-wise minima and maxima allow the highest score.

    The page that is being filled is always attended. The paper leaves layers 0 and 1 dense and outside its budget;
    with `dense_layers=2` they are dense here too, and the results' density counts them.
    """

    name = "quest"
    summary = "Selects pages of 16 tokens at each step, by the bounds of their keys; keeps everything on the device."
    reference = "Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774"
    head_budgets = True
    query_window = 0

    class Options(Options):
        """Options of Quest."""

        page_size: int = Field(16, ge=1, description="tokens in a page")
        dense_layers: int = Field(0, ge=0, description="first layers that attend to everything, beyond the budget")

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The page that is being filled."""
        return 0, self.options.page_size

    def most_attended(self, layer: Layer) -> int | None:
        """No limit in dense layers."""
        return None if layer.index < self.options.dense_layers else super().most_attended(layer)

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Set the full pages aside, on the device, and note the bounds of their keys."""
        size = self.options.page_size
        full = (layer.tokens - 1) // size * size
        if layer.index < self.options.dense_layers or full == 0:
            return
        layer.store.set_aside(0, full, offload=False)
        self._note_pages(layer, keys[:, :, :full])

    def _note_pages(self, layer: Layer, keys: Tensor) -> None:
        low, high = keys.reshape(*keys.shape[:2], -1, self.options.page_size, keys.shape[3]).aminmax(dim=3)
        if "low" in layer.state:
            low, high = torch.cat([layer.state["low"], low], dim=2), torch.cat([layer.state["high"], high], dim=2)
        layer.state["low"], layer.state["high"] = low, high
        layer.store.index_bytes = low.nbytes + high.nbytes

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Close the current page once it is full and a further token has come."""
        if "low" in layer.state and layer.store.static_tokens > self.options.page_size:
            self._note_pages(layer, layer.store.advance(self.options.page_size)[0])

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Take the best pages of each query head by Σ_c max(q_c·min_c, q_c·max_c)."""
        if "low" not in layer.state:
            return Selection()
        size, low, high = self.options.page_size, layer.state["low"], layer.state["high"]
        grouped = queries.reshape(layer.rows, layer.kv_heads, -1, layer.head_dim)
        bounds = grouped.clamp_min(0) @ high.transpose(-1, -2) + grouped.clamp_max(0) @ low.transpose(-1, -2)
        pages = low.shape[2]
        best = budget.top(bounds.view(layer.rows, layer.heads, pages), layer.store.static_tokens, unit=size)
        ids = best[..., None] * size + torch.arange(size, device=best.device)
        ids = ids.masked_fill(best[..., None] < 0, -1).flatten(-2)
        return Selection(ids, padded=budget.heads is not None, evaluations=float(pages))
