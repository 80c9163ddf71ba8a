"""Fixed decoding steps that many policies share: tokens that only grow in number, and a ring of recent ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbench.contract.step import Clock, FixedStep, Held, Part, hold_static
from kvbench.kernels.attention import decode
from kvbench.kernels.insert import insert


class HeldStep(FixedStep):
    """Attends to all tokens that are held; subclasses say where a new token goes."""

    def __init__(self, parts: Sequence[Part], clock: Clock, spare: int, also: Sequence[str] = ()) -> None:
        self.held: Held = hold_static(parts, clock.batch, spare, also)
        self.scaling = parts[0].layer.scaling

    def attend(self, queries: Tensor) -> Tensor:
        """Attend to the tokens held: output [B, H, 1, d]."""
        held = self.held
        return decode(queries, held.keys, held.values, held.lengths, scaling=self.scaling, dtype=queries.dtype)[0]

    def bytes(self) -> dict[str, int]:
        """Keys and values, on the device."""
        return {"resident": self.held.nbytes, "offloaded": 0, "index": 0}

    def reads(self, tokens: int) -> dict[str, int]:
        """All tokens held."""
        share = float(self.held.lengths.float().mean()) / self.held.keys.shape[2]
        return {"device": round(self.held.nbytes * share), "host": 0}

    def changed(self) -> Sequence[Tensor]:
        """The lengths."""
        return [self.held.lengths]


class GrowingStep(HeldStep):
    """Keeps what the prompt left and every new token: `full`, and policies that evict from the prompt alone."""

    def __init__(self, parts: Sequence[Part], clock: Clock, padding: Tensor | None = None) -> None:
        """`padding` [B]: tokens at the start of each row to leave out."""
        super().__init__(parts, clock, clock.new_tokens)
        held = self.held
        for row, pad in enumerate([] if padding is None else padding.tolist()):
            if pad:
                for tokens in (held.keys, held.values):
                    tokens[row, :, :-pad] = tokens[row, :, pad:].clone()
                held.lengths[row] -= pad
        self._token_bytes = self.held.nbytes // self.held.keys.shape[2]
        self._evicted = float(clock.positions.float().mean() - self.held.lengths.float().mean())

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append and attend."""
        insert(self.held.keys, self.held.values, keys, values, self.held.lengths)
        self.held.lengths.add_(1)
        return self.attend(queries)

    def reads(self, tokens: int) -> dict[str, int]:
        """The tokens held at that length."""
        return {"device": round(self._token_bytes * (tokens - self._evicted)), "host": 0}


class RingStep(HeldStep):
    """Keeps the first `sinks` tokens and a ring of the latest ones: a new token takes the oldest one's place."""

    def __init__(self, parts: Sequence[Part], clock: Clock, sinks: int) -> None:
        super().__init__(parts, clock, 0)
        self._sinks, self._window = sinks, self.held.lengths - sinks
        self._next = torch.zeros_like(self._window)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Replace the oldest token of the ring and attend."""
        insert(self.held.keys, self.held.values, keys, values, self._next + self._sinks)
        self._next.add_(1).remainder_(self._window)
        return self.attend(queries)

    def changed(self) -> Sequence[Tensor]:
        """The ring's place, and the tokens, since one is overwritten."""
        return [self._next, self.held.keys, self.held.values]
