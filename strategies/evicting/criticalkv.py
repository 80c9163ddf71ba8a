"""CriticalKV (arXiv 2502.03805): half of the budget by attention, half by attention times the value's norm."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kvbench.contract import extension
from kvbench.contract.compression import head_budgets
from kvbench.contract.errors import KVBenchError
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.strategies.evicting.snapkv import WindowPolicy, held_scores, prompt_scores

_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "out_lin", "attn_out", "proj")
"""What models call an attention module's output projection."""


def output_projection(layer: Layer, width: int, whose: str = "Policy 'criticalkv'") -> Tensor:
    """A layer's output projection as [H, `width`, D], for values of `width` channels; KVBenchError for none."""
    for name in _NAMES:
        found = getattr(layer.module, name, None)
        weight = getattr(found, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            inward = weight.T if isinstance(found, nn.Linear) else weight  # GPT-2's Conv1D holds [in, out]
            if inward.shape[0] == layer.heads * width:
                return inward.detach().reshape(layer.heads, width, -1)
    raise KVBenchError(
        f"{whose} needs the output projection of layer {layer.number}, and its module "
        f"{type(layer.module).__name__} has none of {layer.heads} × {width} inputs by a known name "
        f"({', '.join(_NAMES)}): choose another policy for this model."
    )


def projected_norms(layer: Layer, values: Tensor) -> Tensor:
    """‖W_O v‖₁, float32 [B, G, n], of values [B, G, n, d], averaged over each group's query heads."""
    weight = output_projection(layer, values.shape[3]).float()
    share = layer.heads // layer.kv_heads
    norms = [
        (values[:, head // share].float() @ own).abs().sum(-1) for head, own in enumerate(weight)
    ]  # one head after the other, to spare memory
    return torch.stack(norms, dim=1).view(len(values), layer.kv_heads, share, -1).mean(2)


class CriticalKV(WindowPolicy):
    """Keeps, per key/value head, the pairs that bound the error of the layer's output, and the observation window.

    Of what the budget leaves beside the window a share `first` goes to the best scores of SnapKV's (the window's mean
    weights, pooled), the rest to the best of (score + `epsilon`) · ‖W_O v‖₁, the group's mean.
    """

    name = "criticalkv"
    summary = "Keeps half by SnapKV's scores and half by score times the L1 norm of the projected value."
    reference = (
        "Feng et al., Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective, "
        "arXiv 2502.03805"
    )
    query_aware = "keeps what the prompt's last queries attend to, weighed by the values"
    grows = True
    head_budgets = True

    class Options(extension.Options):
        """Options of CriticalKV; window, kernel and pooling are those of SnapKV."""

        window: int = Field(32, ge=1, description="observation window: last queries of the prompt, always kept")
        kernel: int = Field(7, ge=1, description="width of the pooling over neighbouring tokens; odd")
        pooling: Literal["avg", "max"] = Field("max", description="how neighbouring scores are pooled")
        first: float = Field(0.5, ge=0, le=1, description="share of the budget beside the window that goes by score")
        epsilon: float = Field(1e-4, ge=0, description="added to the scores before they meet the norms")

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Score the prompt's tokens before the window in two stages."""
        if layer.budget.covers_all:
            return
        window = queries.shape[2]
        scores = prompt_scores(layer, queries, keys, self.options) / window
        layer.keep_top(self._two_stages(layer, scores, values[:, :, : layer.tokens - window], window))

    def score_held(self, layer: Layer, held: HeldTokens) -> Tensor:
        """Score what is held by the latest queries, in two stages; the window stays."""
        scores, newest = held_scores(held, layer.scaling, self.options)
        scores = (scores / held.queries.shape[2]).masked_fill(newest | ~held.real, -1)
        return self._two_stages(layer, scores, held.values, self.options.window).masked_fill(newest, torch.inf)

    def _two_stages(self, layer: Layer, scores: Tensor, values: Tensor, window: int) -> Tensor:
        """Final scores [B, G, n] from the first stage's [B, G, n]: ∞ for those that it keeps."""
        budgets = head_budgets(layer.budget, (scores.shape[0], scores.shape[1])).to(scores.device)
        first = ((budgets - window).clamp_min(0) * self.options.first).long()
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        second = (scores + self.options.epsilon) * projected_norms(layer, values)
        return torch.where(rank < first[..., None], torch.inf, second)
