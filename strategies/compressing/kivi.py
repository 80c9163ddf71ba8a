"""KIVI (arXiv 2402.02750): 2-bit keys per channel, 2-bit values per token, recent tokens in full precision."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvbench.contract import attention
from kvbench.contract.budget import LayerBudget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import Options
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part
from kvbench.contract.storage import Storage, StorageFactory, TokenBuffer
from kvbench.kernels.kivi import KIVICodes, attend_kivi
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


class _KIVIBuffer(Storage):
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
    def value_group(self) -> int:
        """Channels that share a scale."""
        return self._value_group

    def hand_over(self, store: KIVICodes, rows: slice | Tensor) -> None:
        """Copy everything into the `rows` of a store of fixed shapes, whose late tokens lie in a ring."""
        for known, codes, scales in (
            (self._key_groups, store.key_codes, store.key_scales),
            (self._value_rows, store.value_codes, store.value_scales),
        ):
            if known is not None:
                codes[rows, :, : known.length], scales[rows, :, : known.length] = known.keys, known.values
        ring = store.late_keys.shape[2]
        for late, target in ((self._late_keys, store.late_keys), (self._late_values, store.late_values)):
            slots = torch.arange(self.length - late.shape[2], self.length, device=late.device) % ring
            spread = target[rows]
            spread[:, :, slots] = late
            target[rows] = spread

    @property
    def nbytes(self) -> int:
        late = self._late_keys.untyped_storage().nbytes() + self._late_values.untyped_storage().nbytes()
        return late + sum(part.nbytes for part in (self._key_groups, self._value_rows) if part is not None)

    def _parts(self, rows: TokenBuffer, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, G, t, s, group], scales and minima [B, G, t, s]."""
        scale, low = rows.values.chunk(2, dim=-1)
        return unpack(rows.keys, self._bits).view(*scale.shape, group), scale.float(), low.float()

    @property
    def keys(self) -> Tensor:
        if self._key_groups is None:
            return self._late_keys
        codes, scale, low = self._parts(self._key_groups, self._group)
        old = (codes * scale[..., None] + low[..., None]).transpose(-1, -2).flatten(2, 3)
        return torch.cat([old.to(self._late_keys.dtype), self._late_keys], dim=2)

    @property
    def values(self) -> Tensor:
        if self._value_rows is None:
            return self._late_values
        codes, scale, low = self._parts(self._value_rows, self._value_group)
        old = (codes * scale[..., None] + low[..., None]).flatten(3)
        return torch.cat([old.to(self._late_values.dtype), self._late_values], dim=2)

    def scores(self, queries: Tensor, scaling: float) -> Tensor:
        late = attention.scores(queries, self._late_keys, scaling)
        if self._key_groups is None:
            return late
        codes, scale, low = self._parts(self._key_groups, self._group)
        grouped = queries.float().view(*codes.shape[:2], 1, -1, queries.shape[3])
        old = (grouped * scale[:, :, :, None]) @ codes.float() + grouped @ low[..., None]
        return torch.cat([old.transpose(2, 3).reshape(*queries.shape[:2], -1) * scaling, late], dim=-1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        split = weights.shape[2] - self._late_values.shape[2]
        late = attention.weighted_sum(weights[..., split:], self._late_values)
        if self._value_rows is None:
            return late
        codes, scale, low = self._parts(self._value_rows, self._value_group)
        grouped = weights[..., :split].view(*codes.shape[:2], -1, split)
        old = grouped @ codes.float().mul_(scale[..., None]).flatten(3)
        old += (grouped @ low).repeat_interleave(self._value_group, dim=-1)
        return late + old.view(late.shape)


class KIVI(KVCachePolicy):
    """Keeps every token: old ones in 2 bits, the last 128 or so in full precision.

    Its size follows from its options, so it takes no budget of tokens; compare by bytes. Scales and minima are float16,
    and count. Values of heads with fewer than `group` channels have one group.
    """

    name = "kivi"
    summary = "Keeps every token, old ones in 2 bits: keys quantised per channel, values per token."
    reference = "Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750"
    takes_budget = False
    never_exact = "keys and values are held in few bits"
    query_window = 0

    class Options(Options):
        """Options of KIVI."""

        bits: Literal[2, 4, 8] = Field(2, description="bits of a quantised number")
        group: int = Field(32, ge=8, multiple_of=8, description="numbers that share a scale and a minimum")
        residual: int = Field(128, ge=8, description="recent tokens in full precision; a multiple of group")

    def storage(self, layer: Layer) -> StorageFactory:
        """Codes of all but the residual, for any policy that sets tokens aside."""
        if self.options.residual % self.options.group or layer.head_dim % min(self.options.group, layer.head_dim):
            raise KVBenchError(
                f"KIVI's residual of {self.options.residual} tokens and the heads' {layer.head_dim} channels are not "
                f"both multiples of the group of {self.options.group}: choose -o group and -o residual accordingly."
            )
        return partial(_KIVIBuffer, self.options)

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Quantise all but the residual."""
        layer.store.set_aside(0, layer.tokens, offload=False, storage=self.storage(layer))

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | None:
        """Codes in place; late tokens in a ring."""
        return KIVIStep(parts, clock, self.options)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Hand the new token to the quantised storage, which keeps it in full precision for a while."""
        layer.store.advance(keys.shape[2])

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Attend to everything."""
        return Selection(everything=True)


class KIVIStep(FixedStep):
    """KIVI's step in fixed shapes: a kernel takes the token in and quantises, another attends to the codes."""

    def __init__(self, parts: Sequence[Part], clock: Clock, options: Any) -> None:
        layer, first = parts[0].layer, parts[0].layer.store.aside
        assert isinstance(first, _KIVIBuffer)
        self._positions, self._residual, self._scaling = clock.positions, options.residual, layer.scaling
        device, shape, dim = clock.positions.device, (clock.batch, layer.kv_heads), layer.head_dim
        bits, group, channels = options.bits, options.group, first.value_group
        tokens = max(part.layer.tokens for part in parts) + clock.new_tokens
        values = max(tokens - self._residual, 1)
        groups = max(tokens // self._residual, 1) * (self._residual // group)
        codes = partial(torch.zeros, dtype=torch.uint8, device=device)
        scales = partial(torch.zeros, dtype=torch.float16, device=device)
        counts = partial(torch.zeros, clock.batch, dtype=torch.int32, device=device)
        late = partial(torch.zeros, *shape, self._residual + 1, dim, dtype=first.dtype, device=device)
        self._store = KIVICodes(
            codes(*shape, groups, dim * group * bits // 8), scales(*shape, groups, 2 * dim),
            codes(*shape, values, dim * bits // 8), scales(*shape, values, 2 * dim // channels),
            late(), late(), counts(), counts(), counts(), bits, group, channels,
        )  # fmt: skip
        for part in parts:
            aside = part.layer.store.aside
            assert isinstance(aside, _KIVIBuffer)
            aside.hand_over(self._store, slice(None) if part.rows is None else part.rows.to(device))
            part.layer.store.release_aside()

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take the token in, quantise what has waited long enough, and attend to everything."""
        settle_kivi(self._store, keys, values, self._positions, self._residual)
        return attend_kivi(queries, self._store, scaling=self._scaling, dtype=queries.dtype)[0]

    def _coded(self) -> list[Tensor]:
        store = self._store
        return [store.key_codes, store.key_scales, store.value_codes, store.value_scales]

    def bytes(self) -> dict[str, int]:
        """Codes, scales and late tokens, on the device."""
        held = sum(part.nbytes for part in (*self._coded(), self._store.late_keys, self._store.late_values))
        return {"resident": held, "offloaded": 0, "index": 0}

    def reads(self, tokens: int) -> dict[str, int]:
        """The codes of the tokens that are quantised at that length, and the late tokens."""
        keys, values = tokens // self._residual * self._residual, max(tokens - self._residual, 0)
        counts = (keys // self._store.group, keys // self._store.group, values, values)
        coded = sum(part.nbytes // part.shape[2] * count for part, count in zip(self._coded(), counts, strict=True))
        late = self._store.late_keys.nbytes // self._store.late_keys.shape[2]
        return {"device": coded + late * (2 * tokens - keys - values), "host": 0}

    def changed(self) -> Sequence[Tensor]:
        """Nothing: lengths follow from the positions, and a repeated step writes the same codes to the same place."""
        return []
