"""Tokens whose keys and values are made from what the cache holds of them, such as the latents of latent attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbench.contract.attention import scores
from kvbench.contract.buffers import Expand, PartLogits, RaggedBuffer, StorageFactory, TokenBuffer, gathered
from kvbench.contract.errors import KVBenchError
from kvbench.contract.storage import KVStore

_SHARED = (
    "The heads of this model share a token's memory, so no policy can evict while decoding where heads keep different "
    "numbers of tokens: choose a budget that only shares over layers (uniform, pyramid, squeeze)."
)

_COMPACT = 32
"""Evictions of single tokens of heads after which memory that no head needs any more is freed."""


class LatentBuffer(TokenBuffer):
    """Latents [B, 1, u, r] that all heads share; their keys and values [B, H, t, d] are made anew for every step.

    Heads that keep different tokens share the memory of all tokens that any of them keeps.
    """

    def __init__(self, keys: Tensor, values: Tensor, expand: Expand, table: Tensor | None = None) -> None:
        """Hold the latents `keys` and `values`; `table` [B, H, t] says which of them the heads have, None for all."""
        self._held, self._expand, self._table, self._dropped = TokenBuffer(keys, values), expand, table, 0

    def saved(self) -> dict[str, Any]:
        """All attributes."""
        return dict(vars(self))

    @property
    def length(self) -> int:  # type: ignore[override]
        """Tokens of each head."""
        return self._held.length if self._table is None else self._table.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the latents and of the table."""
        return self._held.nbytes + (0 if self._table is None else self._table.untyped_storage().nbytes())

    @property
    def raw(self) -> tuple[Tensor, Tensor]:
        """The latents as they are held."""
        assert self._table is None, "heads have different tokens"
        return self._held.raw

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, t, d]."""
        keys, values = self._expand(*self._held.raw)
        if self._table is None:
            return keys, values
        return gathered(keys, self._table), gathered(values, self._table)

    def pick(self, slots: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values, two [B, H, k, d], of the tokens in `slots` [B, H, k]."""
        decoded = TokenBuffer(*self.decoded())
        return decoded.pick(slots.to(decoded.keys.device), heads)

    @property
    def keys(self) -> Tensor:
        """Keys [B, H, t, d]."""
        return self.decoded()[0]

    @property
    def values(self) -> Tensor:
        """Values [B, H, t, d]."""
        return self.decoded()[1]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add latents [B, 1, m, r] at the end."""
        start = self._held.length
        self._held.append(keys, values)
        if self._table is not None:
            new = torch.arange(start, self._held.length, device=self._table.device)
            self._table = torch.cat([self._table, new.expand(*self._table.shape[:2], -1)], dim=-1)

    def kept(self, slots: Tensor) -> LatentBuffer:
        """Only the tokens in `slots` [t] or, for each row and head, [B, H, t]."""
        keys, values = self._held.raw
        if self._table is None and slots.dim() == 1:
            return LatentBuffer(keys[:, :, slots], values[:, :, slots], self._expand)
        if self._table is not None:
            slots = self._table.gather(-1, slots.expand(*self._table.shape[:2], -1))
        kept = LatentBuffer(keys, values, self._expand, slots)
        kept._compact()
        return kept

    def fill_from_end(self, slots: Tensor) -> None:
        """Overwrite, for each row and head, the token in `slots` [B, H] by the last one, and forget the last slot."""
        table = self._every(slots.shape[1])
        self._table = table.scatter(-1, slots[..., None], table[..., -1:])[..., :-1].contiguous()
        self._dropped += 1
        if self._dropped >= _COMPACT:
            self._compact()

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Move the tokens in slots `sources` [c] to `targets` [c] and forget all slots from `length` on."""
        if self._table is None:
            self._held.move(sources, targets, length)
            return
        self._table[:, :, targets] = self._table[:, :, sources]
        self._table = self._table[..., :length].contiguous()

    def _every(self, heads: int) -> Tensor:
        if self._table is not None:
            return self._table
        latents = self._held.raw[0]
        return torch.arange(latents.shape[2], device=latents.device).expand(latents.shape[0], heads, -1)

    def _compact(self) -> None:
        """Free the latents that no head has."""
        assert self._table is not None
        keys, values = self._held.raw
        used = torch.zeros(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
        used.scatter_(1, self._table.flatten(1), True)
        order = used.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, : int(used.sum(-1).max())]
        places = torch.zeros_like(used, dtype=torch.int64).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        self._table = places[:, None].expand(-1, self._table.shape[1], -1).gather(2, self._table)
        rows = order[:, None, :, None]
        keys, values = (part.gather(2, rows.expand(-1, part.shape[1], -1, part.shape[-1])) for part in (keys, values))
        self._held, self._dropped = TokenBuffer(keys, values), 0


class LatentStore(KVStore):
    """The store of a layer whose cache holds latents: a token's bytes are theirs."""

    _static: LatentBuffer

    def __init__(self, keys: Tensor, values: Tensor, expand: Expand, heads: int) -> None:
        """Hold a whole prompt's latents, two [B, 1, n, r], of which `expand` makes keys and values of `heads` heads."""
        self._expand = expand
        super().__init__(keys, values)
        self._heads = keys.shape[0], heads

    def decode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, two [B, H, t, d], of latents."""
        return self._expand(keys, values)

    def hold_static(self, storage: StorageFactory) -> None:
        """Refuse: latents are small already, and codes of the keys and values made of them would be larger."""
        raise KVBenchError(
            "This model's cache holds latents, which are smaller than the codes of their keys and values: choose the "
            "policy that keeps tokens alone, without another one's storage."
        )

    def _buffer(self, keys: Tensor, values: Tensor) -> LatentBuffer:
        return LatentBuffer(keys, values, self._expand)

    def _kept(self, slots: Tensor) -> LatentBuffer:
        if self._ragged is not None:
            raise KVBenchError(_SHARED)
        return self._static.kept(slots)

    def _hold(self, marks: Tensor) -> None:
        if self._ragged is not None:
            raise KVBenchError(_SHARED)
        counts, ids = marks.sum(-1), self.static_ids.expand(marks.shape)
        most = int(counts.max())
        if most == int(counts.min()):
            slots = marks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
            self._static, self._static_ids = self._static.kept(slots), ids.gather(-1, slots)
            return
        keys, values = self._static.raw
        self._ragged = RaggedLatents(keys, values, marks, self._expand)
        self._ragged_kept = torch.where(self._ragged.ids < 0, -1, ids.gather(-1, self._ragged.ids.clamp_min(0)))
        self._static = self._buffer(keys[:, :, :0].clone(), values[:, :, :0].clone())
        self._static_ids = torch.arange(0, device=marks.device)


class RaggedLatents(RaggedBuffer):
    """Latents of the tokens that any head keeps, where heads keep different numbers of them."""

    def __init__(self, keys: Tensor, values: Tensor, kept: Tensor, expand: Expand) -> None:
        """Copy out of latents [B, 1, n, r] the tokens that `kept`, bool [B, H, n], marks for any head."""
        union = kept.any(1, keepdim=True)
        super().__init__(keys, values, union.expand(-1, keys.shape[1], -1))
        self._expand = expand
        places = union.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., : self.mask.shape[-1]]
        places = places.expand(-1, kept.shape[1], -1)
        self.mask = kept.gather(2, places) & self.mask[:, :1]
        self.ids = torch.where(self.mask, places, -1)
        """The slots, among the n, of the tokens of each head [B, H, u], −1 where it has none."""
        self.lengths = kept.sum(-1)

    def attended(self, queries: Tensor, scaling: float) -> PartLogits:
        """Scaled inner products with the keys of all tokens that any head keeps, their values and what a head keeps."""
        keys, values, mask = self.padded()
        return scores(queries, keys, scaling), values, mask

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, H, u, d] of the tokens that any head keeps, and what each head keeps [B, H, u]."""
        keys, values, _ = super().padded()
        return *self._expand(keys, values), self.mask

    def replace(self, slots: Tensor, where: Tensor, keys: Tensor, values: Tensor) -> None:
        """Refuse."""
        raise KVBenchError(_SHARED)
