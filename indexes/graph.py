"""What the graph indexes share: storage, search over all heads in one call, SQ8 codes, state."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvbench.contract.extension import Options
from kvbench.indexes.base import Index, SearchResult, State, expect, expect_finite, expect_ids
from kvbench.indexes.compiled import Int32, Int64, kernel, quantize_rows
from kvbench.indexes.kernels import search_graph
from kvbench.indexes.links import count_reached, move_links
from kvbench.indexes.threads import on_threads

LEAST_SCALE = np.float32(1e-30)
"""Of SQ8 codes, where all keys have the same value in a dimension."""


class GraphOptions(Options):
    """Options of every graph index."""

    ef: int = Field(128, ge=1, description="length of the candidate list in search; at least k is used")
    sq8: bool = Field(False, description="walk the graph on 8-bit codes and re-rank the candidate list exactly")


class GraphIndex(Index):
    """An index of S graphs, each shared by H // S query heads.

    In graph s, key i links to `links[start[s, i]:start[s, i + 1]]`, padded with -1. Rows of keys that are not yet
    inserted may follow. Searches enter at `entries` [S, E], padded with -1.
    """

    search_parameter = "ef"
    links: NDArray[np.int32]
    start: NDArray[np.int64]
    entries: NDArray[np.int32]
    codes: NDArray[np.uint8]
    low: NDArray[np.float32]
    scale: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes of links, entry points and codes, with the places kept free for keys inserted later."""
        if not self.keys.n:
            return 0
        coded = self.codes.nbytes + self.low.nbytes + self.scale.nbytes if self.options.sq8 else 0
        return self.links.nbytes + self.start.nbytes + self.entries.nbytes + coded

    @property
    def graphs(self) -> int:
        """Number of graphs: one per query head if they learn from its queries, else one per key/value head."""
        return self.heads if self.uses_queries else self.keys.groups

    @property
    def unreached(self) -> NDArray[np.float64]:
        """Share of keys of each graph [S] that no search from the entry points can reach, whatever its effort."""
        n = self.keys.n
        reached = [
            count_reached(self.links, self.start[s], self._eager, self.entries[s], n)
            for s in range(self.graphs if n else 0)
        ]
        return np.asarray(1 - np.array(reached, np.float64) / max(n, 1))

    @property
    def _degree(self) -> int:
        """Most links of a key."""
        return int(self.options.degree)

    _spare: ClassVar[int] = 0  # free places that `_reserve` gives every key

    @property
    def _eager(self) -> int:
        """Links of a key that are evaluated at once."""
        return self._degree

    def _search(self, queries: NDArray[np.float32], k: int, effort: int, result: SearchResult) -> None:
        keys = self.keys
        coded = bool(self.options.sq8)
        scanned = queries
        if coded:
            # q·key is q·low, the same for every key, plus (q·scale)·code.
            scanned = queries * np.repeat(self.scale, self.heads // keys.groups, axis=0)[:, None, :]
        on_threads(
            search_graph,
            self.heads * queries.shape[1],
            self.codes.reshape(-1, keys.d) if coded else keys.rows,
            self.codes.shape[1] if coded else keys.stride,
            scanned,
            keys.groups,
            keys.n,
            self.links,
            self.start,
            self.entries,
            min(max(effort, k), keys.n),
            self._eager,
            self._degree,
            coded,
            keys.rows,
            keys.stride,
            queries,
            *result,
            least=2,
        )

    def _encode(self, first: int = 0) -> None:
        """Code the keys from `first` on with 8 bits per dimension, on the scale of the first build."""
        if not self.options.sq8:
            return
        keys = self.keys
        if first == 0:
            self.low = np.stack([keys.float32(g).min(0) for g in range(keys.groups)])
            high = np.stack([keys.float32(g).max(0) for g in range(keys.groups)])
            self.scale = np.maximum((high - self.low) / np.float32(255), LEAST_SCALE)
            self.codes = np.empty((keys.groups, keys.n, keys.d), np.uint8)
        elif keys.n > self.codes.shape[1]:
            grown = np.empty((keys.groups, keys.n + max(64, keys.n // 16), keys.d), np.uint8)
            grown[:, :first] = self.codes[:, :first]
            self.codes = grown
        for group in range(keys.groups):
            added = quantize_rows(keys.float32(group, first), self.low[group], self.scale[group])
            self.codes[group, first : keys.n] = added

    def reserve(self, count: int) -> None:
        """Make places for `count` more keys, and compile the insertion."""
        if self.keys.n:
            self._reserve(count)
            self._insert(self.keys.n)

    def _reserve(self, more: int = 0) -> None:
        """Make rows of `_degree` places for the keys that have none, with room for some more, `more` at least.

        The other keys get `_spare` free places, if they have fewer, up to `_degree`.
        """
        n, known = self.keys.n + more, self.start.shape[1] - 1
        if n <= known:
            return
        places = np.full((len(self.start), n + max(64, n // 16)), self._degree, np.int64)
        places[:, :known] = np.diff(self.start, axis=1)
        if self._spare:
            on_threads(widen_places, len(self.start), self.links, self.start, self._spare, self._degree, places)
        start = starts(places)
        links = np.empty(int(start[-1, -1]), np.int32)
        on_threads(move_links, len(start), self.links, self.start, links, start)
        self.links, self.start = links, start

    def _state(self) -> State:
        n = self.keys.n
        state: State = {"links": self.links, "start": self.start, "entries": self.entries}
        if self.options.sq8:
            state |= {"codes": self.codes[:, :n], "low": self.low, "scale": self.scale}
        return state

    def _restore(self, state: State) -> None:
        n, d, groups, graphs = self.keys.n, self.keys.d, self.keys.groups, self.graphs
        self.links = expect_ids(state, "links", (None,), n)
        self.start = expect(state, "start", np.int64, (graphs, None))
        if self.start.shape[1] <= n:
            raise ValueError("start")
        widths = np.diff(self.start, axis=1)
        begins = self.start[:, 0]
        ends = self.start[:, -1]
        if begins[0] != 0 or ends[-1] != len(self.links) or np.any(begins[1:] != ends[:-1]):
            raise ValueError("start")
        if widths.min() < 0 or widths.max() > self._degree:
            raise ValueError("start")
        # what is reserved for keys to come is empty
        if any((self.links[row[n] : row[-1]] >= 0).any() for row in self.start):
            raise ValueError("links")
        self.entries = expect_ids(state, "entries", (graphs, None), n)
        if not self.entries.shape[1] or self.entries[:, 0].min() < 0:
            raise ValueError("entries")
        if self.options.sq8:
            self.codes = expect(state, "codes", np.uint8, (groups, n, d))
            self.low = expect_finite(state, "low", (groups, d))
            self.scale = expect_finite(state, "scale", (groups, d))
            if self.scale.min() < LEAST_SCALE:
                raise ValueError("scale")


@kernel
def widen_places(part: int, parts: int, links: Int32, start: Int64, spare: int, degree: int, places: Int64) -> None:
    """Raise `places` [S, ≥ n] so that the n nodes of this part's graphs have `spare` free ones, `degree` in all."""
    for graph in range(part, start.shape[0], parts):
        for node in range(start.shape[1] - 1):
            used = 0
            for j in range(start[graph, node], start[graph, node + 1]):
                used += links[j] >= 0
            places[graph, node] = max(places[graph, node], min(used + spare, degree))


def starts(places: Int64) -> Int64:
    """`start` [S, n + 1] of graphs that give their keys so many places [S, n]."""
    graphs, n = places.shape
    start = np.zeros((graphs, n + 1), np.int64)
    np.cumsum(places, axis=1, out=start[:, 1:])
    start[1:] += np.cumsum(start[:-1, -1])[:, None]
    return start


def rows_of(graphs: int, n: int, degree: int) -> NDArray[np.int64]:
    """`start` [S, n + 1] of graphs that give every key `degree` places."""
    return (np.arange(graphs)[:, None] * n + np.arange(n + 1)) * np.int64(degree)
