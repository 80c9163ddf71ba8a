"""KeyDiff (arXiv 2504.15364): keep the keys that differ most from the others."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kvbench.contract.extension import Options
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.kernels.directions import key_differences
from kvbench.strategies.evicting.eviction import DecodingEviction


def dissimilarity(keys: Tensor) -> Tensor:
    """Minus the cosine [B, G, t] of each key [B, G, t, d] with the mean of the normalised keys (the anchor)."""
    directions = functional.normalize(keys.float(), dim=-1)
    return -functional.cosine_similarity(directions, directions.sum(2, keepdim=True), dim=-1)


class KeyDiff(DecodingEviction):
    """Keeps, per key/value head, the keys least similar to the anchor; at every step the most similar one leaves.

    The anchor is the mean of the normalised keys held: of the whole prompt first, then of those in the cache.
    """

    name = "keydiff"
    summary = "Keeps the keys least similar to their mean direction; evicts the most similar at every step."
    reference = (
        "Park et al., KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in "
        "Resource-Constrained Environments, arXiv 2504.15364"
    )
    query_window = 0
    reads_keys = True

    class Options(Options):
        """Options of KeyDiff."""

        window: int = Field(
            1, ge=1, description="most recent tokens, never evicted; the paper spares none but the newest"
        )

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The recent window."""
        return 0, self.options.window

    def prompt_scores(self, layer: Layer, queries: Tensor, keys: Tensor) -> Tensor:
        """Minus the cosine with the anchor of the whole prompt."""
        return dissimilarity(keys)

    def step_scores(self, scores: Tensor, held: Tensor, real: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the cosine with the anchor of the keys held and the new one."""
        inside = scores.is_contiguous() and scores.dtype == torch.float32
        return key_differences(held, real, keys, output=scores if inside else None)

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """Minus the cosine with the anchor of the keys held; the window stays."""
        directions = functional.normalize(held.keys.float(), dim=-1) * held.real[..., None]
        scores = -functional.cosine_similarity(directions, directions.sum(2, keepdim=True), dim=-1)
        return scores.masked_fill(held.newest(self.options.window), torch.inf)
