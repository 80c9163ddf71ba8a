"""Compression while decoding: every so many tokens what is held is scored again and cut down to the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.held import HeldTokens
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy


def due(every: int, taken: int) -> bool:
    """Whether what is held is compressed before the next token, `taken` tokens after the prompt."""
    return every > 0 and taken > 0 and taken % every == 0


def head_budgets(budget: LayerBudget, heads: tuple[int, int]) -> Tensor:
    """The tokens of each row and head, int64 [B, G]."""
    return torch.full(heads, budget.tokens) if budget.heads is None else budget.heads


def best(scores: Tensor, ids: Tensor, budget: LayerBudget) -> Tensor:
    """Mark the slots, bool [B, G, t], with each head's best `scores` [B, G, t], as many as its budget allows."""
    counts = head_budgets(budget, (ids.shape[0], ids.shape[1])).to(ids.device)
    most = min(int(counts.max()), ids.shape[-1])
    # of equals the older one stays, however many slots there are
    top = scores.masked_fill(ids < 0, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :most]
    allowed = torch.arange(most, device=ids.device) < counts[..., None]
    return torch.zeros_like(ids, dtype=torch.bool).scatter_(-1, top, allowed) & (ids >= 0)


def to_the_front(marks: Tensor) -> Tensor:
    """The slots [B, G, k] of the marked ones of [B, G, t], in order, k the most that a head has; any beyond its own."""
    slots = marks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return slots[..., : int(marks.sum(-1).max())]


def scored(policy: KVCachePolicy, layer: Layer, held: HeldTokens) -> Tensor:
    """The policy's scores of what is held; KVBenchError that names it where they are none or it fails."""
    try:
        scores = policy.score_held(layer, held)
    except (KVBenchError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise KVBenchError(
            f"Policy '{policy.name}' ({type(policy).__module__}) failed in score_held at layer {layer.number}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(scores, Tensor) or scores.shape != held.ids.shape or bool(scores.isnan().any()):
        found = f"shape {list(scores.shape)}, or NaN" if isinstance(scores, Tensor) else type(scores).__name__
        raise KVBenchError(
            f"Policy '{policy.name}' ({type(policy).__module__}) gave {found} in score_held at layer {layer.number}; "
            f"expected a number for each slot, {list(held.ids.shape)}."
        )
    return scores
