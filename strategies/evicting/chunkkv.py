"""ChunkKV (arXiv 2502.00299): keep whole chunks of neighbouring tokens, by what the prompt's last queries attend to."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kvbench.contract import extension
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.strategies.evicting.snapkv import WindowPolicy, held_votes, window_votes


class ChunkKV(WindowPolicy):
    """Keeps the chunks that the observation window attends to most, the same for all heads of a layer, and the window.

    A chunk's score is the mean, over its tokens and all query heads, of the window's weights; with `reuse` above 1
    the further layers of every `reuse` take the first one's scores. Where heads have budgets of their own each takes
    as many of the layer's best chunks as fit. Chunks stay whole: what is left of the budget beside them is not spent.
    """

    name = "chunkkv"
    summary = "Keeps whole chunks of tokens that the prompt's last queries attend to, and the last tokens."
    reference = (
        "Liu et al., ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference, "
        "arXiv 2502.00299"
    )
    query_aware = "keeps the chunks that the prompt's last queries attend to"
    grows = True
    head_budgets = True

    class Options(extension.Options):
        """Options of ChunkKV."""

        chunk_size: int = Field(10, ge=1, description="tokens in a chunk")
        window: int = Field(32, ge=1, description="observation window: last queries of the prompt, always kept")
        reuse: int = Field(1, ge=1, description="layers in a row that share the first one's chunk scores")

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Score the chunks before the window and keep the best ones that fit."""
        before, size = layer.tokens - queries.shape[2], self.options.chunk_size
        if layer.budget.covers_all or not before:
            return
        earlier = layer.previous if layer.ordinal % self.options.reuse else None
        if earlier is not None and "chunks" in earlier.state:
            scores = earlier.state["chunks"].to(keys.device)
        else:
            votes = window_votes(queries, keys, layer.scaling)[..., :before].sum(1)
            scores = _chunk_means(votes, torch.full_like(votes[:, :1], before), size)
        if self.options.reuse > 1:
            layer.state["chunks"] = scores
        spread_out = scores[:, None].expand(-1, layer.kv_heads, -1)
        chosen = layer.budget.top(spread_out, layer.tokens - before, unit=size)
        marks = torch.zeros(*chosen.shape[:2], scores.shape[1] + 1, dtype=torch.bool, device=keys.device)
        marks.scatter_(2, torch.where(chosen < 0, scores.shape[1], chosen), True)
        kept = marks[..., :-1].repeat_interleave(size, dim=2)[..., :before]
        layer.store.keep(functional.pad(kept, (0, layer.tokens - before), value=True))

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """Score chunks of what each head holds, by the latest queries; the last chunk kept may be cut by the budget."""
        newest = held.newest(self.options.window)
        votes = held_votes(held, layer.scaling)
        votes = votes.view(*held.keys.shape[:2], -1, votes.shape[2]).sum(2)
        old = held.real & ~newest
        means = _chunk_means(votes.masked_fill(~old, 0), old.sum(-1, keepdim=True), self.options.chunk_size)
        scores = means.repeat_interleave(self.options.chunk_size, dim=2)[..., : votes.shape[2]]
        return scores.masked_fill(newest, torch.inf)


def _chunk_means(votes: Tensor, counts: Tensor, size: int) -> Tensor:
    """Means [..., c] over chunks of `size` of the first `counts` [..., 1] of votes [..., t], which are 0 beyond."""
    chunks = -(-votes.shape[-1] // size)
    sums = functional.pad(votes, (0, chunks * size - votes.shape[-1])).view(*votes.shape[:-1], chunks, size).sum(-1)
    means: Tensor = sums / (counts - torch.arange(chunks, device=votes.device) * size).clamp(1, size)
    return means
