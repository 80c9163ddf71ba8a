"""KIVI's storage (arXiv 2402.02750): quantised as tokens are appended, and the same in fixed shapes for a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvbench.contract import attention
from kvbench.contract.step import Clock, FixedTokens, Part, lengths_at, rows_of
from kvbench.contract.storage import Storage, TokenBuffer
from kvbench.kernels.kivi import KIVICodes, attend_kivi
from kvbench.kernels.kivi_blocks import attend_kivi_blocks
from kvbench.kernels.kivi_settle import settle_kivi


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric rounding of groups `x` [..., n]: codes, uint8 [..., n], and the groups' scales and minima, float16.

    x ≈ minimum + scale · code, with scale = (maximum − minimum) / (2^bits − 1).
    """
    low = x.amin(-1).half()
    scale = ((x.amax(-1) - low) / (2**bits - 1)).half().clamp_min(torch.finfo(torch.float16).tiny)
    codes = ((x - low[..., None]) / scale[..., None]).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, low


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [..., n], in bytes [..., n · bits / 8]; a byte's codes lie a plane of n · bits / 8 apart."""
    planes = codes.view(*codes.shape[:-1], 8 // bits, -1)
    shifts = torch.arange(8 // bits, device=codes.device, dtype=torch.uint8)[:, None] * bits
    return (planes << shifts).sum(-2, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes that `pack` packed."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)


def _split(x: Tensor, dim: int, size: int) -> Tensor:
    """Split a dimension into groups of `size`."""
    return x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :])


class KIVIBuffer(Storage):
    """Keys quantised in groups of `group` tokens per channel, values in groups of `group` channels per token.

    Keys wait in full precision until `residual` of them can be quantised together; the last `residual` values always
    stay in full precision. Scores and sums are computed from the codes: q·(z + s∘c) = q·z + (q∘s)·c.
    """

    def __init__(self, options: Any, keys: Tensor, values: Tensor) -> None:
        self.length, dim = keys.shape[2:]
        self._bits, self._group, self._residual = options.bits, options.group, options.residual
        self._value_group: int = min(self._group, dim)
        self._late_keys, self._late_values = keys, values
        self._key_groups: TokenBuffer | None = None
        self._value_rows: TokenBuffer | None = None
        self._settle()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens in full precision, and quantise those that have waited long enough."""
        self._late_keys = torch.cat([self._late_keys, keys], dim=2)
        self._late_values = torch.cat([self._late_values, values], dim=2)
        self.length += keys.shape[2]
        self._settle()

    def _settle(self) -> None:
        ripe = self._late_keys.shape[2] // self._residual * self._residual
        if ripe:
            groups = _split(self._late_keys[:, :, :ripe], 2, self._group).transpose(-1, -2)
            self._key_groups = self._quantised(self._key_groups, groups, self._residual // self._group)
            self._late_keys = self._late_keys[:, :, ripe:].clone()
        old = self._late_values.shape[2] - self._residual
        if old > 0:
            groups = _split(self._late_values[:, :, :old], 3, self._value_group)
            self._value_rows = self._quantised(self._value_rows, groups, self._residual)
            self._late_values = self._late_values[:, :, old:].clone()

    def _quantised(self, known: TokenBuffer | None, groups: Tensor, room: int) -> TokenBuffer:
        """Add, for each [B, G, t] of `groups` [B, G, t, s, n], a row of codes and one of scales and minima."""
        codes, scale, low = quantise(groups, self._bits)
        new = pack(codes.flatten(3), self._bits), torch.cat([scale, low], dim=-1)
        if known is None:
            return TokenBuffer(*new, room=room)
        known.append(*new)
        return known

    @property
    def dtype(self) -> torch.dtype:
        """The type of what is not quantised."""
        return self._late_keys.dtype

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self._late_keys.shape[1]

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return self._late_keys.shape[3]

    @property
    def value_group(self) -> int:
        """Channels that share a scale."""
        return self._value_group

    def hand_over(self, store: KIVICodes, rows: Iterable[int], heads: slice = slice(None)) -> None:
        """Copy everything into the `rows` and `heads` of a store of fixed shapes, whose late tokens lie in a ring."""
        for own, row in enumerate(rows):
            for known, codes, scales in (
                (self._key_groups, store.key_codes, store.key_scales),
                (self._value_rows, store.value_codes, store.value_scales),
            ):
                if known is not None:
                    codes[row, heads, : known.length] = known.keys[own]
                    scales[row, heads, : known.length] = known.values[own]
            ring = store.late_keys.shape[2]
            for late, target in ((self._late_keys, store.late_keys), (self._late_values, store.late_values)):
                slots = torch.arange(self.length - late.shape[2], self.length, device=late.device) % ring
                target[row, heads][:, slots] = late[own]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, minima and late tokens."""
        late = self._late_keys.untyped_storage().nbytes() + self._late_values.untyped_storage().nbytes()
        return late + sum(part.nbytes for part in (self._key_groups, self._value_rows) if part is not None)

    def _parts(self, rows: TokenBuffer, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, G, t, s, group], scales and minima [B, G, t, s]."""
        scale, low = rows.values.chunk(2, dim=-1)
        return unpack(rows.keys, self._bits).view(*scale.shape, group), scale.float(), low.float()

    @property
    def keys(self) -> Tensor:
        """All keys [B, G, t, d], decoded."""
        if self._key_groups is None:
            return self._late_keys
        codes, scale, low = self._parts(self._key_groups, self._group)
        old = (codes * scale[..., None] + low[..., None]).transpose(-1, -2).flatten(2, 3)
        return torch.cat([old.to(self._late_keys.dtype), self._late_keys], dim=2)

    @property
    def values(self) -> Tensor:
        """All values [B, G, t, d], decoded."""
        if self._value_rows is None:
            return self._late_values
        codes, scale, low = self._parts(self._value_rows, self._value_group)
        old = (codes * scale[..., None] + low[..., None]).flatten(3)
        return torch.cat([old.to(self._late_values.dtype), self._late_values], dim=2)

    def scores(self, queries: Tensor, scaling: float) -> Tensor:
        """Scaled inner products, float32 [B, H, t], of `queries` [B, H, 1, d] with the codes and the late keys."""
        late = attention.scores(queries, self._late_keys, scaling)
        if self._key_groups is None:
            return late
        codes, scale, low = self._parts(self._key_groups, self._group)
        grouped = queries.float().view(*codes.shape[:2], 1, -1, queries.shape[3])
        old = (grouped * scale[:, :, :, None]) @ codes.float() + grouped @ low[..., None]
        return torch.cat([old.transpose(2, 3).reshape(*queries.shape[:2], -1) * scaling, late], dim=-1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum, float32 [B, H, 1, d], of codes and late values with `weights` [B, H, t]."""
        split = weights.shape[2] - self._late_values.shape[2]
        late = attention.weighted_sum(weights[..., split:], self._late_values)
        if self._value_rows is None:
            return late
        codes, scale, low = self._parts(self._value_rows, self._value_group)
        grouped = weights[..., :split].view(*codes.shape[:2], -1, split)
        old = grouped @ codes.float().mul_(scale[..., None]).flatten(3)
        old += (grouped @ low).repeat_interleave(self._value_group, dim=-1)
        return late + old.view(late.shape)


class KIVITokens:
    """The same in fixed shapes, for all rows of a batch."""

    def __init__(self, options: Any, like: KIVIBuffer, counts: Tensor, capacity: int, ring: int = 0) -> None:
        """Room for `capacity` tokens, of which `counts`, int32 [B] or [B, G], are held.

        `like` says the heads' shape and the type of what is not quantised; the last `ring` tokens at least, and always
        one more than the residual, stay in full precision beside their codes.
        """
        self.counts, self._residual = counts, options.residual
        device, shape, dim = counts.device, (counts.shape[0], like.kv_heads), like.dim
        bits, group, channels = options.bits, options.group, like.value_group
        values = max(capacity - self._residual, 1)
        groups = max(capacity // self._residual, 1) * (self._residual // group)
        codes = partial(torch.zeros, dtype=torch.uint8, device=device)
        scales = partial(torch.zeros, dtype=torch.float16, device=device)
        late = partial(torch.zeros, *shape, max(ring, self._residual + 1), dim, dtype=like.dtype, device=device)
        self.codes = KIVICodes(
            codes(*shape, groups, dim * group * bits // 8), scales(*shape, groups, 2 * dim),
            codes(*shape, values, dim * bits // 8), scales(*shape, values, 2 * dim // channels),
            late(), late(), counts.clone(), counts // self._residual * self._residual,
            (counts - self._residual).clamp_min(0), bits, group, channels,
        )  # fmt: skip

    def insert(self, keys: Tensor, values: Tensor) -> None:
        """Take in a token of each row, which becomes the `counts`-th, and quantise what has waited long enough."""
        settle_kivi(self.codes, keys, values, self.counts, self._residual)

    def attend(self, queries: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Attention to all tokens; see `attend_kivi`."""
        return attend_kivi(queries, self.codes, scaling=scaling, dtype=queries.dtype)

    def feed(self, row: int, keys: Tensor, values: Tensor, first: int) -> None:
        """Take in tokens that follow those held in a row, `keys` and `values` [G, m, d], the `first` and so on."""
        one, store = slice(row, row + 1), self.codes
        own: dict[str, Any] = {name: part[one] for name, part in vars(store).items() if isinstance(part, Tensor)}
        mine = replace(store, **own)
        for token in range(keys.shape[1]):
            place = slice(token, token + 1)
            positions = torch.full_like(store.lengths[one], first + token)
            settle_kivi(mine, keys[None, :, place], values[None, :, place], positions, self._residual)

    def _coded(self) -> list[Tensor]:
        store = self.codes
        return [store.key_codes, store.key_scales, store.value_codes, store.value_scales]

    @property
    def nbytes(self) -> int:
        """Codes, scales and late tokens."""
        return sum(part.nbytes for part in (*self._coded(), self.codes.late_keys, self.codes.late_values))

    def reads(self, tokens: float) -> int:
        """Bytes of the codes of the tokens that are quantised when there are so many, and of the late tokens."""
        rows = lengths_at(self.counts, tokens)
        keys, values = rows // self._residual * self._residual, (rows - self._residual).clamp_min(0)
        late = self.codes.late_keys.nbytes / self.codes.late_keys.shape[2] * float((2 * rows - keys - values).sum())
        groups = keys // self.codes.group
        counts = [float(count.sum()) for count in (groups, groups, values, values)]
        coded = sum(part.nbytes / part.shape[2] * count for part, count in zip(self._coded(), counts, strict=True))
        return round((coded + late) / rows.numel())


class KIVIPages(FixedTokens):
    """All tokens of a layer in KIVI's format, for selections: those of the window, too, stay in full precision."""

    def __init__(self, options: Any, parts: Sequence[Part], clock: Clock, unit: int, capacity: int) -> None:
        first = parts[0].layer.store.aside
        assert isinstance(first, KIVIBuffer)
        self._tokens = KIVITokens(options, first, clock.positions, capacity, options.residual + unit + 1)
        for part in parts:
            aside = part.layer.store.aside
            assert isinstance(aside, KIVIBuffer)
            aside.hand_over(self._tokens.codes, rows_of(part))
        for part in parts:
            store = part.layer.store
            keys, values, _ = store.static_parts()[0]
            for own, row in enumerate(rows_of(part)):
                self._tokens.feed(row, keys[own], values[own], store.aside_stop)
        key = "kivi", options.residual, unit
        self._leads = key not in clock.shared
        self._counts: _Counts = clock.shared.setdefault(key, _Counts(clock.positions, options.residual, unit))
        counted = {"quantised_keys": self._counts.keys, "quantised_values": self._counts.values}
        self._codes = replace(self._tokens.codes, **counted)

    def insert(self, keys: Tensor, values: Tensor) -> None:
        """Take in a token; codes that are ripe are made, and read once their page has left the window."""
        if self._leads:
            self._counts.count()
        self._tokens.insert(keys, values)

    def attend(self, queries: Tensor, ids: Tensor, unit: int, lengths: Tensor, scaling: float) -> Tensor:
        """Attend to the blocks' codes and late tokens."""
        return attend_kivi_blocks(queries, self._codes, ids, unit=unit, scaling=scaling, dtype=queries.dtype)[0]

    @property
    def nbytes(self) -> int:
        """Codes, scales and late tokens."""
        return self._tokens.nbytes


class _Counts:
    """How many keys and values are codes, counted once a step for all layers."""

    def __init__(self, positions: Tensor, residual: int, unit: int) -> None:
        self._positions, self._residual, self._unit = positions, residual, unit
        self.keys, self.values = torch.zeros_like(positions), torch.zeros_like(positions)

    def count(self) -> None:
        """Count at the step's position: of the tokens that have left the window, whole pages."""
        torch.div(self._positions, self._unit, rounding_mode="floor", out=self.values)
        self.values.mul_(self._unit)
        torch.div(self.values, self._residual, rounding_mode="floor", out=self.keys)
        self.keys.mul_(self._residual)
        self.values.sub_(self._residual).clamp_min_(0)
