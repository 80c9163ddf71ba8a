"""A decoding step of fixed shapes and addresses, which a CUDA graph can hold.

What a policy does at each step is written once more, for all rows of a batch together, in tensors that stay where they
are: lengths and positions lie on the device, capacity is fixed, nothing asks the device for a number. The same code
runs uncaptured on the CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.contract.layer import Layer


@dataclass(frozen=True)
class Part:
    """A lane of one layer, rows of one length, as the policy left it after the prompt; no `rows` are all rows."""

    layer: Layer
    rows: Tensor | None = None


def rows_of(part: Part) -> Sequence[int]:
    """The batch's rows that belong to a part."""
    found: Sequence[int] = range(part.layer.rows) if part.rows is None else part.rows.tolist()
    return found


class Inputs(Protocol):
    """The inputs of a step's attention layers, for policies with `uses_hidden`."""

    def at(self, number: int) -> Tensor:
        """The input [B, 1, D] of layer `number`."""

    def before(self, number: int) -> Tensor | None:
        """The input [B, 1, D] of the full-attention layer before layer `number`; None for the first."""

    def queries_for(self, number: int, hidden: Tensor) -> Tensor:
        """The queries [B, H, 1, d], after rotation, that layer `number` would have for `hidden` [B, 1, D]."""


@dataclass(frozen=True)
class Clock:
    """What the steps of all layers share.

    `positions`, int32 [B] on the model's device: each row's tokens before the step's own, so its token's id; the engine
    counts on after every step. `new_tokens`: how many steps there will be at most. `shared`: a step of the first layer
    may compute here what the further layers' steps read. `inputs`: given to policies with `uses_hidden`.
    """

    positions: Tensor
    new_tokens: int
    shared: dict[Hashable, Any] = field(default_factory=dict, compare=False)
    inputs: Inputs | None = field(default=None, compare=False)

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.positions.shape[0]


def lengths_at(counts: Tensor, tokens: float) -> Tensor:
    """Each row's tokens when their mean is `tokens`, whole numbers like `counts` [...], from how many they are now."""
    return (counts - counts.float().mean() + tokens).round().clamp_min(0).to(counts)


class FixedStep(ABC):
    """One layer's decoding step. Calls must not wait for the device and must use the same tensors each time."""

    @abstractmethod
    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take in the step's `keys` and `values` [B, G, 1, d] and attend: output [B, H, 1, d] in the queries' dtype."""

    def between(self, taken: int) -> None:  # noqa: B027 - most steps leave nothing to do
        """Do what can't be part of a captured step, before the step that is the `taken`-th, counted from 1.

        Called uncaptured, after the steps before; the step's tensors keep their places.
        """

    def held_tokens(self) -> float | None:
        """Tokens held per key/value head, on average, after the latest step; None where it does not count them."""
        return None

    @abstractmethod
    def bytes(self) -> dict[str, int]:
        """Bytes held: `resident`, `offloaded` and `index`."""

    @abstractmethod
    def reads(self, tokens: int) -> dict[str, int]:
        """Fewest bytes that a step reads of what is held, at `tokens` tokens of context a row in the mean.

        `device` from the device's memory, `host` from the host's.
        """

    def hits(self) -> tuple[int, int]:
        """Of the tokens that steps chose from the host: how many a hot set on the device had, and how many there were.

        Both are 0 for a step without one.
        """
        return 0, 0

    @abstractmethod
    def changed(self) -> Sequence[Tensor]:
        """The tensors that a step changes otherwise than by writing the same token to the same place again."""


class SplitStep(FixedStep):
    """One layer's decoding step with the host in its middle, such as a search in the host's memory.

    The device's parts are captured as CUDA graphs of their own. For each layer in turn the engine runs `before` and
    `beside`, waits for `before` alone, runs `search` on the host, and goes on with `after`; while the device is at the
    next layer, the host runs `ahead`. `between` is called before the warm-up steps, too: it must bear to be called for
    the same step again. Call the parts, not the step.
    """

    @abstractmethod
    def before(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """On the device: take in the step's token, and send the host what it needs, to pinned memory."""

    @abstractmethod
    def beside(self) -> None:
        """On the device, while the host searches: attend to what is known without it."""

    @abstractmethod
    def search(self) -> None:
        """On the host, once `before` is done: leave in pinned memory what `after` needs. Repeatable for a step."""

    @abstractmethod
    def after(self) -> Tensor:
        """On the device: fetch what the host found and give the output [B, H, 1, d] in the queries' dtype."""

    def ahead(self) -> None:
        """On the host, once the device is at the next layer: do what the next step's search would have to wait for."""

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All parts in turn, for a device whose work is done when a call returns."""
        self.before(queries, keys, values)
        self.beside()
        self.search()
        return self.after()

    def ended(self) -> None:
        """After a step, or several: let go of what only a step needs, such as threads that wait for its work."""

    def spent(self) -> dict[str, float]:
        """Seconds that the host spent since the last call, by what it did (`search`, `attention`, `insertion`)."""
        return {}

    def apart(self) -> dict[str, float]:
        """Seconds of the device's parts that can't be told within a graph (`transfer`), measured by themselves."""
        return {}


class FixedTokens(ABC):
    """A layer's tokens, all that were ever set aside and the window behind them, in fixed shapes and some format.

    What a policy that holds gives to one that selects (`KVCachePolicy.fixed_tokens`).
    """

    @abstractmethod
    def insert(self, keys: Tensor, values: Tensor) -> None:
        """Take in each row's token, `keys` and `values` [B, G, 1, d], at the clock's position."""

    @abstractmethod
    def attend(self, queries: Tensor, ids: Tensor, unit: int, lengths: Tensor, scaling: float) -> Tensor:
        """Attend to the blocks `ids`, int32 [B, H, k], of `unit` tokens, −1 none: output [B, H, 1, d].

        Each row has `lengths`, int32 [B], tokens, that of the step included.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held, on the device."""


@dataclass
class Held:
    """Static sets of all rows in one place: `keys`, `values` [B, G, t, d], of which `lengths` int32 [B, G] count.

    `ids`, int32 [B, G, t], are the tokens' ids, −1 beyond the length; `also` what was asked for beside them.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    ids: Tensor
    also: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes


def hold_static(parts: Sequence[Part], batch: int, spare: int, also: Sequence[str] = ()) -> Held:
    """Bring the static sets of a layer's parts together, with room for `spare` more tokens, and empty their stores.

    `also` names tensors [B, G, t] of `layer.state` in the store's slot order, which go along (0 beyond the length).
    Where one part holds all rows and its memory has the room already, nothing is copied.
    """
    first = parts[0].layer
    longest = max(int(part.layer.store.static_ids.shape[-1]) for part in parts)
    slot_ids = first.store.static_ids
    if len(parts) == 1 and not first.store.ragged:
        keys, values = first.store.release_static(spare)
        device = keys.device
        lengths = torch.full((batch, first.kv_heads), longest, dtype=torch.int32, device=device)
        ids = torch.full((batch, first.kv_heads, keys.shape[2]), -1, dtype=torch.int32, device=device)
        ids[:, :, :longest] = slot_ids.int()
        spread = {name: functional.pad(first.state[name], (0, keys.shape[2] - longest)) for name in also}
        return Held(keys, values, lengths, ids, spread)
    sample, sample_values, _ = first.store.static_parts()[0]
    shape, capacity = (batch, first.kv_heads), longest + spare
    keys, values = (sample.new_zeros(*shape, capacity, like.shape[-1]) for like in (sample, sample_values))
    lengths = torch.zeros(shape, dtype=torch.int32, device=sample.device)
    ids = torch.full((*shape, capacity), -1, dtype=torch.int32, device=sample.device)
    more = {name: first.state[name].new_zeros(*shape, capacity) for name in also}
    for part in parts:
        store = part.layer.store
        rows = slice(None) if part.rows is None else part.rows.to(sample.device)
        own = store.static_ids.expand(part.layer.rows, first.kv_heads, -1)
        # padding goes to the end
        order = (own < 0).to(torch.uint8).argsort(dim=-1, stable=True)
        pieces = store.static_parts()
        whole = torch.cat([piece[0] for piece in pieces], dim=2), torch.cat([piece[1] for piece in pieces], dim=2)
        for target, joined in zip((keys, values), whole, strict=True):
            places = order[..., None].expand(-1, -1, -1, joined.shape[3])
            target[rows, :, : own.shape[2]] = joined.gather(2, places)
        ids[rows, :, : own.shape[2]] = own.gather(-1, order).int()
        for name, tensor in more.items():
            spread_out = part.layer.state[name].expand_as(own).masked_fill(own < 0, 0)
            tensor[rows, :, : own.shape[2]] = spread_out.gather(-1, order)
        lengths[rows] = (own >= 0).sum(-1).int()
        store.release_static(0)
    return Held(keys, values, lengths, ids, more)
