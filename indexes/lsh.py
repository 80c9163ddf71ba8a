"""Hash tables over keys: locality-sensitive hashing by random hyperplanes, in chains that grow as keys come."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbench.contract.saved import Saveable
from kvbench.indexes.compiled import kernel
from kvbench.indexes.threads import on_threads

BLOCK = 2**22
"""Signs computed at a time."""


class HashTables(Saveable):
    """`tables` hash tables of `bits` signs each over keys [g, n, d], on the CPU (SimHash: Charikar 2002).

    All tables' hyperplanes are the same for every group of keys. Two vectors at the angle θ share a table's bucket with
    probability (1 − θ/π)^bits.
    """

    def __init__(self, groups: int, d: int, *, bits: int, tables: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.bits, self.tables, self.n = bits, tables, 0
        self.planes = torch.randn(d, tables * bits, generator=random)
        self._newest: NDArray[np.int32] = np.full((groups, tables, 2**bits), -1, np.int32)
        self._older: NDArray[np.int32] = np.empty((groups, tables, 0), np.int32)

    def saved(self) -> dict[str, Any]:
        """All attributes; room that no key uses is emptied first."""
        self._older[:, :, self.n :] = -1
        return super().saved()

    @classmethod
    def restored(cls, parts: dict[str, Any]) -> Self:
        """The tables as they were; ValueError where a chain leads to a key that is not there, or never ends."""
        made = super().restored(parts)
        newest, older, order = made._newest, made._older, np.arange(made.n)
        shape = (newest.shape[0], made.tables, 2**made.bits)
        if newest.dtype != np.int32 or older.dtype != np.int32 or newest.shape != shape:
            raise ValueError("hash tables of another shape")
        if older.shape[:2] != shape[:2] or older.shape[2] < made.n or newest.max(initial=-1) >= made.n:
            raise ValueError("hash tables that do not fit together")
        if (older[:, :, : made.n] >= order).any() or made.planes.shape[1] != made.tables * made.bits:
            raise ValueError("hash tables that do not fit together")
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of hyperplanes, buckets and chains, spare room included."""
        return self.planes.nbytes + self._newest.nbytes + self._older.nbytes

    def insert(self, keys: Tensor) -> None:
        """Add keys [g, m, d]; their ids continue from n."""
        stop = self.n + keys.shape[1]
        if stop > self._older.shape[2]:
            grown = np.empty((*self._older.shape[:2], stop + max(64, stop // 16)), np.int32)
            grown[:, :, : self.n] = self._older[:, :, : self.n]
            self._older = grown
        for group, mine in enumerate(keys):
            _chain(self._codes(mine), self.n, self._newest[group], self._older[group])
        self.n = stop

    def collisions(self, queries: Tensor, least: int) -> list[NDArray[np.int32]]:
        """For each of queries [h, d], h a multiple of g, ids of the keys that share `least` of its buckets or more."""
        codes = self._codes(queries)
        share = len(queries) // len(self._newest)
        found: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * len(queries)

        def some(part: int, parts: int) -> None:
            counts = np.zeros(self.n, np.uint16)
            for head in range(part, len(queries), parts):
                group = head // share
                counts[:] = 0
                found[head] = _count(codes[head], self._newest[group], self._older[group], counts, least)

        on_threads(some, len(queries))
        return found

    def _codes(self, vectors: Tensor) -> NDArray[np.int32]:
        """Bucket numbers [m, tables] of vectors [m, d]."""
        powers = 2.0 ** torch.arange(self.bits)
        step = max(BLOCK // self.planes.shape[1], 1)
        parts = [
            ((block @ self.planes) > 0).view(len(block), self.tables, self.bits).float() @ powers
            for block in torch.split(vectors.float().cpu(), step)
        ]
        codes: NDArray[np.int32] = torch.cat(parts).int().numpy()
        return codes


def collision_probability(cosines: Tensor, bits: int, tables: int) -> Tensor:
    """Probability, float64, that vectors at these cosines share a bucket in two or more of the tables (MagicPIG)."""
    one = (1 - cosines.double().clamp(-1, 1).acos() / math.pi) ** bits
    return 1 - (1 - one) ** tables - tables * one * (1 - one) ** (tables - 1)


@kernel
def _chain(codes: Any, first: int, newest: Any, older: Any) -> None:
    for table in range(codes.shape[1]):
        for i in range(codes.shape[0]):
            bucket = codes[i, table]
            older[table, first + i] = newest[table, bucket]
            newest[table, bucket] = first + i


@kernel
def _count(codes: Any, newest: Any, older: Any, counts: Any, least: int) -> Any:
    found = np.empty(len(counts), np.int32)
    number = 0
    for table in range(len(codes)):
        i = newest[table, codes[table]]
        while i >= 0:
            counts[i] += 1
            if counts[i] == least:
                found[number] = i
                number += 1
            i = older[table, i]
    return np.sort(found[:number])
