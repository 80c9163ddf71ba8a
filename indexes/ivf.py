"""Inverted lists: k-means over the keys, and the lists of the nearest centroids are scanned."""

from __future__ import annotations

from typing import ClassVar

import faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kvbench.contract.extension import Options
from kvbench.indexes.base import Index, SearchResult, State, expect_finite, expect_ids
from kvbench.indexes.kmeans import kmeans
from kvbench.indexes.lists import arrange_lists, place_keys, search_lists
from kvbench.indexes.storage import KeyStore
from kvbench.indexes.threads import each_head, on_threads

FEW = 64
"""Keys at most that are inserted one by one, in place."""


class IVFOptions(Options):
    """Options of the inverted-list indexes."""

    lists: int = Field(0, ge=0, description="number of lists; 0 is one for every 64 keys")
    nprobe: int = Field(16, ge=1, description="lists scanned for a query")
    iterations: int = Field(10, ge=1, le=10_000, description="k-means rounds")


class IVF(Index):
    """Inverted lists of the keys themselves, per key/value head; k-means by faiss.

    Keys are clustered and assigned by Euclidean distance; a query probes the lists whose centroids have the largest
    inner product with it.
    """

    name: ClassVar[str] = "ivf"
    summary: ClassVar[str] = "inverted lists of a k-means over the keys"
    reference: ClassVar[str] = "Sivic and Zisserman, Video Google, ICCV 2003; faiss (arXiv:2401.08281)"
    search_parameter: ClassVar[str] = "nprobe"

    class Options(IVFOptions):
        """Options of `ivf`."""

    _in_place: ClassVar[bool] = True  # the lists hold ids alone
    centroids: NDArray[np.float32]
    assigned: NDArray[np.int32]
    half_norms: NDArray[np.float32]
    begins: NDArray[np.int64]
    sizes: NDArray[np.int64]
    members: NDArray[np.int32]

    @property
    def nbytes(self) -> int:
        """Bytes of centroids and their norms, of each key's list, and of the lists' ids with an eighth of room."""
        if not self.keys.n:
            return 0
        groups, number, d = map(int, self.centroids.shape)
        return groups * (4 * number * (d + 1) + 4 * self.keys.n + 4 * room(self.keys.n, number) + 8 * (2 * number + 1))

    @property
    def _number(self) -> int:
        """Number of lists."""
        return min(self.options.lists or max(1, self.keys.n // 64), self.keys.n)

    @property
    def builds_on_device(self) -> bool:
        """The centroids and the keys' assignments to them."""
        return True

    def _build_on(self, keys: Tensor, queries: Tensor | None) -> None:
        centroids, assigned = kmeans(keys, self._number, int(self.options.iterations))
        self.centroids, self.assigned = centroids.cpu().numpy(), assigned.int().cpu().numpy()
        self._prepare()
        if not self._in_place:

            def fill(group: int) -> None:
                block = self.keys.float32(group)
                self._train(group, block)
                self._add(group, block, self.assigned[group], 0)

            each_head(self.keys.groups, fill)
        self._arrange()

    def _prepare(self) -> None:
        """Make room for what the lists hold besides ids: nothing here."""

    def _build(self, queries: NDArray[np.float32] | None) -> None:
        keys, number = self.keys, self._number
        self.centroids = np.empty((keys.groups, number, keys.d), np.float32)
        self.assigned = np.empty((keys.groups, 0), np.int32)

        def cluster(group: int) -> None:
            block = keys.float32(group)
            means = faiss.Kmeans(
                keys.d, number, niter=self.options.iterations, seed=self.seed + 1, min_points_per_centroid=1
            )
            means.train(block)
            self.centroids[group] = means.centroids
            self._train(group, block)

        each_head(keys.groups, cluster)
        self._insert(0)

    def _insert(self, first: int) -> None:
        keys = self.keys
        if self._in_place and first > 0 and keys.n - first <= FEW:
            self._insert_few(first)
            return
        added = np.empty((keys.groups, keys.n - first), np.int32)

        def add(group: int) -> None:
            block = keys.float32(group, first)
            added[group] = faiss.knn(block, self.centroids[group], 1)[1][:, 0]
            self._add(group, block, added[group], first)

        each_head(keys.groups, add)
        self.assigned = np.concatenate([self.assigned[:, :first], added], axis=1)
        self._arrange()

    def reserve(self, count: int) -> None:
        """Make room for `count` more keys, and compile the insertion."""
        if self._in_place and self.keys.n:
            self._insert_few(self.keys.n, count)

    def _insert_few(self, first: int, more: int = 0) -> None:
        keys = self.keys
        if keys.n + more > self.assigned.shape[1]:
            grown = np.empty((keys.groups, keys.n + max(64, keys.n // 16, more)), np.int32)
            grown[:, :first] = self.assigned[:, :first]
            self.assigned = grown
        full = np.zeros(keys.groups, np.uint8)
        on_threads(
            place_keys, keys.groups, keys.rows, keys.stride, first, keys.n, self.centroids, self.half_norms,
            self.assigned, self.begins, self.sizes, self.members, full,
        )  # fmt: skip
        if full.any():
            self._arrange()

    def _train(self, group: int, block: NDArray[np.float32]) -> None:
        """Learn what the codes in a group's lists need: nothing for keys themselves."""

    def _add(self, group: int, block: NDArray[np.float32], assigned: NDArray[np.int32], first: int) -> None:
        """Put keys that were assigned to lists there, where the lists hold more than ids."""

    def _arrange(self) -> None:
        """Bring the ids of each list together, with some room for more."""
        keys, number = self.keys, self.centroids.shape[1]
        self.begins = np.empty((keys.groups, number + 1), np.int64)
        self.sizes = np.empty((keys.groups, number), np.int64)
        self.members = np.empty((keys.groups, room(keys.n, number)), np.int32)
        self.half_norms = (self.centroids.astype(np.float32) ** 2).sum(2) / np.float32(2)
        on_threads(arrange_lists, keys.groups, self.assigned, keys.n, self.begins, self.sizes, self.members)

    def _search(self, queries: NDArray[np.float32], k: int, effort: int, result: SearchResult) -> None:
        keys = self.keys
        on_threads(
            search_lists,
            self.heads * queries.shape[1],
            keys.rows,
            keys.stride,
            queries,
            self.centroids,
            self.begins,
            self.sizes,
            self.members,
            min(effort, self.centroids.shape[1]),
            *result,
            least=2,
        )

    def _state(self) -> State:
        return {"centroids": self.centroids, "assigned": self.assigned[:, : self.keys.n]}

    def _restore(self, state: State) -> None:
        keys = self.keys
        self.centroids = expect_finite(state, "centroids", (keys.groups, None, keys.d))
        self.assigned = expect_ids(state, "assigned", (keys.groups, keys.n), self.centroids.shape[1], lowest=0)
        self._arrange()


def room(n: int, number: int) -> int:
    """Places in `number` lists of n keys, where each has room for an eighth more and four."""
    return n + n // 8 + 4 * number


def rescore(keys: KeyStore, group: int, queries: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Inner products [q, c] of each query [q, d] with its candidates [q, c] among a group's keys; -inf for id -1."""
    scores = np.einsum("qcd,qd->qc", keys.pick(group, np.maximum(ids, 0)), queries)
    return np.where(ids < 0, np.float32(-np.inf), scores)
