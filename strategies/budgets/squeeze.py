"""SqueezeAttention's budgets (arXiv 2404.04793): layers whose attention changes the hidden states little get less."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field
from scipy.cluster.vq import kmeans2
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.budget import BudgetAllocator, BudgetRequest, PromptLayer, fit


class Squeeze(BudgetAllocator):
    """Cuts the budget of the layers that matter least and gives it to the others.

    A layer's importance is how much its attention turns the hidden states: the cosine similarity before and after it,
    averaged over the prompt's tokens. k-means makes three groups of the layers; those of the highest
    similarity get p times the mean, and the others share equally what that frees. (The paper's b counts all tokens
    of a layer; here those beside the static set, which every layer needs. The default of p is kvbench's own.)
    """

    name = "squeeze"
    summary = "Layers by the cosine similarity of hidden states around attention, as SqueezeAttention allocates."
    reference = (
        "Wang et al., SqueezeAttention: 2D Management of KV-Cache in LLM Inference via Layer-wise Optimal Budget, "
        "arXiv 2404.04793"
    )

    class Options(extension.Options):
        """Options of SqueezeAttention."""

        p: float = Field(
            0.3, ge=0, le=1, description="the least important layers' share of the mean, to be tuned; 1 is uniform"
        )
        groups: int = Field(3, ge=2, description="groups of layers that k-means makes")

    def reduce_hidden(self, before: Tensor, after: Tensor) -> Tensor:
        """Cosine similarity of each token's hidden states."""
        return torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)

    def measure(self, prompt: PromptLayer) -> Any:
        """Average the similarity over the prompt."""
        assert prompt.hidden is not None
        return float(prompt.hidden.double().mean())

    def allocate(self, request: BudgetRequest) -> list[int]:
        """Share by group."""
        least = _most_similar(np.asarray(request.measured, dtype=np.float64), self.options.groups)
        cut, rest = self.options.p * request.beside, request.beside
        if not least.all():
            rest = (request.layers - self.options.p * least.sum()) * request.beside / (~least).sum()
        wishes = [request.minimum + (cut if squeezed else rest) for squeezed in least]
        return fit(wishes, total=request.total, low=request.minimum, high=request.context)


def _most_similar(
    similarities: np.ndarray[Any, np.dtype[np.float64]], groups: int
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mark the layers of the k-means group with the highest mean similarity; none where all are alike."""
    groups = min(groups, len(np.unique(similarities)))
    if groups < 2:
        return np.zeros(len(similarities), dtype=bool)
    starts = np.quantile(np.unique(similarities), np.linspace(0, 1, groups))
    centres, labels = kmeans2(similarities, starts, minit="matrix", iter=100)
    marked: np.ndarray[Any, np.dtype[np.bool_]] = labels == int(np.argmax(centres))
    return marked
