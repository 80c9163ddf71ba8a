"""What policies share that hold every token in codes, one vector at a time: their storage, hooks and fixed step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kvbench.contract.budget import LayerBudget
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.step import Clock, FixedStep, Part, lengths_at, rows_of
from kvbench.contract.storage import Storage, StorageFactory, TokenBuffer
from kvbench.kernels.attention import decode
from kvbench.kernels.insert import insert

_PIECES = 8
"""Parts of a prompt that are encoded one after the other, to spare memory."""


class CodedTokens(Storage):
    """Each key and value as a code of its own: bytes [..., w] and what scales them [..., s]."""

    def __init__(self, options: Any, keys: Tensor, values: Tensor) -> None:
        self.options, self.dtype, self.sizes = options, keys.dtype, (keys.shape[3], values.shape[3])
        self._prepare(keys.device)
        self._keys, self._values = (TokenBuffer(*self._encoded(part)) for part in (keys, values))

    def _prepare(self, device: torch.device) -> None:
        """Make what encoding and decoding share."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The codes, uint8 [..., w], of vectors `x` [..., d], and what scales them, [..., s]."""

    @abstractmethod
    def decode(self, codes: Tensor, scales: Tensor, size: int) -> Tensor:
        """The vectors [..., size] that the codes stand for."""

    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pieces = [self.encode(part) for part in x.chunk(_PIECES, dim=2)]
        codes, scales = (torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))
        return codes, scales

    @property
    def length(self) -> int:  # type: ignore[override]
        """Tokens held."""
        return self._keys.length

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self._keys.nbytes + self._values.nbytes

    @property
    def keys(self) -> Tensor:
        """All keys [B, G, t, d], decoded."""
        return self.decode(self._keys.keys, self._keys.values, self.sizes[0]).to(self.dtype)

    @property
    def values(self) -> Tensor:
        """All values [B, G, t, d], decoded."""
        return self.decode(self._values.keys, self._values.values, self.sizes[1]).to(self.dtype)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Encode tokens and add them at the end."""
        self._keys.append(*self.encode(keys))
        self._values.append(*self.encode(values))

    def pick(self, slots: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Decode the tokens in `slots` [B, H or G, k] alone."""
        found = [
            self.decode(*part.pick(slots, heads), size).to(self.dtype)
            for part, size in zip((self._keys, self._values), self.sizes, strict=True)
        ]
        return found[0], found[1]

    def coded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes and scales of the keys, then of the values, each [B, G, t, w]."""
        return self._keys.keys, self._keys.values, self._values.keys, self._values.values

    def emptied(self) -> Self:
        """The same without tokens, for its `encode` and `decode`."""
        made = type(self).__new__(type(self))
        vars(made).update({name: part for name, part in vars(self).items() if not isinstance(part, TokenBuffer)})
        return made


class CodingPolicy(KVCachePolicy):
    """Keeps every token, and the newest as well, in codes; its size follows from its options, so compare by bytes."""

    takes_budget = False
    query_window = 0
    codes: ClassVar[type[CodedTokens]]
    """What holds the tokens."""

    def storage(self, layer: Layer) -> StorageFactory:
        """Codes of all tokens, for any policy that keeps tokens or sets them aside."""
        return partial(self.codes, self.options)

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Encode the prompt."""
        layer.store.set_aside(0, layer.tokens, offload=False, storage=self.storage(layer))

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> None:
        """Encode the new token."""
        layer.store.advance(keys.shape[2])

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Selection:
        """Attend to everything."""
        return Selection(everything=True)

    def fixed_step(self, parts: Sequence[Part], clock: Clock) -> FixedStep | str | None:
        """Codes in place, decoded for the step to memory that all layers share."""
        return CodedStep(parts, clock)


class CodedStep(FixedStep):
    """Encodes the step's token, decodes all tokens to shared memory and attends to them there.

    A kernel that decoded inside attention would read the codes alone; this one writes and reads them decoded as well.
    """

    def __init__(self, parts: Sequence[Part], clock: Clock) -> None:
        layer, first = parts[0].layer, parts[0].layer.store.aside
        assert isinstance(first, CodedTokens)
        self._codes, self._positions, self._scaling = first.emptied(), clock.positions, layer.scaling
        self._room = max(part.layer.tokens for part in parts) + clock.new_tokens
        shape = clock.batch, layer.kv_heads, self._room
        self._held = [part.new_zeros(*shape, part.shape[3]) for part in first.coded()]
        for part in parts:
            aside = part.layer.store.aside
            assert isinstance(aside, CodedTokens)
            for target, given in zip(self._held, aside.coded(), strict=True):
                target[list(rows_of(part)), :, : given.shape[2]] = given
            part.layer.store.release_aside()
        key = "coded", *shape, *first.sizes, first.dtype
        if key not in clock.shared:
            device = clock.positions.device
            clock.shared[key] = [torch.zeros(*shape, size, dtype=first.dtype, device=device) for size in first.sizes]
        self._keys, self._values = clock.shared[key]

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Encode the token, decode everything and attend."""
        key_codes, key_scales, value_codes, value_scales = self._held
        (new_key, key_scale), (new_value, value_scale) = self._codes.encode(keys), self._codes.encode(values)
        insert(key_codes, value_codes, new_key, new_value, self._positions)
        if key_scales.shape[3]:
            insert(key_scales, value_scales, key_scale, value_scale, self._positions)
        self._keys.copy_(self._codes.decode(key_codes, key_scales, self._codes.sizes[0]))
        self._values.copy_(self._codes.decode(value_codes, value_scales, self._codes.sizes[1]))
        lengths = self._positions + 1
        return decode(queries, self._keys, self._values, lengths, scaling=self._scaling, dtype=queries.dtype)[0]

    def bytes(self) -> dict[str, int]:
        """Codes and scales, on the device."""
        return {"resident": sum(part.nbytes for part in self._held), "offloaded": 0, "index": 0}

    def reads(self, tokens: int) -> dict[str, int]:
        """The codes and scales of the tokens that are held at that length."""
        token = sum(part.nbytes for part in self._held) / (self._room * len(self._positions))
        return {"device": round(token * float(lengths_at(self._positions, tokens).float().mean())), "host": 0}

    def changed(self) -> Sequence[Tensor]:
        """Nothing: a repeated step writes the same codes to the same place."""
        return []
