"""Rows of a batch that have one length, and what is taken of their tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Lane:
    """Rows of a batch that have the same left padding, and so the same length."""

    rows: Tensor | None
    padding: int

    def tokens(self, tensor: Tensor) -> int:
        """Tokens of the lane's rows in a padded tensor [B, G, n, d]."""
        return tensor.shape[2] - self.padding

    def take(self, tensor: Tensor, *, padded: bool = False) -> Tensor:
        """The lane's rows of a tensor [B, ...], without the padding of [B, G, n, d] where `padded`."""
        part = tensor if self.rows is None else tensor[self.rows]
        return part[:, :, self.padding :] if padded and self.padding else part


def last_queries(queries: Tensor, count: int) -> Tensor:
    """The last `count` of `queries` [B, H, m, d]."""
    return queries[:, :, queries.shape[2] - count :]
