"""How tokens' keys and values are held: as they are, or in a format of a policy's own, and the bytes of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvbench.contract.attention import Summed, scores, weighted_sum
from kvbench.contract.host import host_empty
from kvbench.contract.saved import Saveable


def pick(buffer: Tensor, slots: Tensor, heads: int) -> Tensor:
    """Copy the rows `slots` [B, H or G, k] of a contiguous `buffer` [B, G, t, d]; `heads` is H or G."""
    batch, groups, capacity, dim = buffer.shape
    share = torch.arange(heads, device=slots.device) // (heads // groups)
    first = (torch.arange(batch, device=slots.device)[:, None] * groups + share) * capacity
    flat = (slots + first[:, :, None]).reshape(-1)
    return buffer.view(-1, dim).index_select(0, flat).view(batch, heads, -1, dim)


def gathered(tokens: Tensor, slots: Tensor, room: int = 0) -> Tensor:
    """Copies of the tokens in `slots` [B, G, k] of [B, G, t, d], with memory for `room` more behind them."""
    places = slots.long()[..., None].expand(-1, -1, -1, tokens.shape[-1])
    if not room:
        return tokens.gather(2, places)
    count = slots.shape[-1]
    made = tokens.new_zeros(*tokens.shape[:2], count + room, tokens.shape[-1])
    torch.gather(tokens, 2, places, out=made[:, :, :count])
    return made


class Storage(Saveable, ABC):
    """How the set-aside tokens of a layer are held: as they are (`TokenBuffer`), or in a format of the policy's own.

    A policy hands a factory, called with the tokens' keys and values [B, G, t, d] where they shall lie, to
    `KVStore.set_aside(..., storage=...)`. Slots count from 0, in the tokens' order. What is held between steps is plain
    tensors; whatever is decoded for a step is dropped after it. The defaults decode everything.
    """

    length: int
    """Tokens held."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all memory held, spare room and quantisation parameters included."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of it that stay on the model's device even where the tokens are offloaded; none by default."""
        return 0

    @property
    @abstractmethod
    def keys(self) -> Tensor:
        """All keys [B, G, t, d], decoded."""

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """All values [B, G, t, d], decoded."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens, `keys` and `values` [B, G, m, d], at the end."""

    def decoded(self) -> tuple[Tensor, Tensor]:
        """All keys and all values, two [B, G, t, d]."""
        return self.keys, self.values

    def pick(self, slots: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values, two [B, H or G, k, d], of the tokens in `slots` [B, H or G, k]; `heads` is H or G."""
        return TokenBuffer(*self.decoded()).pick(slots, heads)

    def scores(self, queries: Tensor, scaling: float) -> Tensor:
        """Scaled inner products, float32 [B, H, t], of `queries` [B, H, 1, d] with all keys; −inf masks a token."""
        keys = self.keys
        return scores(queries.to(keys.device), keys, scaling)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum, float32 [B, H, 1, d], of all values with `weights` [B, H, t]."""
        return weighted_sum(weights, self.values)


StorageFactory = Callable[[Tensor, Tensor], Storage]

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Makes keys and values [B, H, t, d] of what is held of tokens, two [B, G, t, r], such as their latents."""


PartLogits = tuple[Tensor, Tensor | Summed, Tensor | None]
"""Tokens as a step's queries meet them: logits, float32 [B, H, t], values, and a mask [B, G, t] or None."""


class TokenBuffer(Storage):
    """Keys and values of a growing number of tokens, [B, G, t, d], in memory that grows by a sixteenth at a time."""

    def __init__(self, keys: Tensor, values: Tensor, room: int = 64, length: int | None = None) -> None:
        """Take over `keys` and `values` [B, G, t, d] without a copy where they are contiguous.

        Memory that has to grow gets room for at least `room` more tokens. Only the first `length` tokens are in use.
        """
        self._room = room
        self._keys = keys.contiguous()
        self._values = values.contiguous()
        self.length = keys.shape[2] if length is None else length

    def saved(self) -> dict[str, Any]:
        """All attributes; room that no token uses is emptied first."""
        for held in (self._keys, self._values):
            held[:, :, self.length :] = 0
        return super().saved()

    @property
    def capacity(self) -> int:
        """Tokens that there is memory for."""
        return self._keys.shape[2]

    @property
    def keys(self) -> Tensor:
        """The keys [B, G, t, d], a view."""
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """The values [B, G, t, d], a view."""
        return self._values[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory held, spare room included."""
        held = (self._keys, self._values)
        # pinned tensors share their memory with others
        return sum(part.nbytes if part.is_pinned() else part.untyped_storage().nbytes() for part in held)

    @property
    def raw(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they are held, views."""
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens at the end."""
        start, stop = self.length, self.length + keys.shape[2]
        if stop > self._keys.shape[2]:
            capacity = stop + max(self._room, stop // 16)
            self._keys = self._grown(self._keys, capacity)
            self._values = self._grown(self._values, capacity)
        self._keys[:, :, start:stop] = keys
        self._values[:, :, start:stop] = values
        self.length = stop

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        shape = (*old.shape[:2], capacity, old.shape[3])
        new = host_empty(shape, old.dtype, torch.device("cuda")) if old.is_pinned() else old.new_empty(shape)
        new[:, :, : self.length] = old[:, :, : self.length]
        new[:, :, self.length :] = 0  # steps of fixed shapes multiply it by weights of 0, and 0 · NaN is NaN
        return new

    def attended(self, queries: Tensor, scaling: float) -> PartLogits:
        """Scaled inner products of `queries` [B, H, 1, d] with all keys, and the values."""
        keys, values = self.decoded()
        return scores(queries, keys, scaling), values, None

    def take(self, spare: int) -> tuple[Tensor, Tensor]:
        """Hand over the memory, keys and values [B, G, c, d] with room for `spare` tokens more, and hold nothing."""
        if self._keys.shape[2] < self.length + spare:
            self._keys = self._grown(self._keys, self.length + spare)
            self._values = self._grown(self._values, self.length + spare)
        keys, values = self._keys, self._values
        self._keys, self._values, self.length = keys[:, :, :0].clone(), values[:, :, :0].clone(), 0
        return keys, values

    def pick(self, slots: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Copy the tokens in `slots` [B, H or G, k] (for `heads` H or G heads) as two tensors [B, H or G, k, d]."""
        return pick(self._keys, slots, heads), pick(self._values, slots, heads)

    def last(self) -> tuple[Tensor, Tensor]:
        """Keys and values, two [B, G, d], of each head's last token."""
        keys, values = self.decoded()
        return keys[:, :, -1], values[:, :, -1]

    def fill_from_end(self, slots: Tensor) -> None:
        """Overwrite, for each row and head, the token in `slots` [B, G] by the last one, and forget the last slot."""
        last = self.length - 1
        for buffer in (self._keys, self._values):
            places = slots[:, :, None, None].expand(*slots.shape, 1, buffer.shape[3])
            buffer.scatter_(2, places, buffer[:, :, last : last + 1].clone())
        self.length = last

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Move the tokens in slots `sources` [c] to `targets` [c] and forget all slots from `length` on."""
        for buffer in (self._keys, self._values):
            buffer[:, :, targets] = buffer[:, :, sources]
        self.length = length


class RaggedBuffer(Saveable):
    """Keys and values of a set of tokens that has a different size for each row and head, without padding."""

    lengths: Tensor
    """Tokens of each row and head, int64 [B, G]."""
    mask: Tensor
    """The slots that hold a token, bool [B, G, t]."""

    def __init__(self, keys: Tensor, values: Tensor, kept: Tensor) -> None:
        """Copy the tokens that `kept`, bool [B, G, n], marks out of `keys` and `values` [B, G, n, d]."""
        self.keys, self.values = keys[kept], values[kept]
        self._count(kept)
        first = (self.lengths.reshape(-1).cumsum(0) - self.lengths.reshape(-1)).view(self.lengths.shape)
        rank = torch.arange(self.mask.shape[-1], device=kept.device)
        self._slots = torch.where(self.mask, first[..., None] + rank, 0)

    def _count(self, kept: Tensor) -> None:
        self.lengths = kept.sum(-1)
        self.sizes: list[int] = self.lengths.flatten().tolist()
        """The lengths of all rows and heads, one after the other."""
        self.mask = torch.arange(max(self.sizes), device=kept.device) < self.lengths[..., None]

    def replace(self, slots: Tensor, where: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put `keys` and `values` [B, G, d] into `slots` [B, G] of the rows and heads that `where` [B, G] marks."""
        places = self._slots.gather(-1, slots.clamp(max=self._slots.shape[-1] - 1)[..., None]).squeeze(-1)[where]
        self.keys[places], self.values[places] = keys[where], values[where]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and the slot table."""
        return sum(t.untyped_storage().nbytes() for t in (self.keys, self.values, self.mask, self._slots))

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of keys and values [B, G, t, d] padded to the longest head, and their mask [B, G, t]."""
        return self.keys[self._slots], self.values[self._slots], self.mask

    def attended(self, queries: Tensor, scaling: float) -> PartLogits:
        """Scaled inner products of `queries` [B, H, 1, d] with all keys, the values and the mask; nothing is copied."""
        grouped = queries.reshape(len(self.sizes), -1, queries.shape[-1])
        logits = queries.new_zeros(len(self.sizes), grouped.shape[1], self.mask.shape[-1], dtype=torch.float32)
        for head, keys in enumerate(torch.split(self.keys, self.sizes)):
            logits[head, :, : len(keys)] = grouped[head] @ keys.T
        return logits.mul_(scaling).view(*queries.shape[:2], -1), self, self.mask

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum, float32 [B, H, 1, d], of all values with `weights` [B, H, t]."""
        grouped = weights.reshape(len(self.sizes), -1, weights.shape[-1]).to(self.values.dtype)
        found = [
            grouped[head, :, : len(values)] @ values for head, values in enumerate(torch.split(self.values, self.sizes))
        ]
        return torch.stack(found).view(*weights.shape[:2], 1, -1).float()
