"""R-KV (arXiv 2505.24133): keep what the latest queries attend to, less what is redundant, for reasoning models."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kvbench.contract import extension
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.strategies.evicting.snapkv import WindowPolicy


def redundancy(keys: Tensor, real: Tensor, threshold: float) -> Tensor:
    """How alike each key of [B, G, t, d] is to the others, softmaxed over the `real` ones, bool [B, G, t]: [B, G, t].

    The mean cosine with all keys; of the keys that exceed `threshold` with a key, the latest one's cosine is left out.
    """
    directions = functional.normalize(keys.float(), dim=-1) * real[..., None]
    slots = torch.arange(keys.shape[2], dtype=torch.int32, device=keys.device)
    # as many keys at a time as have no more cosines than all keys have bytes
    rows = max(keys.shape[3] * keys.element_size() // 4, 1)
    total = torch.zeros(keys.shape[:3], device=keys.device)
    for start in range(0, keys.shape[2], rows):
        alike = directions[:, :, start : start + rows] @ directions.transpose(-1, -2)
        alike.masked_fill_(slots == slots[start : start + rows, None], 0)
        latest = torch.where(alike > threshold, slots, -1).amax(-1, keepdim=True)
        total += alike.masked_fill_((slots == latest) & (latest >= 0), 0).sum(2)
    mean = total / real.sum(-1, keepdim=True).clamp_min(1)
    return mean.masked_fill(~real, -torch.inf).softmax(-1)


class RKV(WindowPolicy):
    """Keeps, per key/value head, the best of λ · importance − (1 − λ) · redundancy, and the latest tokens.

    Importance is the softmax, over all tokens before the window, of the window's queries, of which a group counts the
    largest logit, averaged over the window and max-pooled. The paper's mode is `--compress-every 128`: what is held,
    prompt and answer, is cut down to the budget every 128 tokens; without it the answer is kept.
    """

    name = "r_kv"
    summary = "Keeps what the latest queries attend to less what is redundant; made for compressing long answers."
    reference = "Cai et al., R-KV: Redundancy-aware KV Cache Compression for Reasoning Models, arXiv 2505.24133"
    query_aware = "keeps what the prompt's last queries attend to, less what is redundant"
    grows = True
    head_budgets = True

    class Options(extension.Options):
        """Options of R-KV; defaults are those of the authors' code."""

        window: int = Field(8, ge=1, description="latest queries, whose tokens are always kept")
        kernel: int = Field(7, ge=1, description="width of the max-pooling over neighbouring tokens; odd")
        mix: float = Field(0.07, ge=0, le=1, description="λ: weight of importance; 1 − λ is that of redundancy")
        threshold: float = Field(0.5, ge=-1, le=1, description="cosine beyond which keys count as similar")

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Score the prompt's tokens before the window."""
        if layer.budget.covers_all:
            return
        before = layer.tokens - queries.shape[2]
        real = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
        old = real & (torch.arange(layer.tokens, device=keys.device) < before)
        layer.keep_top(self._scores(layer.scaling, queries, keys, real, old)[..., :before])

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """Score what is held before the window; the window stays."""
        newest = held.newest(self.options.window)
        scores = self._scores(layer.scaling, held.queries, held.keys, held.real, held.real & ~newest)
        return scores.masked_fill(newest, torch.inf)

    def _scores(self, scaling: float, queries: Tensor, keys: Tensor, real: Tensor, old: Tensor) -> Tensor:
        """Scores [B, G, t] of the `old` tokens among the `real` ones, bool [B, G, t]."""
        grouped = queries.view(queries.shape[0], keys.shape[1], -1, *queries.shape[2:])
        logits = (grouped @ keys[:, :, None].transpose(-1, -2)).float().mul_(scaling).amax(2)
        # where nothing is old there is nothing to choose either
        weights = logits.masked_fill(~old[:, :, None], torch.finfo(logits.dtype).min).softmax(-1).mean(2)
        important = functional.max_pool1d(
            weights.masked_fill(~old, 0), self.options.kernel, stride=1, padding=self.options.kernel // 2
        )[..., : keys.shape[2]]
        mix = self.options.mix
        scores: Tensor = mix * important - (1 - mix) * redundancy(keys, real, self.options.threshold)
        return scores
