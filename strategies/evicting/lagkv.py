"""LagKV (arXiv 2504.04704): keep what stands out against the partition of tokens after it, without attention."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kvbench.contract import extension
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy


def _spread(x: Tensor, counts: Tensor) -> Tensor:
    """The scores [B, G, c, L] of vectors x [B, G, c, L, d] of c partitions; `counts` [B, G] of these are whole.

    Each is scaled by the channels' minimum and maximum in the next partition; the deviation over channels, softmaxed.
    """
    low, high = (functional.pad(end, (0, 0, 0, 1)).roll(-1, 2)[:, :, :-1, None] for end in x.aminmax(dim=3))
    scaled = (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).eps)
    scored = torch.arange(x.shape[2], device=x.device) < counts[..., None] - 1
    return scaled.std(-1).masked_fill(~scored[..., None], 0).softmax(-1)


class LagKV(KVCachePolicy):
    """Keeps, per key/value head, the sinks, the latest tokens and the best of every partition of `lag` tokens.

    A partition's keys (and values) are scaled, channel by channel, by the minimum and maximum in the partition after
    it; a token's score is the softmax over the partition of its standard deviation over channels, averaged over keys
    and values. Partitions share the budget evenly, the later ones get what does not divide. The last whole partition
    and what follows it have no reference and stay, as far as the budget allows, the latest first.
    """

    name = "lagkv"
    summary = "Keeps, of each partition, what stands out against the next one's range; needs no attention weights."
    reference = (
        "Liang et al., LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important, "
        "arXiv 2504.04704"
    )
    query_window = 0
    grows = True
    head_budgets = True

    class Options(extension.Options):
        """Options of LagKV."""

        sinks: int = Field(4, ge=0, description="first tokens, always kept")
        lag: int | None = Field(
            None, ge=2, description="tokens in a partition; by default 128, at most a quarter of the budget"
        )

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The sinks and the newest token."""
        return self.options.sinks, 1

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Score the prompt's partitions."""
        if not layer.budget.covers_all:
            counts = torch.full(keys.shape[:2], layer.tokens, device=keys.device)
            layer.keep_top(self._scores(layer, keys, values, counts)[..., self.options.sinks :], self.options.sinks)

    def compression_window(self, every: int) -> int:
        """No queries."""
        return 0

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """Score the partitions of what is held; the sinks stay."""
        scores = self._scores(layer, held.keys, held.values, held.real.sum(-1))
        return scores.masked_fill(held.real & (held.ids < self.options.sinks), torch.inf)

    def _scores(self, layer: Layer, keys: Tensor, values: Tensor, counts: Tensor) -> Tensor:
        """Scores [B, G, t] of tokens [B, G, t, d] in their order, of which each head has `counts` [B, G]."""
        sinks, tokens = self.options.sinks, keys.shape[2]
        lag = self.options.lag or max(min(128, layer.budget.tokens // 4), 2)
        place = torch.arange(tokens, device=keys.device)
        # what is not scored stands above every score, the latest first
        scores = (2 + place / tokens).expand(*keys.shape[:3])
        partitions, whole = (tokens - sinks) // lag, (counts - sinks).clamp_min(0) // lag
        if partitions < 2:
            return scores
        stop = sinks + partitions * lag
        parts = [x[:, :, sinks:stop].float().reshape(*x.shape[:2], partitions, lag, x.shape[3]) for x in (keys, values)]
        found = (_spread(parts[0], whole) + _spread(parts[1], whole)) / 2
        # equal ranks in all partitions, the later one first
        rank = found.argsort(dim=-1, stable=True).argsort(dim=-1).float() + torch.arange(
            partitions, device=keys.device
        )[:, None] / partitions  # fmt: skip
        mine = (place >= sinks) & (place < sinks + (whole[..., None] - 1) * lag)
        spread_out = functional.pad((rank / lag).flatten(2), (sinks, tokens - stop))
        return torch.where(mine, spread_out, scores)
