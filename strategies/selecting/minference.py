"""MInference (arXiv 2407.02490): the prompt attends along a few columns and diagonals; nothing is evicted."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kvbench.contract import extension
from kvbench.contract.layer import PromptView
from kvbench.contract.policy import KVCachePolicy

_ROWS = 256
"""Queries that attend at a time."""


class MInference(KVCachePolicy):
    """Computes the prompt's attention on vertical lines and slashes, per query head, and decodes exactly.

    The last queries' exact weights choose the tokens that get most (columns) and the distances at which most lies
    (diagonals); every query attends to those tokens and at those distances, and to nothing else. The first tokens and
    the smallest distances are always among them. All heads take this pattern, the paper's most frequent one, which
    gives each head one of three patterns by an offline search. A prompt in chunks chooses anew for each chunk.
    """

    name = "minference"
    summary = "Sparse attention of the prompt along columns and diagonals; keeps everything and decodes exactly."
    reference = (
        "Jiang et al., MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention, "
        "arXiv 2407.02490"
    )
    takes_budget = False
    query_window = 0
    never_exact = "the prompt's attention is sparse"

    class Options(extension.Options):
        """Options of MInference."""

        vertical: int = Field(1000, ge=1, description="tokens that all queries attend to")
        slash: int = Field(6096, ge=1, description="distances at which every query attends")
        last: int = Field(64, ge=1, description="last queries whose weights choose both")
        first: int = Field(30, ge=1, description="first tokens, always among the former")
        nearest: int = Field(100, ge=1, description="smallest distances, always among the latter")

    def attend_prompt(self, layer: PromptView, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        """Choose lines for each head and attend along them; exact where they cover everything."""
        tokens, new = keys.shape[2], queries.shape[2]
        if tokens <= max(self.options.vertical, self.options.slash):
            return None
        output = queries.new_empty(*queries.shape[:3], values.shape[3])
        share = layer.heads // layer.kv_heads
        place = torch.arange(tokens, device=keys.device)
        for head in range(layer.heads):
            own_keys, own_values = keys[:, head // share], values[:, head // share]
            columns, distances = self._lines(queries[:, head], own_keys, layer.scaling)
            for start in range(0, new, _ROWS):
                asked = queries[:, head, start : start + _ROWS]
                row = tokens - new + start + torch.arange(asked.shape[1], device=keys.device)
                stop = int(row[-1]) + 1
                away = row[:, None] - place[:stop]
                seen = columns[:, None, :stop] | distances[:, away.clamp_min(0)]
                output[:, head, start : start + _ROWS] = functional.scaled_dot_product_attention(
                    asked, own_keys[:, :stop], own_values[:, :stop], attn_mask=seen & (away >= 0), scale=layer.scaling
                )
        return output

    def _lines(self, queries: Tensor, keys: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Which tokens and distances, bool [B, n] each, one head's queries [B, m, d] and keys [B, n, d] choose."""
        tokens, last = keys.shape[1], min(self.options.last, queries.shape[1])
        place = torch.arange(tokens, device=keys.device)
        away = place[tokens - last :, None] - place
        logits = (queries[:, -last:] @ keys.transpose(1, 2)).float().mul_(scaling)
        weights = logits.masked_fill_(away < 0, -torch.inf).softmax(-1)
        received = weights.sum(1)
        received[:, : self.options.first] = torch.inf
        lengths = torch.zeros_like(received).scatter_add_(
            1, away.clamp_min(0).flatten().expand(len(keys), -1), weights.flatten(1)
        )
        lengths[:, : self.options.nearest] = torch.inf
        marks = []
        for found, count in ((received, self.options.vertical), (lengths, self.options.slash)):
            best = found.topk(min(count, tokens), dim=-1).indices
            marks.append(torch.zeros_like(found, dtype=torch.bool).scatter_(1, best, True))
        return marks[0], marks[1]
