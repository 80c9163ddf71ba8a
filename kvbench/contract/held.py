"""What a layer holds when it is compressed while decoding, as a policy scores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeldTokens:
    """What a layer holds when it is compressed, and the latest queries.

    `keys` and `values` [B, G, t, d] are the tokens of each head in the order of their `ids`, int64 [B, G, t]; −1 marks
    slots that hold none, the last ones of a head, whose keys and values are anything finite. `queries` [B, H, w, d] are
    those of the newest w tokens (`KVCachePolicy.compression_window`) of a context of `tokens` tokens.
    `running` has the tensors [B, G, t] of `layer.state` that the policy names in `KVCachePolicy.running`.
    """

    keys: Tensor
    values: Tensor
    ids: Tensor
    queries: Tensor
    tokens: int
    running: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def real(self) -> Tensor:
        """The slots that hold a token, bool [B, G, t]."""
        return self.ids >= 0

    def newest(self, count: int | Tensor) -> Tensor:
        """The slots of the context's latest `count` tokens, bool [B, G, t]; `count` for all or [B, G]."""
        return self.ids >= self.tokens - (count if isinstance(count, int) else count.to(self.ids.device)[..., None])

    @property
    def later(self) -> Tensor:
        """The tokens that a query may not see, bool [B, G, w, t]: padding and what came after it."""
        window = self.queries.shape[2]
        positions = self.tokens - window + torch.arange(window, device=self.ids.device)
        return (self.ids[:, :, None] > positions[:, None]) | (self.ids < 0)[:, :, None]
