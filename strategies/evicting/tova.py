"""TOVA (arXiv 2401.06104): at every step, drop the token that the newest query attends to least."""

from torch import Tensor

from kvbench.contract.layer import Layer
from kvbench.strategies.evicting.eviction import AttentionEviction
from kvbench.strategies.evicting.snapkv import window_attention


class TOVA(AttentionEviction):
    """Keeps the tokens with the largest weights of the latest query, averaged over all heads: one set for a layer.

    Nothing but the newest token is protected, not even sinks.
    """

    name = "tova"
    summary = "Drops at every step the token with the smallest weight of the latest query, averaged over the heads."
    reference = "Oren et al., Transformers are Multi-State RNNs, arXiv 2401.06104"
    query_window = 1
    query_aware = "keeps what the prompt's last query attends to"

    def prompt_scores(self, layer: Layer, queries: Tensor, keys: Tensor) -> Tensor:
        """The weights of the prompt's last query, averaged over the heads."""
        weights = window_attention(queries, keys, layer.scaling).squeeze(2)
        return weights.mean(1, keepdim=True).expand(-1, layer.kv_heads, -1)

    def updated(self, layer: Layer, scores: Tensor, weights: Tensor) -> Tensor:
        """The step's weights, averaged over the heads; over a group's where each group has tokens of its own."""
        if layer.budget.heads is not None:
            return weights.mean(2)
        return weights.mean((1, 2)).unsqueeze(1).expand(-1, layer.kv_heads, -1)
