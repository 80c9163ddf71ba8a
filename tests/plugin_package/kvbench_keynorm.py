"""A KV-cache policy of a third party: keep the keys of smallest norm (Devoto et al., arXiv 2406.11430)."""

import torch
from pydantic import Field

import kvbench


class KeyNorm(kvbench.KVCachePolicy):
    """Keeps, per head, the recent window and the keys of smallest L2 norm."""

    name = "keynorm"
    summary = "Keeps the keys of smallest norm and the most recent tokens."
    reference = (
        "Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430"
    )
    query_window = 0  # this policy never looks at queries
    grows = True  # what is generated stays, beyond the budget

    class Options(kvbench.Options):
        """Options of the policy."""

        window: int = Field(16, ge=1, description="most recent tokens, always kept")

    def static_tokens(self, context):
        """The recent window."""
        return 0, self.options.window

    def prefill(self, layer, queries, keys, values):
        """Evict all but the budget."""
        if layer.budget.covers_all:
            return
        before = layer.tokens - self.options.window
        small = keys[:, :, :before].norm(dim=-1).topk(layer.budget.tokens - self.options.window, largest=False).indices
        recent = torch.arange(before, layer.tokens, device=keys.device).expand(*small.shape[:2], -1)
        layer.store.keep(torch.cat([small.sort().values, recent], dim=-1))


@kvbench.hookimpl
def kvbench_policies():
    """Register the policy."""
    return [KeyNorm]
