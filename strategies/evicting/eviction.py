"""What eviction policies share: keeping the best tokens of the prompt, and staying at the budget while decoding."""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.contract.attend import attend
from kvbench.contract.attention import Attention
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection


def static_keys(layer: Layer) -> Tensor:
    """Keys [B, G, t, d] of the static tokens in slot order; anything where `static_ids` is −1."""
    parts = [keys for keys, _, _ in layer.store.static_parts()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class DecodingEviction(KVCachePolicy):
    """Evicts at the prompt's end and at every step: each new token drives out the worst-scored token of each head.

    Scores live in `layer.state["scores"]`, [B, G, t] in the store's slot order.
    """

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The newest token."""
        return 0, 1

    head_budgets = True

    def protected(self, layer: Layer) -> int | Tensor:
        """How many of the most recent tokens are never evicted, the newest one included; per head [B, G] or for all."""
        return layer.static[1]

    def _spared(self, layer: Layer, ids: Tensor) -> Tensor:
        """Which of the tokens `ids` [t] or [B, G, t] are never evicted."""
        protected = self.protected(layer)
        return ids >= layer.tokens - (protected if isinstance(protected, int) else protected[..., None])

    def evicts(self, layer: Layer) -> bool:
        """Whether the layer evicts anything."""
        return not layer.budget.covers_all

    @abstractmethod
    def prompt_scores(self, layer: Layer, queries: Tensor, keys: Tensor) -> Tensor:
        """Scores [B, G, n] of the prompt's tokens; the best are kept."""

    @abstractmethod
    def step_scores(self, layer: Layer, keys: Tensor) -> Tensor:
        """Scores [B, G, t] of all tokens held, with the new one, `keys` [B, G, 1, d], last; the worst is evicted."""

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep the best tokens of the prompt and the protected ones."""
        if self.evicts(layer):
            scores = self.prompt_scores(layer, queries, keys)
            spared = self._spared(layer, torch.arange(layer.tokens, device=scores.device))
            layer.keep_top(scores.masked_fill(spared, torch.inf))
            layer.state["scores"] = scores.gather(-1, layer.store.static_ids.clamp_min(0))

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Evict the worst token of each head, so that the tokens attended stay at the budget."""
        if not self.evicts(layer):
            return
        ids = layer.store.static_ids
        spared = (ids < 0) | self._spared(layer, ids)
        scores = self.step_scores(layer, keys)
        worst = scores.masked_fill(spared, torch.inf).argmin(-1, keepdim=True)
        layer.store.evict_slots(worst.squeeze(-1))
        layer.state["scores"] = scores.scatter(-1, worst, scores[..., -1:])[..., :-1]


class AttentionEviction(DecodingEviction):
    """Evicts by scores that the prompt's attention gives and that every step's weights change.

    A step's weights rule on the eviction that makes room for the next token, which is the papers' eviction at the end
    of a step; the budget counts the newest token.
    """

    @abstractmethod
    def updated(self, layer: Layer, scores: Tensor, weights: Tensor) -> Tensor:
        """New scores [B, G, t] from the old ones and a step's softmax weights [B, G, H/G, t]."""

    def step_scores(self, layer: Layer, keys: Tensor) -> Tensor:
        """The scores so far; the newest token, whose weights are to come, has 0."""
        return functional.pad(layer.state["scores"], (0, 1))

    def attend(self, layer: Layer, queries: Tensor, selection: Selection) -> Attention:
        """Attend, and update the scores by the step's weights."""
        if not self.evicts(layer):
            return attend(layer, queries, selection)
        result = attend(layer, queries, selection, with_weights=True)
        assert result.weights is not None
        weights = result.weights.view(layer.rows, layer.kv_heads, -1, result.weights.shape[-1])
        layer.state["scores"] = self.updated(layer, layer.state["scores"], weights)
        return result
