"""Expected Attention (arXiv 2510.00636): keep what future queries, as a Gaussian, are expected to attend to."""

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, ModelView


class ExpectedAttention(KVCachePolicy):
    """Keeps, per key/value head, the sinks and the pairs of the highest expected weight times value norm.

    Mean μ and covariance Σ of the prompt's queries before rotation, sinks left out, stand for future queries; the
    rotation R̄ is averaged over the next `future` positions. A key's expected unnormalised weight is the Gaussian's
    moment generating function, exp(k·R̄μ/√d + k·R̄ΣR̄ᵀk/2d); the group's score is the mean of its heads' normalised
    ones, over all keys as the softmax has it, or without the sinks as the authors' library has it. The value's
    norm stands for that of its output, as in that library. Generated tokens are kept.
    """

    name = "expected_attention"
    query_aware = "keeps what a Gaussian of the prompt's queries, a question's among them, weighs most"
    summary = "Keeps the pairs that a Gaussian of future queries is expected to weigh most, times the value's norm."
    reference = (
        "Devoto et al., Expected Attention: KV Cache Compression by Estimating Attention from Future Queries "
        "Distribution, arXiv 2510.00636"
    )

    grows = True
    head_budgets = True

    class Options(extension.Options):
        """Options of Expected Attention."""

        future: int = Field(
            512, ge=1, le=2**20, description="positions after the prompt over which the rotation is averaged"
        )
        sinks: int = Field(4, ge=0, description="first tokens, always kept and left out of the statistics")
        normalise_sinks: bool = Field(
            True, description="normalise the expected weights over the sinks, too; false as in the authors' library"
        )
        covariance: bool = Field(True, description="use the covariance, not the mean alone")
        epsilon: float = Field(0.0, ge=0, description="added to the expected weights before the value's norm")

    def begin(self, model: ModelView) -> None:
        """Refuse a model whose keys cannot be had before rotation, before it computes anything."""
        model.require_rotary()

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The sinks."""
        return self.options.sinks, 0

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Score every pair and keep the top of the budget."""
        sinks = self.options.sinks
        if layer.budget.covers_all or layer.tokens <= sinks + 1:
            return
        plain = layer.unrotate(queries[:, :, sinks:].float(), torch.arange(sinks, layer.tokens))
        layer.keep_top(self._scores(layer, plain, layer.tokens, keys, values, sinks), sinks)

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """Score the pairs held by the queries since the last compression; the sinks stay."""
        count, sinks = held.queries.shape[2], self.options.sinks
        plain = layer.unrotate(held.queries.float(), torch.arange(held.tokens - count, held.tokens))
        sunk = held.ids < sinks
        hidden = ~held.real if self.options.normalise_sinks else sunk | ~held.real
        scores = self._scores(layer, plain, held.tokens, held.keys, held.values, 0, hidden)
        return scores.masked_fill(sunk & held.real, torch.inf)

    def _scores(
        self, layer: Layer, plain: Tensor, tokens: int, keys: Tensor, values: Tensor, sinks: int,
        hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Scores [B, G, t − sinks] of all pairs but the first, by queries `plain` [B, H, m, d] before rotation.

        `hidden`, bool [B, G, t], marks pairs that take no part.
        """
        mean = plain.mean(2, keepdim=True)
        turn = self._mean_rotation(layer, tokens, keys)
        exponents = self._per_group(layer, mean @ turn) @ keys.float().transpose(-1, -2)[:, :, None] * layer.scaling
        if self.options.covariance:
            centred = plain - mean
            spread = turn.T @ (centred.transpose(-1, -2) @ centred / plain.shape[2]) @ turn
            whole = keys.float()[:, :, None]
            quadratic = ((whole @ self._per_group(layer, spread)) * whole).sum(-1)
            exponents = exponents + quadratic[:, :, :, None] * (layer.scaling**2 / 2)
        exponents = exponents.squeeze(3)
        if hidden is not None:
            exponents = exponents.masked_fill(hidden[:, :, None], -torch.inf)
        if self.options.normalise_sinks:
            weights = exponents.softmax(-1)[..., sinks:].mean(2)
        else:
            weights = exponents[..., sinks:].softmax(-1).mean(2)
        scores: Tensor = (weights + self.options.epsilon) * values[:, :, sinks:].float().norm(dim=-1)
        return scores

    @staticmethod
    def _per_group(layer: Layer, x: Tensor) -> Tensor:
        return x.view(x.shape[0], layer.kv_heads, -1, *x.shape[2:])

    def _mean_rotation(self, layer: Layer, tokens: int, keys: Tensor) -> Tensor:
        """The matrix M [d, d] with x @ M = the mean of x's rotations to the next positions."""
        positions = torch.arange(tokens, tokens + self.options.future)
        basis = torch.eye(layer.head_dim, device=keys.device)[:, None].expand(-1, len(positions), -1)
        return layer.rotate(basis, positions).mean(1)
