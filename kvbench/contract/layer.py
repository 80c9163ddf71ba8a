"""One attention layer as policies and probes see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvbench.contract.attention import Attention
from kvbench.contract.budget import LayerBudget
from kvbench.contract.selection import Pending, Selection
from kvbench.contract.storage import KVStore


class Rotation(Protocol):
    """The rotary embedding of one attention layer."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` [..., n, d] to `positions` [n]."""

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo `rotate`."""


@dataclass(frozen=True)
class PromptView:
    """A governed layer while its prompt passes, for one lane (`attend_prompt`).

    `ordinal`, `count` and `number` are as in `Layer`. `state` is the policy's: it lasts from chunk to chunk and becomes
    `layer.state` when the prompt ends.
    """

    ordinal: int
    count: int
    number: int
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    rows: int
    module: nn.Module
    state: dict[str, Any]


@dataclass
class Layer:
    """One attention layer, for one lane (rows of one length), as policies and probes see it.

    `ordinal` counts from 0 to `count` − 1 over the layers that the policy governs (sliding-window layers keep their own
    cache and are left out); `number` is the layer's place in the model. `state` belongs to the policy: whatever
    it keeps between steps lives here, never on the policy itself, since several lanes may be under way.
    """

    ordinal: int
    count: int
    number: int
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    rows: int
    store: KVStore
    budget: LayerBudget
    static: tuple[int, int]
    """Sinks and recent window, in tokens, that the policy always attends to (`KVCachePolicy.static_tokens`)."""
    prompt_tokens: int
    module: nn.Module
    softcap: float | None = None
    """Where the model caps its scores before the softmax: they become softcap · tanh(score / softcap)."""
    sink_logits: Tensor | None = None
    """Where the model has attention sinks without a value: their logits [H], which only the softmax's sum sees."""
    state: dict[str, Any] = field(default_factory=dict)
    prompt_queries: Tensor | None = None
    """During `prefill` only: the queries [B, H, m, d] that probes asked for (`Probe.query_window`)."""
    prompt_hidden: Tensor | None = None
    """During `prefill` only, with `KVCachePolicy.reads_hidden`: what `reduce_hidden` kept of each token [B, n, ...]."""
    exact_attention: Callable[[], Tensor] | None = None
    """Set for policies that keep everything: the model's own attention of this step, output [B, H, m, d]."""
    rotary: Rotation | None = None
    previous: Layer | None = None
    """The governed layer before this one, for the same rows."""
    ungoverned: int = 0
    """Full-attention layers of the model that the policy leaves exact (`KVCachePolicy.governs`, dense first layers)."""
    hidden: Tensor | None = None
    """With `KVCachePolicy.uses_hidden`: the input [B, 1, D] of this layer's attention at this decoding step."""
    hidden_before: Tensor | None = None
    """With `KVCachePolicy.uses_hidden`: the same of the full-attention layer before it, governed or not."""
    project: Callable[[Tensor], Tensor] | None = None
    """With `KVCachePolicy.uses_hidden`: see `queries_for`."""
    latest_queries: Tensor | None = None
    """With `Budget.compress_every`: a ring of the latest queries [B, H, w, d]; that of the i-th token after the prompt,
    counted from 0, lies at i mod w."""
    most_attended: Callable[[Layer], int | None] | None = None
    """What the policy declares: see `KVCachePolicy.most_attended`."""

    apart: bool = False
    """Whether the static set is attended to apart from what is selected (`KVCachePolicy.begin_select`)."""
    begun: Pending | None = None
    """The selection of this step that is under way."""
    selection: Selection | None = None
    """What the latest decoding step attended to beside the static set."""
    static_attention: Attention | None = None
    """The attention of this step's queries to the static set, where it came before the selection."""

    @property
    def tokens(self) -> int:
        """Tokens of the context so far, evicted ones included."""
        return self.store.tokens

    def capped(self, scores: Tensor) -> Tensor:
        """The scaled `scores` of queries and keys as the model's softmax takes them."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def queries_for(self, hidden: Tensor) -> Tensor:
        """The queries [B, H, 1, d], after rotation, that this layer would have for another `hidden` [B, 1, D].

        During a decoding step of a policy with `uses_hidden`; `layer.hidden_before` gives InfiniGen's prediction.
        """
        assert self.project is not None, "queries_for needs `uses_hidden = True` and a decoding step"
        return self.project(hidden)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply the model's rotary embedding to `x` [..., n, d] at `positions` [n]; a row's first token is at 0."""
        assert self.rotary is not None
        return self.rotary.rotate(x, positions)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo the model's rotary embedding: the queries or keys `x` [..., n, d] before their rotation."""
        assert self.rotary is not None
        return self.rotary.unrotate(x, positions)

    def keep_top(self, scores: Tensor, first: int = 0) -> None:
        """Evict all of the tokens from `first` on but those of the best `scores` [B, G, m], as the budget allows.

        The other tokens, before `first` and after the m scored ones, stay. Heads keep different numbers where the
        budget says so (`LayerBudget.heads`). Nothing is evicted where the budget covers the whole prompt.
        """
        if self.budget.covers_all:
            return
        batch, groups, scored = scores.shape
        top = self.budget.top(scores, self.tokens - scored)
        kept = torch.ones(batch, groups, self.tokens + 1, dtype=torch.bool, device=scores.device)
        kept[:, :, first : first + scored] = False
        kept.scatter_(2, torch.where(top < 0, self.tokens, top + first), True)
        self.store.keep(kept[:, :, : self.tokens])
