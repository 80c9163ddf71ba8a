"""Hierarchical navigable small world graphs, as faiss builds and searches them."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvbench.contract.extension import Options
from kvbench.indexes.base import Index, SearchResult, State, expect, expect_ids
from kvbench.indexes.flat import keep_best
from kvbench.indexes.threads import each_head

# Its stubs lack HNSW's parameters and statistics.
faiss: Any = _faiss

# faiss counts HNSW's distances in one process-wide object.
_STATISTICS = threading.Lock()


class HNSW(Index):
    """HNSW by inner product, one per key/value head (faiss).

    Evaluations are faiss's own count plus the entry point. They are read query by query from a process-wide counter,
    so searches run one at a time.
    """

    name: ClassVar[str] = "hnsw"
    summary: ClassVar[str] = "hierarchical navigable small world graph over the keys"
    reference: ClassVar[str] = "Malkov and Yashunin, TPAMI 2020 (arXiv:1603.09320)"
    search_parameter: ClassVar[str] = "ef"

    class Options(Options):
        """Options of `hnsw`."""

        degree: int = Field(32, ge=2, le=512, description="links per key (M; twice as many on the lowest level)")
        construction_ef: int = Field(40, ge=1, description="candidate list while building")
        ef: int = Field(128, ge=1, description="candidate list in search; at least k is used")

    indexes: list[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of links, levels and offsets, and of the float32 copy of the keys that faiss keeps."""
        if not self.keys.n:
            return 0
        links = sum(4 * int(index.hnsw.neighbors.size()) for index in self.indexes)
        return links + self.keys.groups * self.keys.n * (12 + 4 * self.keys.d)

    def _new(self) -> Any:
        return faiss.IndexHNSWFlat(self.keys.d, self.options.degree, faiss.METRIC_INNER_PRODUCT)

    def _build(self, queries: NDArray[np.float32] | None) -> None:
        self.indexes = [self._new() for _ in range(self.keys.groups)]
        self._insert(0)

    def _insert(self, first: int) -> None:
        for index in self.indexes:
            # by the number of keys, so that a loaded index draws the same levels
            index.hnsw.rng = faiss.RandomGenerator(self.seed + 1 + first)
            index.hnsw.efConstruction = min(self.options.construction_ef, self.keys.n)
        each_head(self.keys.groups, lambda group: self.indexes[group].add(self.keys.float32(group, first)))

    def _search(self, queries: NDArray[np.float32], k: int, effort: int, result: SearchResult) -> None:
        keys = self.keys
        parameters = faiss.SearchParametersHNSW(efSearch=min(max(effort, k), keys.n))
        wanted = min(k, keys.n)
        with _STATISTICS:
            for head in range(self.heads):
                index = self.indexes[head * keys.groups // self.heads]
                count = queries.shape[1]
                ids, scores = np.empty((count, wanted), np.int64), np.empty((count, wanted), np.float32)
                for i in range(count):
                    faiss.cvar.hnsw_stats.reset()
                    one = slice(i, i + 1)
                    index.search(queries[head, one], wanted, params=parameters, D=scores[one], I=ids[one])
                    result.evaluations[head, i] = faiss.cvar.hnsw_stats.ndis + 1
                keep_best(ids, scores, result.ids[head], result.scores[head])

    def _state(self) -> State:
        links = [faiss.vector_to_array(index.hnsw.neighbors) for index in self.indexes]
        return {
            "levels": np.stack([faiss.vector_to_array(index.hnsw.levels) for index in self.indexes]),
            "links": np.concatenate(links),
            "entry": np.array([index.hnsw.entry_point for index in self.indexes], np.int32),
        }

    def _restore(self, state: State) -> None:
        keys = self.keys
        levels = expect(state, "levels", np.int32, (keys.groups, keys.n))
        links = expect_ids(state, "links", (None,), keys.n)
        entry = expect_ids(state, "entry", (keys.groups,), keys.n, lowest=0)
        self.indexes = [self._new() for _ in range(keys.groups)]
        start = 0
        for group, index in enumerate(self.indexes):
            graph = index.hnsw
            room = faiss.vector_to_array(graph.cum_nneighbor_per_level)
            level = levels[group]
            if level.min() < 1 or level.max() >= len(room) or level[entry[group]] != level.max():
                raise ValueError("levels")
            offsets = np.concatenate([[0], np.cumsum(room[level])]).astype(np.uint64)
            part = links[start : start + int(offsets[-1])]
            start += len(part)
            if len(part) != int(offsets[-1]) or not _levels_fit(part, level, room):
                raise ValueError("links")
            index.storage.add(keys.float32(group))
            faiss.copy_array_to_vector(np.ascontiguousarray(level), graph.levels)
            faiss.copy_array_to_vector(offsets, graph.offsets)
            faiss.copy_array_to_vector(np.ascontiguousarray(part), graph.neighbors)
            graph.entry_point, graph.max_level = int(entry[group]), int(level.max()) - 1
            index.ntotal = keys.n
        if start != len(links):
            raise ValueError("links")


def _levels_fit(links: NDArray[np.int32], levels: NDArray[np.int32], room: NDArray[np.int32]) -> bool:
    """Whether every link on a level leads to a node of that level."""
    per_node = room[levels]
    within = np.arange(len(links)) - np.repeat(np.cumsum(per_node) - per_node, per_node)
    level = np.searchsorted(room, within, side="right") - 1
    return bool(np.all((links < 0) | (levels[np.maximum(links, 0)] > level)))
