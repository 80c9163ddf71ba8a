"""Inverted lists: k-means over the keys, and the lists of the nearest centroids are scanned."""

from __future__ import annotations

from typing import Any, ClassVar

import faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kvbench.contract.extension import Options
from kvbench.indexes.base import Index, SearchResult, State, expect_finite, expect_ids
from kvbench.indexes.flat import keep_best
from kvbench.indexes.kmeans import kmeans
from kvbench.indexes.threads import each_head


class IVFOptions(Options):
    """Options of the inverted-list indexes."""

    lists: int = Field(0, ge=0, description="number of lists; 0 is one for every 64 keys")
    nprobe: int = Field(16, ge=1, description="lists scanned for a query")
    iterations: int = Field(10, ge=1, le=10_000, description="k-means rounds")


class IVF(Index):
    """Inverted lists of the keys themselves, per key/value head (faiss).

    Keys are clustered and assigned by Euclidean distance; a query probes the lists whose centroids have the largest
    inner product with it.
    """

    name: ClassVar[str] = "ivf"
    summary: ClassVar[str] = "inverted lists of a k-means over the keys"
    reference: ClassVar[str] = "Sivic and Zisserman, Video Google, ICCV 2003; faiss (arXiv:2401.08281)"
    search_parameter: ClassVar[str] = "nprobe"

    class Options(IVFOptions):
        """Options of `ivf`."""

    _exact: ClassVar[bool] = True  # the lists hold the keys, so their scores are final
    centroids: NDArray[np.float32]
    assigned: NDArray[np.int32]
    lists: list[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of centroids, ids (8 each) and the codes or float32 copies in the lists."""
        if not self.keys.n:
            return 0
        return self.centroids.nbytes + sum(self.keys.n * (8 + int(lists.code_size)) for lists in self.lists)

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
        self.lists = [self._empty_lists(one) for one in self.centroids]
        self._prepare()

        def fill(group: int) -> None:
            block = self.keys.float32(group)
            self._train(group, block)
            self._add(group, block, self.assigned[group], 0)

        each_head(self.keys.groups, fill)

    def _prepare(self) -> None:
        """Make room for what the codes in the lists need: nothing for keys themselves."""

    def _build(self, queries: NDArray[np.float32] | None) -> None:
        keys, number = self.keys, self._number
        self.centroids = np.empty((keys.groups, number, keys.d), np.float32)
        self.assigned = np.empty((keys.groups, 0), np.int32)
        self.lists = [None] * keys.groups

        def cluster(group: int) -> None:
            block = keys.float32(group)
            means = faiss.Kmeans(
                keys.d, number, niter=self.options.iterations, seed=self.seed + 1, min_points_per_centroid=1
            )
            means.train(block)
            self.centroids[group] = means.centroids
            self.lists[group] = self._empty_lists(self.centroids[group])
            self._train(group, block)

        each_head(keys.groups, cluster)
        self._insert(0)

    def _insert(self, first: int) -> None:
        keys = self.keys
        added = np.empty((keys.groups, keys.n - first), np.int32)

        def add(group: int) -> None:
            block = keys.float32(group, first)
            added[group] = faiss.knn(block, self.centroids[group], 1)[1][:, 0]
            self._add(group, block, added[group], first)

        each_head(keys.groups, add)
        self.assigned = np.concatenate([self.assigned, added], axis=1)

    def _empty_lists(self, centroids: NDArray[np.float32]) -> Any:
        number, d = centroids.shape
        quantizer = faiss.IndexFlatIP(d)
        quantizer.add(centroids)
        lists = self._new_lists(quantizer, d, number)
        lists.is_trained = True
        return lists

    def _new_lists(self, quantizer: Any, d: int, number: int) -> Any:
        return faiss.IndexIVFFlat(quantizer, d, number, faiss.METRIC_INNER_PRODUCT)

    def _train(self, group: int, block: NDArray[np.float32]) -> None:
        """Learn what the codes in the lists need: nothing for keys themselves."""

    def _add(self, group: int, block: NDArray[np.float32], assigned: NDArray[np.int32], first: int) -> None:
        ids = np.arange(first, first + len(block), dtype=np.int64)
        where = assigned.astype(np.int64)
        self.lists[group].add_core(len(block), faiss.swig_ptr(block), faiss.swig_ptr(ids), faiss.swig_ptr(where))

    def _search(self, queries: NDArray[np.float32], k: int, effort: int, result: SearchResult) -> None:
        keys = self.keys
        number = self.centroids.shape[1]
        nprobe = min(effort, number)
        wanted = min(self._candidates(k), keys.n)
        for lists in self.lists:
            lists.nprobe = nprobe
        sizes = [np.bincount(row, minlength=number) for row in self.assigned]

        def one(head: int) -> None:
            group = head * keys.groups // self.heads
            lists = self.lists[group]
            closeness, probed = lists.quantizer.search(queries[head], nprobe)
            scores, ids = lists.search_preassigned(queries[head], wanted, probed, closeness)
            result.evaluations[head] = number + sizes[group][probed].sum(1)
            if not self._exact:
                scores = rescore(keys.float32(group), queries[head], ids)
                result.evaluations[head] += (ids >= 0).sum(1)
            keep_best(ids, scores, result.ids[head], result.scores[head])

        each_head(self.heads, one)

    def _candidates(self, k: int) -> int:
        return k

    def _state(self) -> State:
        return {"centroids": self.centroids, "assigned": self.assigned}

    def _restore(self, state: State) -> None:
        keys = self.keys
        self.centroids = expect_finite(state, "centroids", (keys.groups, None, keys.d))
        self.assigned = expect_ids(state, "assigned", (keys.groups, keys.n), self.centroids.shape[1], lowest=0)
        self.lists = [self._empty_lists(centroids) for centroids in self.centroids]
        for group in range(keys.groups):
            self._add(group, keys.float32(group), self.assigned[group], 0)


def rescore(block: NDArray[np.float32], queries: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Inner products [q, c] of each query [q, d] with its candidates [q, c] among the keys [n, d]; -inf for id -1."""
    scores = np.einsum("qcd,qd->qc", block[np.maximum(ids, 0)], queries)
    return np.where(ids < 0, np.float32(-np.inf), scores)
