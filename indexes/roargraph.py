"""RoarGraph: a graph over keys, projected from the prompt's queries and their nearest keys."""

from __future__ import annotations

from typing import ClassVar

import numba
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvbench.indexes.base import State, expect, expect_ids
from kvbench.indexes.graph import GraphIndex, GraphOptions
from kvbench.indexes.kernels import (
    Float32,
    Int32,
    Int64,
    Rows,
    beam_search,
    inner,
    kernel,
    link,
    mark_reached,
    pack,
    packed_id,
    parallel_kernel,
    prune,
    read_row,
    squared_distance,
)
from kvbench.indexes.knn import draw, nearest_keys


class RoarGraph(GraphIndex):
    """Graph whose links join keys that the same queries attend to.

    Per query head: the nearest keys of training queries (bipartite graph) are projected onto the keys, then every key
    is linked to keys found from it by search (connectivity enhancement). A new key is linked to the nearest keys of
    the training query closest to it.
    """

    name: ClassVar[str] = "roargraph"
    summary: ClassVar[str] = "graph over keys projected from the prompt's queries"
    reference: ClassVar[str] = "Chen et al., RoarGraph, VLDB 2024 (arXiv:2408.08933); Liu et al., RetrievalAttention, 2024"
    uses_queries: ClassVar[bool] = True

    class Options(GraphOptions):
        """Options of `roargraph`."""

        degree: int = Field(35, ge=1, description="links kept per key in each phase (M)")
        neighbors: int = Field(100, ge=2, description="nearest keys of each training query (N_q)")
        construction_ef: int = Field(48, ge=1, description="candidate list of the connectivity enhancement (L)")
        sample: int = Field(3072, ge=1, description="training queries drawn from the prompt's, per head")
        ef: int = Field(256, ge=1, description="length of the candidate list in search; at least k is used")

    knn: NDArray[np.int32]
    queries: NDArray[np.float32]

    def _build(self, queries: NDArray[np.float32] | None) -> None:
        assert queries is not None  # noqa: S101
        self.queries = draw(queries, self.options.sample, self.seed)
        self.build_from_neighbors(nearest_keys(self.keys, self.queries, self.options.neighbors))

    def build_from_neighbors(self, knn: NDArray[np.int32]) -> None:
        """Build from the ids [H, m, N_q] of the training queries' nearest keys, best first."""
        self.knn = knn
        self._encode()
        degree = self.options.degree
        self.graph = np.full((self.heads, self.keys.n, 2 * degree), -1, np.int32)
        self.centroids = np.zeros((self.heads, 1, self.keys.d), np.float32)
        self.entries = np.full((self.heads, 1, 1), -1, np.int32)
        unreached = np.zeros(self.heads, np.int64)
        build_heads(
            self.keys.rows, self.keys.stride, self.keys.groups, knn, degree, self.options.construction_ef,
            self.graph, self.entries, unreached,
        )

    def _insert(self, first: int) -> None:
        """Link each new key with the nearest keys of the training query that is closest to it."""
        self._encode(first)
        self._reserve()
        keys = self.keys
        insert_heads(
            keys.rows, keys.stride, keys.groups, keys.n, first, self.queries, self.knn, self.options.degree, self.graph
        )

    def _state(self) -> State:
        return super()._state() | {"queries": self.queries, "knn": self.knn}

    def _restore(self, state: State) -> None:
        super()._restore(state)
        self.queries = expect(state, "queries", np.float32, (self.heads, None, self.keys.d))
        self.knn = expect_ids(state, "knn", (self.heads, self.queries.shape[1], None), self.keys.n)


@kernel
def project(rows: Rows, base: int, knn: Int32, degree: int, graph: Int32) -> None:
    """Link each query's nearest key (the pivot) with its other nearest keys: `graph` [n, ≥ degree] from knn [m, N_q]."""
    m, width = knn.shape
    n = graph.shape[0]
    by_pivot = np.argsort(knn[:, 0], kind="mergesort")
    order = np.empty(n + 1, np.int64)
    kept = np.empty(max(degree, graph.shape[1]) + 1, np.int32)
    listed = np.full(n, -1, np.int32)
    pivots = np.empty(m, np.int32)
    number = 0
    i = 0
    while i < m:
        pivot = knn[by_pivot[i], 0]
        pivots[number] = pivot
        number += 1
        listed[pivot] = pivot
        count = 0
        while i < m and knn[by_pivot[i], 0] == pivot:
            for j in range(1, width):
                other = knn[by_pivot[i], j]
                if listed[other] != pivot:
                    listed[other] = pivot
                    order[count] = pack(squared_distance(rows, base + pivot, base + other), other)
                    count += 1
            i += 1
        order[:count].sort()
        kept_number = prune(rows, base, order, count, degree, 1.0, True, kept)
        for j in range(kept_number):
            graph[pivot, j] = kept[j]
    forward = graph[pivots[:number], :degree].copy()
    for p in range(number):
        for j in range(degree):
            other = forward[p, j]
            if other < 0:
                break
            link(rows, base, graph, other, pivots[p], degree, 1.0, True, order, kept)


@kernel
def connect(rows: Rows, base: int, degree: int, ef: int, entry: int, graph: Int32) -> int:
    """Link every key of `graph` [n, 2·degree] with keys that a search from `entry` finds; gives the keys out of reach."""
    n, width = graph.shape
    pool = np.empty(ef, np.int64)
    order = np.empty(max(ef, width) + 1, np.int64)
    kept = np.empty(width + 1, np.int32)
    visited = np.zeros(n, np.uint8)
    fresh = np.empty(width, np.int32)
    query = np.empty(rows.shape[1], np.float32)
    stamp = 0
    for node in range(n):
        stamp += 1
        if stamp == 256:
            visited[:] = 0
            stamp = 1
        read_row(rows, base + node, query)
        visited[entry] = stamp
        pool[0] = pack(inner(rows, base + entry, query), entry)
        size, _ = beam_search(rows, base, query, graph, pool, 1, visited, stamp, fresh, None)
        count = 0
        for i in range(size):
            other = packed_id(pool[i])
            if other != node:
                order[count] = pack(squared_distance(rows, base + node, base + other), other)
                count += 1
        order[:count].sort()
        number = prune(rows, base, order, count, degree, 1.0, False, kept)
        chosen = kept[:number].copy()
        for i in range(number):
            link(rows, base, graph, node, chosen[i], width, 1.0, True, order, kept)
            link(rows, base, graph, chosen[i], node, width, 1.0, True, order, kept)
    reached = np.zeros(n, np.uint8)
    return n - mark_reached(graph, entry, reached)


@parallel_kernel
def build_heads(
    rows: Rows, stride: int, groups: int, knn: Int32, degree: int, ef: int, graph: Int32, entries: Int32,
    unreached: Int64,
) -> None:
    """Build the graph of every head."""
    heads = knn.shape[0]
    for head in numba.prange(heads):
        base = (head * groups // heads) * stride
        project(rows, base, knn[head], degree, graph[head])
        counts = np.zeros(graph.shape[1], np.int64)
        for i in range(knn.shape[1]):
            counts[knn[head, i, 0]] += 1
        entry = np.argmax(counts)
        entries[head, 0, 0] = entry
        unreached[head] = connect(rows, base, degree, ef, entry, graph[head])


@parallel_kernel
def insert_heads(
    rows: Rows, stride: int, groups: int, n: int, first: int, queries: Float32, knn: Int32, degree: int, graph: Int32
) -> None:
    """Insert the keys from `first` to n into the graph of every head."""
    heads, width = graph.shape[0], graph.shape[2]
    for head in numba.prange(heads):
        base = (head * groups // heads) * stride
        order = np.empty(max(width, knn.shape[2]) + 1, np.int64)
        kept = np.empty(width + 1, np.int32)
        for node in range(first, n):
            closest = 0
            best = np.float32(-np.inf)
            for i in range(queries.shape[1]):
                score = inner(rows, base + node, queries[head, i])
                if score > best:
                    best = score
                    closest = i
            count = 0
            for j in range(knn.shape[2]):
                other = knn[head, closest, j]
                order[count] = pack(squared_distance(rows, base + node, base + other), other)
                count += 1
            order[:count].sort()
            number = prune(rows, base, order, count, degree, 1.0, True, kept)
            chosen = kept[:number].copy()
            for i in range(number):
                graph[head, node, i] = chosen[i]
            for i in range(number):
                link(rows, base, graph[head], chosen[i], node, width, 1.0, True, order, kept)
