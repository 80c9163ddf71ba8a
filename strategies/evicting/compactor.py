"""Compactor (arXiv 2507.08143): keep keys of high leverage and keys that their own neighbourhood attends to."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kvbench.contract import extension
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, ModelView


def leverage(keys: Tensor, sketch: Tensor, ridge: float) -> Tensor:
    """Leverage scores [..., n] of keys [..., n, d] in the sketch [d, k]: diag X (XᵀX + ridge)⁻¹ Xᵀ, X centred."""
    x = (keys - keys.mean(-2, keepdim=True)) @ sketch
    gram = x.transpose(-1, -2) @ x
    gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    scores: Tensor = ((x @ torch.linalg.inv(gram)) * x).sum(-1).clamp_min(0)
    return scores


def chunk_attention(queries: Tensor, keys: Tensor, size: int, scaling: float) -> Tensor:
    """Weights [B, G, n] that each key receives from all queries of its chunk, the group's mean; no causal mask."""
    batch, groups, tokens, dim = keys.shape
    share = queries.shape[1] // groups
    found = torch.zeros(batch, groups, tokens, device=keys.device)
    # as many chunks at a time as take no more memory than the keys, and at least one
    step = max(keys.nbytes // (4 * batch * size * size), 1) * size
    for start in range(0, tokens, step):
        for head in range(queries.shape[1]):
            pair = [x[:, :, start : start + step] for x in (queries[:, head : head + 1], keys[:, head // share, None])]
            whole = pair[1].shape[2] // size * size
            for first, stop, length in ((0, whole, size), (whole, pair[1].shape[2], pair[1].shape[2] - whole)):
                if first < stop:
                    asked, own = (x[:, 0, first:stop].float().reshape(batch, -1, length, dim) for x in pair)
                    received = (asked @ own.transpose(-1, -2)).mul_(scaling).softmax(-1).sum(-2).flatten(1)
                    found[:, head // share, start + first : start + stop] += received / share
    return found


def _standardised(x: Tensor) -> Tensor:
    """Each row's scores [B, G, n] with mean 0 and deviation 1 over heads and tokens."""
    flat = x.flatten(1)
    mean, deviation = flat.mean(1), flat.std(1).clamp_min(1e-6)
    return (x - mean[:, None, None]) / deviation[:, None, None]


class Compactor(KVCachePolicy):
    """Keeps, per key/value head, sinks, latest tokens and the best blend of leverage and non-causal attention.

    Leverage is that of the keys before rotation, centred and multiplied with a Gaussian sketch; the attention that of
    chunks of `chunk` tokens without a causal mask, times the value's norm, averaged over three neighbours. Both are
    standardised over the layer before they are blended. It looks at no question: all tokens count alike.
    """

    name = "compactor"
    summary = "Keeps keys of high leverage and those that their own chunk attends to; looks at no question."
    reference = (
        "Chari, Van Durme, Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores, "
        "arXiv 2507.08143"
    )
    grows = True
    head_budgets = True

    class Options(extension.Options):
        """Options of Compactor."""

        sinks: int = Field(8, ge=0, description="first tokens, always kept")
        recent: int = Field(4, ge=1, description="most recent tokens of the prompt, always kept")
        chunk: int = Field(256, ge=1, description="tokens that attend to each other")
        sketch: int = Field(48, ge=1, description="columns of the Gaussian sketch")
        blending: float | None = Field(
            None, ge=0, description="weight of the leverage; by default the share of the prompt that is evicted"
        )
        ridge: float = Field(1e-2, ge=0, description="added to the diagonal of the sketched keys' Gram matrix")
        seed: int = Field(0, ge=0, description="seed of the sketch")

    def begin(self, model: ModelView) -> None:
        """Refuse a model whose keys cannot be had before rotation, before it computes anything."""
        model.require_rotary()

    def static_tokens(self, context: int) -> tuple[int, int]:
        """Sinks and latest tokens."""
        return self.options.sinks, self.options.recent

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Score all but sinks and latest tokens."""
        first, stop = self.options.sinks, layer.tokens - self.options.recent
        if layer.budget.covers_all or stop - first < 2:
            return
        asked, mine, held = (part[:, :, first:stop] for part in (queries, keys, values))
        random = torch.Generator().manual_seed(self.options.seed + layer.number)
        sketch = torch.randn(mine.shape[3], self.options.sketch, generator=random) / self.options.sketch**0.5
        places, sketch = torch.arange(first, stop), sketch.to(mine.device)
        unusual = torch.stack(
            [leverage(layer.unrotate(own.float(), places), sketch, self.options.ridge) for own in mine.unbind(1)], dim=1
        )
        attended = chunk_attention(asked, mine, self.options.chunk, layer.scaling) * held.float().norm(dim=-1)
        blending = self.options.blending
        if blending is None:
            blending = 1 - layer.budget.tokens / layer.tokens
        scores = blending * _standardised(unusual) + _standardised(functional.avg_pool1d(attended, 3, 1, 1))
        layer.keep_top(scores, first)
