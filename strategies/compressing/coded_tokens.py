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
from kvbench.kernels.codes import CodedStore, Layout, attend_codes, decoded
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

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """What the bytes of the codes stand for."""

    def turn(self, size: int) -> Tensor | None:
        """The orthogonal matrix [d, d] that vectors of `size` numbers were multiplied with before, float32; or None."""
        return None

    def decode(self, codes: Tensor, scales: Tensor, size: int) -> Tensor:
        """The vectors [..., size] that the codes stand for."""
        found, turn = decoded(codes, scales, self.layout), self.turn(size)
        return found if turn is None else found @ turn.T

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
        """Codes in place, which a kernel attends to."""
        return CodedStep(parts, clock)


class CodedStep(FixedStep):
    """Encodes the step's token and attends to the codes, which a kernel decodes as it reads them.

    Where vectors were turned before they were coded, so is the query, and the output is turned back.
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
        self._turns = [self._codes.turn(size) for size in first.sizes]

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Encode the token and attend to all codes."""
        key_codes, key_scales, value_codes, value_scales = self._held
        (new_key, key_scale), (new_value, value_scale) = self._encoded(keys, values)
        insert(key_codes, value_codes, new_key, new_value, self._positions)
        if key_scales.shape[3]:
            insert(key_scales, value_scales, key_scale, value_scale, self._positions)
        turn, back = self._turns
        asked = queries if turn is None else (queries.float() @ turn).to(queries.dtype)
        store = CodedStore(
            key_codes, key_scales, value_codes, value_scales, self._positions + 1, self._codes.layout, self._codes.sizes
        )
        dtype = queries.dtype if back is None else torch.float32
        output = attend_codes(asked, store, scaling=self._scaling, dtype=dtype)[0]
        return output if back is None else (output @ back.T).to(queries.dtype)

    def _encoded(self, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Codes and scales of both, at once where they are alike."""
        if keys.shape != values.shape:
            return [self._codes.encode(keys), self._codes.encode(values)]
        codes, scales = self._codes.encode(torch.stack([keys, values]))
        return list(zip(codes, scales, strict=True))

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
