"""Ada-KV's budgets (arXiv 2407.11550): the heads of a layer share its budget by where their scores are high."""

from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.budget import BudgetAllocator, BudgetRequest, PromptLayer, fit
from kvbench.strategies.budgets.pyramid import Pyramid
from kvbench.strategies.budgets.uniform import Uniform
from kvbench.strategies.evicting.snapkv import pooled, window_votes


class Ada(BudgetAllocator):
    """Gives each key/value head as many tokens as it has among the layer's best, with a floor for every head.

    The prompt's last queries vote as in SnapKV; of the layer's G·b best scores (b: tokens beside the static set), head
    i has B_i; it gets (1 − α)·B_i + α·b. Query heads that share a key/value head vote by their mean.
    """

    name = "ada"
    summary = "Key/value heads share their layer's budget by the scores of the observation window, as Ada-KV does."
    reference = (
        "Feng et al., Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference, "
        "arXiv 2407.11550"
    )
    head_wise = True

    class Options(extension.Options):
        """Options of Ada-KV; its SnapKV setting is window=32, kernel=7, pooling=max."""

        alpha: float = Field(0.2, ge=0, le=1, description="share of the budget that every head keeps; 1 is uniform")
        window: int = Field(32, ge=1, description="observation window: last queries of the prompt")
        kernel: int = Field(7, ge=1, description="width of the pooling over neighbouring tokens; odd")
        pooling: Literal["avg", "max"] = Field("max", description="how neighbouring scores are pooled")
        layers: Literal["uniform", "pyramid"] = Field("uniform", description="how the layers share the total")

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        self.query_window = self.options.window

    def allocate(self, request: BudgetRequest) -> list[int]:
        """Share over the layers as the option says."""
        return (Pyramid() if self.options.layers == "pyramid" else Uniform()).allocate(request)

    def share_heads(self, prompt: PromptLayer, request: BudgetRequest, tokens: int) -> Tensor:
        """Count each head's scores among the best of its layer, over the tokens that the policy chooses from."""
        groups, beside = prompt.keys.shape[1], tokens - request.minimum
        votes = window_votes(prompt.queries, prompt.keys, prompt.scaling)
        votes = votes[..., request.minimum - request.window : request.context - request.window]
        scores = pooled(votes, groups, self.options.kernel, self.options.pooling)
        best = scores.flatten(1).topk(min(groups * beside, scores[0].numel()), dim=-1).indices // scores.shape[2]
        alpha, heads = self.options.alpha, []
        for row in best:
            counts = torch.bincount(row, minlength=groups).tolist()
            wishes = [request.minimum + (1 - alpha) * count + alpha * beside for count in counts]
            heads.append(fit(wishes, total=groups * tokens, low=request.minimum, high=request.context))
        return torch.tensor(heads)
