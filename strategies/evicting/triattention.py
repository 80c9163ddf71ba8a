"""TriAttention (arXiv 2604.04921): score keys by the mean query before rotation, at the distances that are to come."""

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.errors import KVBenchError
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy, ModelView
from kvbench.strategies.selecting.rotations import Pairs, pairs


def _magnitudes(x: Tensor, found: Pairs) -> Tensor:
    """|x_f| [..., d] of each pair of channels, in its first channel, 0 in the other; of a lone channel its own."""
    partner = torch.where(found.alone, 0, x[..., found.partner.long()])
    return (x.square() + partner.square()).sqrt() * found.first


class TriAttention(KVCachePolicy):
    """Keeps, per key/value head, the keys that the head's mean query will score highest at later positions.

    A key at distance δ scores the mean over offsets Δ = 1, 2, 4, … of Σ_f |q̄_f||k_f| cos(ω_f(δ + Δ) + φ_f), which is
    the inner product with the mean query q̄ (before rotation) rotated Δ further, plus Σ_f (E|q_f| − |q̄_f|)|k_f| for
    what the mean says nothing about. Scores are standardised for each query head over the tokens that compete; a group
    takes the largest. Mean and norms are those of the prompt's queries, where the paper calibrates them offline. The
    paper's mode is `--compress-every 128`: the prompt stays, within the budget, and the answer is compressed. Without
    it the prompt is cut down to the budget and the answer is kept.
    """

    name = "triattention"
    summary = "Keeps the keys that a head's mean query before rotation scores highest at later positions."
    reference = "TriAttention: Efficient Long Reasoning with Trigonometric KV Compression, arXiv 2604.04921"
    query_aware = "scores by the mean of the prompt's queries, a question's among them"
    grows = True
    head_budgets = True

    class Options(extension.Options):
        """Options of TriAttention."""

        furthest: int = Field(65536, ge=1, le=2**24, description="largest of the offsets 1, 2, 4, …")
        recent: int = Field(1, ge=1, description="most recent tokens, always kept")
        keep_prompt: bool = Field(
            True, description="with --compress-every: keep the whole prompt and compress the answer alone"
        )

    def begin(self, model: ModelView) -> None:
        """Refuse a model whose keys cannot be had before rotation, before it computes anything."""
        model.require_rotary()

    def static_tokens(self, context: int) -> tuple[int, int]:
        """The latest tokens."""
        return 0, self.options.recent

    def compression_window(self, every: int) -> int:
        """No queries: those of the prompt calibrate."""
        return 0

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Calibrate on the prompt's queries and score its tokens."""
        if layer.budget.covers_all:
            return
        found, places = self._pairs(layer, keys.device), torch.arange(layer.tokens)
        means, norms = [], []
        for own in queries.unbind(1):  # one head after the other, to spare memory
            plain = layer.unrotate(own.float(), places)
            means.append(plain.mean(1))
            norms.append(_magnitudes(plain, found).mean(1))
        layer.state["mean"] = torch.stack(means, dim=1)
        layer.state["beside"] = torch.stack(norms, dim=1) - _magnitudes(layer.state["mean"], found)
        if self._keeps_prompt(layer):
            least = layer.tokens + self.options.recent
            if layer.budget.least < least:
                raise KVBenchError(
                    f"Policy 'triattention' keeps the prompt, and the budget of layer {layer.number}, "
                    f"{layer.budget.least} tokens, has no room for its {layer.tokens} tokens and {self.options.recent} "
                    f"of the answer: give at least {least} with --tokens, or -o keep_prompt=false."
                )
            return
        scores = self._scores(layer, keys, layer.tokens, None)
        layer.keep_top(scores[..., : layer.tokens - self.options.recent])

    def _keeps_prompt(self, layer: Layer) -> bool:
        return bool(layer.budget.every and self.options.keep_prompt)

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """Score what is held from its distances to the next positions; the latest tokens stay, and the prompt does."""
        spared = held.newest(self.options.recent)
        prompt = held.real & (held.ids < layer.prompt_tokens)
        competing = held.real
        if self._keeps_prompt(layer):
            spared, competing = spared | prompt, competing & ~prompt
        return self._scores(layer, held.keys, held.tokens, competing).masked_fill(spared, torch.inf)

    @staticmethod
    def _pairs(layer: Layer, device: torch.device) -> Pairs:
        found = pairs(layer, device)
        if found is None:
            raise KVBenchError(
                f"Policy 'triattention' needs a rotary embedding of pairs of channels, and that of layer "
                f"{layer.number} is none: choose another policy for this model."
            )
        return found

    def _scores(self, layer: Layer, keys: Tensor, tokens: int, real: Tensor | None) -> Tensor:
        """Scores [B, G, t] of keys [B, G, t, d] in a context of `tokens` tokens; `real` bool [B, G, t] ones compete."""
        offsets = 2 ** torch.arange(self.options.furthest.bit_length())
        mean, beside = layer.state["mean"], layer.state["beside"]
        ahead = mean[:, :, None].expand(-1, -1, len(offsets), -1)
        turned = layer.rotate(ahead, tokens - 1 + offsets).mean(2)
        # rotation leaves magnitudes as they are, up to the embedding's scaling
        found, share = self._pairs(layer, keys.device), layer.heads // layer.kv_heads
        best = []
        for group in range(layer.kv_heads):
            own, heads = keys[:, group].float(), slice(group * share, (group + 1) * share)
            scores = own @ turned[:, heads].transpose(1, 2)
            scores = (scores + _magnitudes(own, found) @ beside[:, heads].transpose(1, 2)).transpose(1, 2)
            mine = torch.ones_like(scores[:, :1], dtype=torch.bool) if real is None else real[:, group, None]
            count = mine.sum(-1, keepdim=True).clamp_min(1)
            centre = scores.masked_fill(~mine, 0).sum(-1, keepdim=True) / count
            centred = (scores - centre).masked_fill(~mine, 0)
            deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt().clamp_min(1e-6)
            best.append((centred / deviation).amax(1))
        return torch.stack(best, dim=1)
