"""Inverted lists of product-quantised keys, re-ranked exactly."""

from __future__ import annotations

from typing import Any, ClassVar

import faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvbench.contract.errors import KVBenchError
from kvbench.indexes.base import SearchResult, State, expect, expect_finite, expect_ids
from kvbench.indexes.flat import keep_best
from kvbench.indexes.ivf import IVF, IVFOptions, rescore
from kvbench.indexes.threads import each_head


class IVFPQ(IVF):
    """Inverted lists of product-quantised residuals; the best candidates are scored again with the keys (faiss)."""

    name: ClassVar[str] = "ivfpq"
    summary: ClassVar[str] = "inverted lists of product-quantised keys, re-ranked exactly"
    reference: ClassVar[str] = "Jégou et al., Product Quantization for Nearest Neighbor Search, TPAMI 2011"

    class Options(IVFOptions):
        """Options of `ivfpq`."""

        subspaces: int = Field(16, ge=1, description="8-bit codes per key; divides d")
        refine: int = Field(3, ge=1, description="candidates re-ranked exactly, in multiples of k")

    _in_place: ClassVar[bool] = False
    lists: list[Any]
    codebooks: NDArray[np.float32]
    codes: NDArray[np.uint8]

    def _build(self, queries: NDArray[np.float32] | None) -> None:
        self._check_subspaces()
        self.codebooks = np.empty((self.keys.groups, 256 * self.keys.d), np.float32)
        self.codes = np.empty((self.keys.groups, 0, self.options.subspaces), np.uint8)
        self.lists = [None] * self.keys.groups
        super()._build(queries)

    def _check_subspaces(self) -> None:
        if self.keys.d % self.options.subspaces:
            raise KVBenchError(f"subspaces={self.options.subspaces} does not divide the key dimension {self.keys.d}.")

    def _prepare(self) -> None:
        self._check_subspaces()
        self.codebooks = np.empty((self.keys.groups, 256 * self.keys.d), np.float32)
        self.codes = np.empty((self.keys.groups, self.keys.n, self.options.subspaces), np.uint8)
        self.lists = [None] * self.keys.groups

    @property
    def nbytes(self) -> int:
        """Bytes of centroids, code books, ids (8 each) and codes."""
        if not self.keys.n:
            return 0
        held = self.keys.groups * self.keys.n * (8 + int(self.options.subspaces))
        return self.centroids.nbytes + self.codebooks.nbytes + held

    def _empty_lists(self, centroids: NDArray[np.float32]) -> Any:
        number, d = centroids.shape
        quantizer = faiss.IndexFlatIP(d)
        quantizer.add(centroids)
        lists = faiss.IndexIVFPQ(quantizer, d, number, self.options.subspaces, 8, faiss.METRIC_INNER_PRODUCT)
        lists.is_trained = True
        return lists

    def _train(self, group: int, block: NDArray[np.float32]) -> None:
        self.lists[group] = self._empty_lists(self.centroids[group])
        assigned = faiss.knn(block, self.centroids[group], 1)[1][:, 0]
        residuals = block - self.centroids[group][assigned]
        quantizer = self.lists[group].pq
        quantizer.cp.seed = self.seed + 1
        quantizer.cp.min_points_per_centroid = 1
        quantizer.train(np.resize(residuals, (max(256, len(residuals)), self.keys.d)))
        self.codebooks[group] = faiss.vector_to_array(quantizer.centroids)

    def _insert(self, first: int) -> None:
        self.codes = np.concatenate(
            [self.codes[:, :first], np.empty((self.keys.groups, self.keys.n - first, self.codes.shape[2]), np.uint8)], 1
        )
        super()._insert(first)

    def _add(self, group: int, block: NDArray[np.float32], assigned: NDArray[np.int32], first: int) -> None:
        codes = self.lists[group].pq.compute_codes(block - self.centroids[group][assigned])
        self.codes[group, first:] = codes
        self._add_codes(group, assigned, codes, first)

    def _add_codes(self, group: int, assigned: NDArray[np.int32], codes: NDArray[np.uint8], first: int) -> None:
        lists = self.lists[group]
        for number in np.unique(assigned):
            members = np.flatnonzero(assigned == number)
            ids = members.astype(np.int64) + first
            part = np.ascontiguousarray(codes[members])
            lists.invlists.add_entries(int(number), len(members), faiss.swig_ptr(ids), faiss.swig_ptr(part))
        lists.ntotal += len(assigned)

    def _arrange(self) -> None:
        self._sizes = np.stack([np.bincount(row, minlength=self.centroids.shape[1]) for row in self.assigned])

    def _search(self, queries: NDArray[np.float32], k: int, effort: int, result: SearchResult) -> None:
        keys = self.keys
        number = self.centroids.shape[1]
        nprobe = min(effort, number)
        wanted = min(k * int(self.options.refine), keys.n)
        for lists in self.lists:
            lists.nprobe = nprobe

        def one(head: int) -> None:
            group = head * keys.groups // self.heads
            lists = self.lists[group]
            closeness, probed = lists.quantizer.search(queries[head], nprobe)
            _, ids = lists.search_preassigned(queries[head], wanted, probed, closeness)
            scores = rescore(keys, group, queries[head], ids)
            result.evaluations[head] = number + self._sizes[group][probed].sum(1) + (ids >= 0).sum(1)
            keep_best(ids, scores, result.ids[head], result.scores[head])

        each_head(self.heads, one)

    def _state(self) -> State:
        return super()._state() | {"codebooks": self.codebooks, "codes": self.codes}

    def _restore(self, state: State) -> None:
        keys = self.keys
        if keys.d % self.options.subspaces:
            raise ValueError("subspaces")
        self.centroids = expect_finite(state, "centroids", (keys.groups, None, keys.d))
        self.assigned = expect_ids(state, "assigned", (keys.groups, keys.n), self.centroids.shape[1], lowest=0)
        self.codebooks = expect_finite(state, "codebooks", (keys.groups, 256 * keys.d))
        self.codes = expect(state, "codes", np.uint8, (keys.groups, keys.n, int(self.options.subspaces)))
        self._arrange()
        self.lists = [self._empty_lists(centroids) for centroids in self.centroids]
        for group in range(keys.groups):
            faiss.copy_array_to_vector(self.codebooks[group], self.lists[group].pq.centroids)
            self._add_codes(group, self.assigned[group], self.codes[group], 0)
