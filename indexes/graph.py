"""What the graph indexes share: storage, search over all heads in one call, SQ8 codes, state."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvbench.extension import Options
from kvbench.indexes.base import Index, SearchResult, State, expect, expect_ids
from kvbench.indexes.kernels import quantize_rows, search_graph


class GraphOptions(Options):
    """Options of every graph index."""

    ef: int = Field(128, ge=1, description="length of the candidate list in search; at least k is used")
    sq8: bool = Field(False, description="walk the graph on 8-bit codes and re-rank the candidate list exactly")


class GraphIndex(Index):
    """A graph index: `graph` [S, capacity, degree] holds S graphs, each shared by H // S query heads.

    Searches enter at the keys listed with the query's nearest centroids: `centroids` [S, C, d], `entries` [S, C, E].
    """

    search_parameter = "ef"
    graph: NDArray[np.int32]
    centroids: NDArray[np.float32]
    entries: NDArray[np.int32]
    probes = 1

    @property
    def nbytes(self) -> int:
        """Bytes of links, entry points and codes."""
        if not self.keys.n:
            return 0
        return sum(array.nbytes for array in self._state().values())

    @property
    def graphs(self) -> int:
        """Number of graphs: one per query head if they learn from its queries, else one per key/value head."""
        return self.heads if self.uses_queries else self.keys.groups

    def _search(self, queries: NDArray[np.float32], k: int, effort: int, result: SearchResult) -> None:
        keys = self.keys
        coded = bool(self.options.sq8)
        scanned = queries
        if coded:
            scanned = queries * np.repeat(self.scale, self.heads // keys.groups, axis=0)[:, None, :]
        search_graph(
            self.codes.reshape(-1, keys.d) if coded else keys.rows,
            self.codes.shape[1] if coded else keys.stride,
            scanned,
            keys.groups,
            self.graph,
            self.centroids,
            self.entries,
            self.probes,
            max(effort, k),
            coded,
            keys.rows,
            queries,
            keys.stride,
            *result,
            numba.get_num_threads(),
        )

    def _encode(self, first: int = 0) -> None:
        """Code the keys from `first` on with 8 bits per dimension, on the scale of the first build."""
        if not self.options.sq8:
            return
        keys = self.keys
        if first == 0:
            low = np.stack([keys.float32(g).min(0) for g in range(keys.groups)])
            high = np.stack([keys.float32(g).max(0) for g in range(keys.groups)])
            self.low, self.scale = low, np.maximum((high - low) / np.float32(255), np.float32(1e-30))
            self.codes = np.empty((keys.groups, 0, keys.d), np.uint8)
        added = [quantize_rows(keys.float32(g, first), self.low[g], self.scale[g]) for g in range(keys.groups)]
        self.codes = np.concatenate([self.codes[:, :first], np.stack(added)], axis=1)

    def _state(self) -> State:
        state: State = {"graph": self.graph[:, : self.keys.n], "centroids": self.centroids, "entries": self.entries}
        if self.options.sq8:
            state |= {"codes": self.codes, "low": self.low, "scale": self.scale}
        return state

    def _restore(self, state: State) -> None:
        n, d, graphs = self.keys.n, self.keys.d, self.graphs
        self.graph = expect_ids(state, "graph", (graphs, n, None), n)
        self.centroids = expect(state, "centroids", np.float32, (graphs, None, d))
        self.entries = expect_ids(state, "entries", (graphs, self.centroids.shape[1], None), n)
        if self.options.sq8:
            self.codes = expect(state, "codes", np.uint8, (self.keys.groups, n, d))
            self.low = expect(state, "low", np.float32, (self.keys.groups, d))
            self.scale = expect(state, "scale", np.float32, (self.keys.groups, d))

    def _reserve(self) -> None:
        """Room in `graph` for every key in `self.keys`, doubling."""
        n = self.keys.n
        if n > self.graph.shape[1]:
            grown = np.full((self.graph.shape[0], max(n, 2 * self.graph.shape[1]), self.graph.shape[2]), -1, np.int32)
            grown[:, : self.graph.shape[1]] = self.graph
            self.graph = grown
