"""Key norms (arXiv 2406.11430): keep the keys of smallest L2 norm, which tend to draw most attention."""

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.strategies.evicting.eviction import DecodingEviction


class KNorm(DecodingEviction):
    """Keeps, per key/value head, the keys of smallest L2 norm; at every step the largest key leaves.

    The authors leave the first two layers whole; with `--dense-layers 2` they are whole here too, beyond
    the budget, and the results' density counts them.
    """

    name = "knorm"
    summary = "Keeps the keys of smallest L2 norm; evicts the largest at every step."
    reference = (
        "Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430"
    )
    query_window = 0

    class Options(extension.Options):
        """Options of key norms."""

        window: int = Field(
            1, ge=1, description="most recent tokens, never evicted; the paper spares none but the newest"
        )

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The recent window."""
        return 0, self.options.window

    def prompt_scores(self, layer: Layer, queries: Tensor, keys: Tensor) -> Tensor:
        """Minus the norms."""
        norms: Tensor = keys.float().norm(dim=-1)
        return -norms

    def step_scores(self, scores: Tensor, held: Tensor, real: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the keys held, and minus the new key's norm."""
        return scores, -keys.float().norm(dim=-1)

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """Minus the norms; the window stays."""
        norms: Tensor = held.keys.float().norm(dim=-1)
        return (-norms).masked_fill(held.newest(self.options.window), torch.inf)
