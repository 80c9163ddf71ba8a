"""The key/value store of one layer: a static set, a set-aside set (resident or offloaded), and the bytes of each.

Tokens are named by their position in the context, 0 to `tokens` − 1. Every stored token is either *static* (attended
at every step) or *set aside* (attended when a policy selects it); evicted tokens are gone from memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.contract.buffers import (
    Expand,
    RaggedBuffer,
    Storage,
    StorageFactory,
    TokenBuffer,
    pick,
)
from kvbench.contract.host import beside, copy_to_host, event, pins, wait
from kvbench.contract.static_set import StaticSet

__all__ = ["Expand", "KVStore", "RaggedBuffer", "Storage", "StorageFactory", "TokenBuffer", "pick"]

HOST = torch.device("cpu")
ROOM = 64
"""Tokens that pinned memory has room for beside those offloaded, or a sixteenth of these where that is more: a decoding
step in fixed shapes adds to it in place."""


class KVStore(StaticSet):
    """Keys and values of one layer for rows of equal length: the static set, and the tokens set aside."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Hold a whole prompt, `keys` and `values` [B, G, n, d], as the static set."""
        super().__init__(keys, values)
        self._held_aside: Storage | None = None
        self._arrived: torch.cuda.Event | None = None
        self.aside_start = self.aside_stop = 0
        self._offloaded = False
        self._device = keys.device
        self.index_bytes = 0
        self.storage: StorageFactory = TokenBuffer
        """What makes the storage of tokens that are set aside without one."""

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def _aside(self) -> Storage | None:
        """The set-aside tokens, once they have arrived."""
        if self._arrived is not None:
            wait(self._arrived)
            self._arrived = None
        return self._held_aside

    @_aside.setter
    def _aside(self, storage: Storage | None) -> None:
        self._held_aside = storage

    @property
    def holds_aside(self) -> bool:
        """Whether the set-aside tokens are here: some were, and no other structure has taken them over."""
        return self._aside is not None

    @property
    def aside(self) -> Storage:
        """The set-aside tokens `aside_start` to `aside_stop` − 1, in order, where they lie."""
        assert self._aside is not None, "no tokens are set aside"
        return self._aside

    @property
    def aside_keys(self) -> Tensor:
        """Keys [B, G, m, d] of the set-aside tokens, in order, where they lie."""
        return self.aside.keys

    @property
    def aside_values(self) -> Tensor:
        """Values [B, G, m, d] of the set-aside tokens, in order, where they lie."""
        return self.aside.values

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Copy the set-aside tokens `ids` [B, H or G, k] (−1 gives any token) as keys and values [B, H or G, k, d].

        The copies lie where the tokens lie: on the host where they are offloaded, unless the storage brings them back.
        """
        assert self._aside is not None, "a policy selected tokens, but set none aside"
        slots = (ids.to(self._device) - self.aside_start).clamp_min(0)
        return self._aside.pick(slots, ids.shape[1])

    @property
    def resident_bytes(self) -> int:
        """Bytes on the model's device."""
        ragged = self._ragged.nbytes if self._ragged is not None else 0
        aside = 0 if self._held_aside is None else self._held_aside.nbytes - self.offloaded_bytes
        return self._static.nbytes + ragged + aside

    @property
    def offloaded_bytes(self) -> int:
        """Bytes in the host's memory, the set-aside tier of policies that offload."""
        held = self._held_aside
        return held.nbytes - held.resident_bytes if held is not None and self._offloaded else 0

    # -- what policies do --------------------------------------------------------------------------------------------

    def set_aside(self, start: int, stop: int, *, offload: bool, storage: StorageFactory | None = None) -> None:
        """Move the prompt's tokens `start` to `stop` − 1 out of the static set, to the host where `offload`.

        `storage` (by default the store's own) makes what holds them from then on, from copies of their keys and values
        [B, G, t, d] on the device where they shall lie. Called once, in `prefill` or `after_prompt`; later tokens
        follow with `advance`.
        ValueError where tokens were set aside before, or where one of these is not static in every head.
        """
        if self._aside is not None:
            raise ValueError(f"tokens {self.aside_start} to {self.aside_stop - 1} were set aside before")
        if storage is not None and self.storage is not TokenBuffer:
            raise ValueError("the policy holds tokens in a format of its own, so another policy cannot hold them")
        if storage is None and self.storage is not TokenBuffer:
            storage = self.storage
        if not 0 <= start <= stop <= self.tokens:
            raise ValueError(f"tokens {start} to {stop - 1} cannot be set aside: there are {self.tokens} tokens")
        ids = self._static_ids
        device = HOST if offload else ids.device
        if self._ragged is None and ids.shape == (self.tokens,) and bool((ids.diff() > 0).all()):
            keys, values = self._static.raw
            parts = keys[:, :, start:stop], values[:, :, start:stop]
            moved = parts if storage is None else self.decode(*parts)
            pinned = offload and pins(ids.device)
            room = max(ROOM, (stop - start) // 16) if pinned and storage is None and type(self) is KVStore else 0
            if pinned:
                with beside(*moved):  # the device goes on meanwhile
                    aside_keys, aside_values = (copy_to_host(part, room) for part in moved)
                    arrived = event()
                    arrived.record()
            else:
                aside_keys, aside_values = (part.to(device, copy=True) for part in moved)
            rest = torch.cat([ids[:start], ids[stop:]])
            self._static, self._static_ids = self._buffer(keys[:, :, rest], values[:, :, rest]), rest
            if room:
                self._arrived = arrived
                self._aside = TokenBuffer(aside_keys, aside_values, length=stop - start)
            else:
                if pinned:
                    wait(arrived)
                self._aside = (storage or self._buffer)(aside_keys, aside_values)
        else:
            slots = self._slots(torch.arange(start, stop, device=ids.device))
            aside_keys, aside_values = (part.to(device) for part in self._picked(slots))
            self._drop(slots)
            self._aside = (storage or TokenBuffer)(aside_keys, aside_values)
        self._device, self._offloaded = device, offload
        self.aside_start, self.aside_stop = start, stop

    def advance(self, count: int) -> tuple[Tensor, Tensor]:
        """Move the `count` oldest tokens of the window from the static to the set-aside set.

        Returns their keys and values [B, G, count, d].
        """
        if self._aside is None:
            raise ValueError("no tokens are set aside")
        slots = self._slots_of(self.aside_stop, count)
        keys, values = self._picked(slots)
        if slots.dim() == 1 and isinstance(self._aside, type(self._static)):
            held_keys, held_values = self._static.raw
            self._aside.append(held_keys[:, :, slots], held_values[:, :, slots])
        else:
            self._aside.append(keys, values)
        self.aside_stop += count
        self._drop(slots)
        return keys, values

    def release_aside(self) -> None:
        """Forget the set-aside tokens, which another structure has taken over."""
        self._aside = None
