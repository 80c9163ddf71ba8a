"""What a policy answers at a decoding step: the set-aside tokens that each head attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass
class Selection:
    """The set-aside tokens that each head attends to beside the static set.

    `ids` [B, H, k] or [B, G, k] (one set for the group's query heads), or [B, H, m, k] for a block of m queries that
    have a set each (`log_weights` and the logits of `summary` likewise), int64 token ids, −1 for none where `padded`;
    no ids select nothing, unless `everything` selects all that is set aside, for the key/value heads in `heads`, bool
    [B or 1, G], where given. `queries` [B, H, 1, d] meet the set-aside tokens in place of the step's own (another
    position encoding). `log_weights` [B, H, k] are added to the scaled scores (importance sampling). `summary`:
    logits, float32 [B, H, s], and values [B, H or G, s, d] of rows that stand for many tokens (estimation zones).
    `evaluations`: distance evaluations per query head that finding the tokens took, for the scanned fraction.
    """

    ids: Tensor | None = None
    padded: bool = False
    everything: bool = False
    heads: Tensor | None = None
    queries: Tensor | None = None
    log_weights: Tensor | None = None
    summary: tuple[Tensor, Tensor] | None = None
    evaluations: Tensor | float | None = None


class Pending(Protocol):
    """A selection that is under way, as `KVCachePolicy.begin_select` gives it: a `concurrent.futures.Future` is one."""

    def result(self) -> Selection:
        """Wait for the selection, and raise what went wrong with it."""
