"""SnapKV (arXiv 2404.14469): keep what the prompt's last queries attend to."""

from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn import functional

from kvbench.contract.extension import Options
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy


def window_attention(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Softmax weights, float32 [B, H, w, n], of the prompt's last w queries [B, H, w, d] over its keys [B, G, n, d]."""
    batch, heads, window, dim = queries.shape
    groups, tokens = keys.shape[1], keys.shape[2]
    grouped = queries.reshape(batch, groups, heads // groups * window, dim)
    logits = (grouped @ keys.transpose(-1, -2)).float().view(batch, heads, window, tokens).mul_(scaling)
    future = torch.ones(window, tokens, dtype=torch.bool, device=keys.device).triu(tokens - window + 1)
    return logits.masked_fill_(future, -torch.inf).softmax(-1)


def window_votes(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Sums [B, H, n] of `window_attention` over the window, one key/value head after the other to spare memory."""
    heads = queries.chunk(keys.shape[1], dim=1)
    return torch.cat(
        [window_attention(own, keys[:, group : group + 1], scaling).sum(2) for group, own in enumerate(heads)], dim=1
    )


def held_votes(held: HeldTokens, scaling: float) -> Tensor:
    """Sums [B, H, t] of the latest queries' weights, float32, over what is held."""
    queries, groups = held.queries, held.keys.shape[1]
    grouped = queries.reshape(queries.shape[0], groups, -1, queries.shape[3])
    logits = (grouped @ held.keys.transpose(-1, -2)).float().mul_(scaling)
    later = held.later.repeat(1, 1, queries.shape[1] // groups, 1)
    return logits.masked_fill_(later, -torch.inf).softmax(-1).view(*queries.shape[:3], -1).sum(2)


def pooled(votes: Tensor, kv_heads: int, kernel: int, pooling: Literal["avg", "max"]) -> Tensor:
    """Pool votes [B, H, n] over `kernel` neighbouring tokens, then average each key/value head's queries: [B, G, n]."""
    pool = functional.avg_pool1d if pooling == "avg" else functional.max_pool1d
    wide = pool(votes, kernel, stride=1, padding=kernel // 2)[..., : votes.shape[2]]
    return wide.view(votes.shape[0], kv_heads, -1, votes.shape[2]).mean(2)


def prompt_scores(layer: Layer, queries: Tensor, keys: Tensor, options: Any) -> Tensor:
    """SnapKV's scores [B, G, n − w] of the tokens before the prompt's last w queries, by its `kernel` and `pooling`."""
    votes = window_votes(queries, keys, layer.scaling)[..., : layer.tokens - queries.shape[2]]
    return pooled(votes, layer.kv_heads, options.kernel, options.pooling)


def held_scores(held: HeldTokens, scaling: float, options: Any) -> tuple[Tensor, Tensor]:
    """The same scores [B, G, t] of what is held, by the latest queries, and marks of the newest `window` tokens."""
    votes, newest = held_votes(held, scaling), held.newest(options.window)
    groups = held.keys.shape[1]
    # the window has no part in the pooling, as where the prompt is scored
    before = votes.masked_fill(newest.repeat_interleave(votes.shape[1] // groups, dim=1), 0)
    return pooled(before, groups, options.kernel, options.pooling), newest


class WindowPolicy(KVCachePolicy):
    """A policy that looks at the prompt's last queries, `window` of its options, and always keeps their tokens."""

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        self.query_window = self.options.window

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The observation window."""
        return 0, self.options.window


class SnapKV(WindowPolicy):
    """Keeps, per key/value head, the tokens that the observation window attends to most, and that window."""

    name = "snapkv"
    summary = "Keeps what the prompt's last queries attend to most, per head, and the last tokens; evicts the rest."
    grows = True
    query_aware = "keeps what the prompt's last queries attend to"
    head_budgets = True
    reference = "Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469"

    class Options(Options):
        """Options of SnapKV; its LongBench setting is window=8, kernel=7, pooling=max."""

        window: int = Field(64, ge=1, description="observation window: last queries of the prompt, always kept")
        kernel: int = Field(5, ge=1, description="width of the pooling over neighbouring tokens; odd")
        pooling: Literal["avg", "max"] = Field("avg", description="how neighbouring scores are pooled")

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Vote with the observation window's attention, pool, and keep the top of the budget."""
        if not layer.budget.covers_all:
            layer.keep_top(prompt_scores(layer, queries, keys, self.options))

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """Vote with the latest queries as with the prompt's; the window stays."""
        scores, newest = held_scores(held, layer.scaling, self.options)
        return scores.masked_fill(newest, torch.inf)
