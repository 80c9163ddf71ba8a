"""What eviction policies share: keeping the best tokens of the prompt, and staying at the budget while decoding."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.contract.attend import attend
from kvbench.contract.attention import Attention
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.kernels.attention import decode
from kvbench.kernels.evict import attention_weights, replace_worst
from kvbench.kernels.steps import CompressingStep, GrowingStep, HeldStep


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
    reads_keys: ClassVar[bool] = False
    """True where `step_scores` reads the keys held, which costs a copy of them where heads hold different numbers."""

    def compression_window(self, every: int) -> int:
        """None: scores come from keys, or from the weights gathered so far."""
        return 0

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
    def step_scores(self, scores: Tensor, held: Tensor, real: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, G, t] of the tokens held now, and [B, G, 1] of the new one; the worst token is evicted.

        `scores` [B, G, t] are those of the step before, `held` [B, G, t, d] the keys, which `real`, bool [B, G, t],
        tells from padding, and `keys` [B, G, 1, d] the new key. Without `reads_keys` no keys held may be given.
        """

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep the best tokens of the prompt and the protected ones."""
        if self.evicts(layer):
            scores = self.prompt_scores(layer, queries, keys)
            spared = self._spared(layer, torch.arange(layer.tokens, device=scores.device))
            layer.keep_top(scores.masked_fill(spared, torch.inf))
            layer.state["scores"] = scores.gather(-1, layer.store.static_ids.clamp_min(0))

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Evict the worst token of each head, so that the tokens attended stay at the budget."""
        if layer.budget.every or not self.evicts(layer):
            return
        ids = layer.store.static_ids
        spared = (ids < 0) | self._spared(layer, ids)
        real = (ids[..., :-1] >= 0).expand(layer.rows, layer.kv_heads, -1)
        held = static_keys(layer)[:, :, :-1] if self.reads_keys else keys[:, :, :0]
        scores = torch.cat(self.step_scores(layer.state["scores"], held, real, keys), dim=-1)
        worst = scores.masked_fill(spared, torch.inf).argmin(-1, keepdim=True)
        layer.store.evict_slots(worst.squeeze(-1))
        layer.state["scores"] = scores.scatter(-1, worst, scores[..., -1:])[..., :-1]

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """Evictions in place; None where some rows of the layer evict and others don't."""
        if parts[0].layer.budget.every:
            return CompressingStep(self, parts, clock)
        evicting = {self.evicts(part.layer) for part in parts}
        if len(evicting) > 1:
            return None
        return EvictionStep(self, parts, clock) if evicting.pop() else GrowingStep(parts, clock)


class AttentionEviction(DecodingEviction):
    """Evicts by scores that the prompt's attention gives and that every step's weights change.

    A step's weights rule on the eviction that makes room for the next token, which is the papers' eviction at the end
    of a step; the budget counts the newest token.
    """

    running = ("scores",)

    @abstractmethod
    def updated(self, layer: Layer, scores: Tensor, weights: Tensor) -> Tensor:
        """New scores [B, G, t] from the old ones and a step's softmax weights [B, G, H/G, t]."""

    def step_scores(self, scores: Tensor, held: Tensor, real: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The scores so far; the newest token, whose weights are to come, has 0."""
        return scores, scores.new_zeros(*scores.shape[:2], 1)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Evict; or where what is held is compressed now and then, let the new token gather weights from 0 on."""
        if layer.budget.every:
            scores = layer.state["scores"]
            layer.state["scores"] = torch.cat([scores, scores.new_zeros(*scores.shape[:2], keys.shape[2])], dim=-1)
        else:
            super().insert(layer, keys, values)

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """The weights gathered so far; the protected tokens stay."""
        return held.running["scores"].masked_fill(held.newest(self.protected(layer)), torch.inf)

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """Evictions in place; where what is held is compressed now and then, the weights gather between."""
        if parts[0].layer.budget.every:
            return WeighingStep(self, parts, clock)
        return super().fixed_step(parts, clock)

    def attend(self, layer: Layer, queries: Tensor, selection: Selection) -> Attention:
        """Attend, and update the scores by the step's weights."""
        if not self.evicts(layer):
            return attend(layer, queries, selection)
        result = attend(layer, queries, selection, with_weights=True)
        assert result.weights is not None
        weights = result.weights.view(layer.rows, layer.kv_heads, -1, result.weights.shape[-1])
        layer.state["scores"] = self.updated(layer, layer.state["scores"], weights)
        return result


class WeighingStep(CompressingStep):
    """Compression between steps by scores that every step's weights change."""

    def __init__(self, policy: AttentionEviction, parts: Sequence[Part], clock: Clock) -> None:
        super().__init__(policy, parts, clock)
        self._weighs, self._layer = policy, parts[0].layer

    def attend(self, queries: Tensor) -> Tensor:
        """Attend, and update the scores by the step's weights."""
        held, scores = self.held, self.running["scores"]
        output, lse = decode(queries, held.keys, held.values, held.lengths, scaling=self.scaling, dtype=queries.dtype)
        weights = attention_weights(queries, held.keys, lse, held.lengths, self.scaling)
        grouped = weights.view(*held.keys.shape[:2], -1, weights.shape[-1])
        scores.copy_(self._weighs.updated(self._layer, scores, grouped))
        return output


class EvictionStep(HeldStep):
    """A step of `DecodingEviction` in fixed shapes: the new token takes the place of the worst one of its head."""

    def __init__(self, policy: DecodingEviction, parts: Sequence[Part], clock: Clock) -> None:
        self._policy, self._layer, self._positions = policy, parts[0].layer, clock.positions
        shape = (clock.batch, self._layer.kv_heads)
        self._protected = torch.zeros(shape, dtype=torch.int32, device=clock.positions.device)
        for part in parts:
            rows = slice(None) if part.rows is None else part.rows.to(self._protected.device)
            self._protected[rows] = torch.as_tensor(policy.protected(part.layer), dtype=torch.int32).to(
                self._protected.device
            )
        super().__init__(parts, clock, 0, ("scores",))
        self._scores = self.held.also["scores"].float().contiguous()
        self._real = self.held.ids >= 0
        # what stands beyond a head's tokens is never the worst
        self.held.ids = self.held.ids.masked_fill(~self._real, torch.iinfo(torch.int32).max)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Evict the worst token, put the new one in its place and attend."""
        held, policy = self.held, self._policy
        scores, new = policy.step_scores(self._scores, held.keys, self._real, keys)
        if scores is not self._scores:
            self._scores.copy_(scores)
        replace_worst(
            self._scores, new, held.ids, self._positions, self._protected, held.keys, held.values, keys, values
        )
        output, lse = decode(queries, held.keys, held.values, held.lengths, scaling=self.scaling, dtype=queries.dtype)
        if isinstance(policy, AttentionEviction):
            weights = attention_weights(queries, held.keys, lse, held.lengths, self.scaling)
            grouped = weights.view(*held.keys.shape[:2], -1, weights.shape[-1])
            self._scores.copy_(policy.updated(self._layer, self._scores, grouped))
        return output

    def changed(self) -> Sequence[Tensor]:
        """Tokens, ids and scores."""
        return [self.held.keys, self.held.values, self.held.ids, self._scores]
