"""Static tokens in a storage's own format: what a policy keeps, held as another holds it (`snapkv+kivi`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.contract.buffers import PartLogits, RaggedBuffer, Storage, StorageFactory, TokenBuffer, gathered

SPARE = 128
"""Tokens of a head that leave one by one before the memory of all that left is freed."""


class CodedBuffer(TokenBuffer):
    """Tokens [B, G, t, d] that a storage holds.

    Tokens that leave are only forgotten, by a table of those that stay, until `SPARE` of a head have left; then what
    stays is decoded and encoded anew.
    """

    def __init__(self, make: StorageFactory, keys: Tensor, values: Tensor) -> None:
        """Hold the tokens in what `make` makes of them."""
        self._make = make
        self.held: Storage = make(keys, values)
        self._table: Tensor | None = None

    def saved(self) -> dict[str, Any]:
        """All attributes."""
        return dict(vars(self))

    @property
    def length(self) -> int:  # type: ignore[override]
        """Tokens of each head."""
        return self.held.length if self._table is None else self._table.shape[-1]

    @property
    def whole(self) -> bool:
        """Whether the storage holds these tokens, in order, and no others."""
        return self._table is None

    @property
    def nbytes(self) -> int:
        """Bytes of the storage and of the table."""
        return self.held.nbytes + (0 if self._table is None else self._table.untyped_storage().nbytes())

    @property
    def raw(self) -> tuple[Tensor, Tensor]:
        """Keys and values, decoded."""
        return self.decoded()

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Keys and values, two [B, G, t, d]."""
        keys, values = self.held.decoded()
        if self._table is None:
            return keys, values
        return gathered(keys, self._table), gathered(values, self._table)

    @property
    def keys(self) -> Tensor:
        """Keys [B, G, t, d], decoded."""
        return self.decoded()[0]

    @property
    def values(self) -> Tensor:
        """Values [B, G, t, d], decoded."""
        return self.decoded()[1]

    def pick(self, slots: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values, two [B, H or G, k, d], of the tokens in `slots` [B, H or G, k]."""
        return TokenBuffer(*self.decoded()).pick(slots, heads)

    def attended(self, queries: Tensor, scaling: float) -> PartLogits:
        """Scaled inner products of `queries` [B, H, 1, d] with all keys, as the storage computes them, and itself."""
        logits = self.held.scores(queries, scaling)
        return logits if self._table is None else logits.gather(-1, self._for(logits.shape[1])), self, None

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum, float32 [B, H, 1, d], of all values with `weights` [B, H, t]."""
        if self._table is not None:
            whole = weights.new_zeros(*weights.shape[:2], self.held.length)
            weights = whole.scatter_(-1, self._for(weights.shape[1]), weights)
        return self.held.weighted_sum(weights)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens at the end."""
        start = self.held.length
        self.held.append(keys, values)
        if self._table is not None:
            new = torch.arange(start, self.held.length, dtype=torch.int32, device=self._table.device)
            self._table = torch.cat([self._table, new.expand(*self._table.shape[:2], -1)], dim=-1)

    def fill_from_end(self, slots: Tensor) -> None:
        """Overwrite, for each row and head, the token in `slots` [B, G] by the last one, and forget the last slot."""
        table = self._every(slots.shape)
        self._table = table.scatter(-1, slots[..., None], table[..., -1:])[..., :-1].contiguous()
        self._free()

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Move the tokens in slots `sources` [c] to `targets` [c] and forget all slots from `length` on."""
        keys = self.held.keys if self._table is None else self._table
        table = self._every(keys.shape[:2]).clone()
        table[:, :, targets] = table[:, :, sources]
        self._table = table[..., :length].contiguous()
        self._free()

    def take(self, spare: int) -> tuple[Tensor, Tensor]:
        """Hand over the tokens decoded, keys and values [B, G, t, d] with room for `spare` more, and hold nothing."""
        keys, values = self.decoded()
        self.held, self._table = self._make(keys[:, :, :0].clone(), values[:, :, :0].clone()), None
        return functional.pad(keys, (0, 0, 0, spare)), functional.pad(values, (0, 0, 0, spare))

    def exchange(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Put another token, `keys` and `values` [1, 1, 1, d], in the place of that in a slot of a single head."""
        self._table = self._every((1, 1)).clone()
        self._table[..., slot] = self.held.length
        self.held.append(keys, values)
        self._free()

    def _for(self, heads: int) -> Tensor:
        """The table for each of `heads` query heads [B, H, t]."""
        assert self._table is not None
        return self._table.long().repeat_interleave(heads // self._table.shape[1], dim=1)

    def _every(self, shape: tuple[int, ...]) -> Tensor:
        if self._table is not None:
            return self._table
        device = self.held.keys.device
        return torch.arange(self.held.length, dtype=torch.int32, device=device).expand(*shape, -1)

    def _free(self) -> None:
        """Encode what stays anew, the oldest first, once enough has left."""
        if self._table is None or self.held.length - self._table.shape[-1] < SPARE:
            return
        order = self._table.sort(dim=-1)
        keys, values = self.held.decoded()
        self.held = self._make(gathered(keys, order.values), gathered(values, order.values))
        self._table = order.indices.argsort(dim=-1).to(torch.int32)


class RaggedCodes(RaggedBuffer):
    """Tokens of which heads have different numbers, in a storage for each row and head."""

    def __init__(self, make: StorageFactory, keys: Tensor, values: Tensor, kept: Tensor) -> None:
        """Hold the tokens that `kept`, bool [B, G, n], marks of `keys` and `values` [B, G, n, d]."""
        self._count(kept)
        self.heads = [
            CodedBuffer(make, own_keys[mine][None, None], own_values[mine][None, None])
            for own_keys, own_values, mine in zip(
                keys.flatten(0, 1), values.flatten(0, 1), kept.flatten(0, 1), strict=True
            )
        ]
        """The tokens of all rows and heads, one after the other."""

    @property
    def nbytes(self) -> int:
        """Bytes of all storages and the mask."""
        return sum(head.nbytes for head in self.heads) + self.mask.nbytes

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, G, t, d], decoded and padded to the longest head, and their mask [B, G, t]."""
        most = self.mask.shape[-1]
        both = []
        for place in (0, 1):
            rows = [functional.pad(part[0, 0], (0, 0, 0, most - part.shape[2]))
                    for part in (head.decoded()[place] for head in self.heads)]  # fmt: skip
            both.append(torch.stack(rows).view(*self.lengths.shape, most, -1))
        return both[0], both[1], self.mask

    def replace(self, slots: Tensor, where: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put `keys` and `values` [B, G, d] into `slots` [B, G] of the rows and heads that `where` [B, G] marks."""
        chosen = zip(self.heads, slots.flatten().tolist(), where.flatten().tolist(), strict=True)
        for place, (head, slot, wanted) in enumerate(chosen):
            if wanted:
                head.exchange(
                    slot, keys.flatten(0, 1)[place][None, None, None], values.flatten(0, 1)[place][None, None, None]
                )

    def attended(self, queries: Tensor, scaling: float) -> PartLogits:
        """Scaled inner products of `queries` [B, H, 1, d] with all keys, the storages and the mask."""
        grouped = queries.reshape(len(self.heads), 1, -1, 1, queries.shape[-1])
        most = self.mask.shape[-1]
        logits = [
            functional.pad(head.attended(own, scaling)[0], (0, most - size))
            for head, own, size in zip(self.heads, grouped, self.sizes, strict=True)
        ]
        return torch.cat(logits).view(*queries.shape[:2], -1), self, self.mask

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum, float32 [B, H, 1, d], of all values with `weights` [B, H, t]."""
        grouped = weights.reshape(len(self.heads), 1, -1, weights.shape[-1])
        found = [
            head.weighted_sum(own[..., :size]) for head, own, size in zip(self.heads, grouped, self.sizes, strict=True)
        ]
        return torch.cat(found).view(*weights.shape[:2], 1, -1)
