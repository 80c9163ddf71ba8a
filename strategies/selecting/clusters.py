"""Clusters of set-aside tokens in fixed shapes: which tokens belong to which, and the tokens of the chosen ones."""

from __future__ import annotations

import torch
from torch import Tensor


class Clusters:
    """Up to `count` clusters of up to `tokens` tokens for each row and key/value head, added piece by piece.

    `sizes` int32 [B, G, c], 0 where there is no cluster; `starts` [B, G, c]: where its tokens begin in `members`,
    int32 [B, G, n].
    """

    def __init__(self, batch: int, groups: int, count: int, tokens: int, device: torch.device) -> None:
        self.sizes = torch.zeros(batch, groups, count, dtype=torch.int32, device=device)
        self.starts = torch.zeros_like(self.sizes)
        self.members = torch.zeros(batch, groups, tokens, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of sizes, starts and members."""
        return self.sizes.nbytes + self.starts.nbytes + self.members.nbytes

    def add(self, rows: Tensor, sizes: Tensor, assigned: Tensor, cluster: int, token: int) -> None:
        """Put clusters of `sizes` [b, G, c] at `cluster` and the tokens assigned [b, G, n] to them at `token`."""
        count, tokens = sizes.shape[2], assigned.shape[2]
        self.sizes[rows, :, cluster : cluster + count] = sizes.int()
        self.starts[rows, :, cluster : cluster + count] = (token + sizes.cumsum(-1) - sizes).int()
        self.members[rows, :, token : token + tokens] = (assigned.argsort(dim=-1, stable=True) + token).int()

    def tokens(self, taken: Tensor, most: int) -> Tensor:
        """The tokens, int32 [B, G or H, most], of the clusters `taken`, bool [B, G or H, c]; −1 behind them."""
        batch, heads, count = taken.shape
        groups = self.sizes.shape[1]
        own = taken.view(batch, groups, -1, count) * self.sizes[:, :, None]
        ends = own.cumsum(-1, dtype=torch.int32)
        slots = torch.arange(most, dtype=torch.int32, device=taken.device)
        wanted = slots.expand(*ends.shape[:3], most)
        cluster = torch.searchsorted(ends, wanted.contiguous(), right=True).clamp_max(count - 1)
        # a slot's place in `members`: its cluster's start and its rank there
        offsets = self.starts[:, :, None] - (ends - own)
        places = slots + offsets.gather(-1, cluster)
        found = self.members.gather(-1, places.long().clamp(0, self.members.shape[2] - 1).flatten(2))
        found = torch.where(slots < ends[..., -1:], found.view(places.shape), -1)
        return found.view(batch, heads, most)
