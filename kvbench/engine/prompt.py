"""A prompt that has passed through the model, as every policy takes it over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class PrefilledLayer:
    """What one governed layer made of the prompt: keys and values [B, G, n, d], padding included, and queries.

    `queries` [B, H, m, d] are those of the last m tokens.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    module: nn.Module
    scaling: float


@dataclass(frozen=True)
class Prefill:
    """A prompt of `ids` [B, n], left-padded where `mask` [B, n] is 0, as every policy takes it over.

    Its first `border` tokens were a pass of their own. `logits` [B, V] are those of the last token; `others` the caches
    of layers that no policy governs, by number; `seconds` what the pass took, `reused` the tokens that were taken from
    another prompt's.
    """

    ids: Tensor
    mask: Tensor | None
    border: int
    layers: dict[int, PrefilledLayer]
    others: dict[int, Any]
    logits: Tensor
    seconds: float
    reused: int = 0
