"""Vamana: the graph of DiskANN, by greedy search and robust pruning over the keys alone."""

from __future__ import annotations

from typing import ClassVar

import numba
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvbench.indexes.graph import GraphIndex, GraphOptions
from kvbench.indexes.kernels import (
    Int32,
    Int64,
    Rows,
    beam_search,
    inner,
    insert_sorted,
    kernel,
    link,
    pack,
    packed_id,
    parallel_kernel,
    prune,
    read_row,
    squared_distance,
)


class VamanaOptions(GraphOptions):
    """Options of the Vamana graphs."""

    degree: int = Field(64, ge=1, description="links per key (R)")
    construction_ef: int = Field(100, ge=1, description="candidate list while building (L)")
    alpha: float = Field(1.2, ge=1, description="how much nearer a kept key must be to occlude another (second pass)")
    starts: int = Field(8, ge=1, description="keys where a search enters: the medoid and random ones")


class Vamana(GraphIndex):
    """Vamana by Euclidean distance over the keys, one graph per key/value head, searched by inner product."""

    name: ClassVar[str] = "vamana"
    summary: ClassVar[str] = "DiskANN's graph over the keys"
    reference: ClassVar[str] = "Subramanya et al., DiskANN, NeurIPS 2019"

    class Options(VamanaOptions):
        """Options of `vamana`."""

    def _build(self, queries: NDArray[np.float32] | None) -> None:
        keys, options = self.keys, self.options
        self._encode()
        self._enter()
        self.graph = np.full((keys.groups, keys.n, options.degree), -1, np.int32)
        order = np.random.default_rng(self.seed).permutation(keys.n).astype(np.int32)
        build_vamana(
            keys.rows, keys.stride, keys.groups, order, 0, self.graph, self.entries[:, 0], options.construction_ef,
            np.array([1.0, options.alpha]), np.empty((keys.groups, 0, 1), np.int32),
        )

    def _enter(self) -> None:
        """Entry points of every graph: the key nearest to the mean, and random others."""
        keys = self.keys
        generator = np.random.default_rng(self.seed)
        self.centroids = np.zeros((keys.groups, 1, keys.d), np.float32)
        self.entries = np.empty((keys.groups, 1, min(self.options.starts, keys.n)), np.int32)
        for group in range(keys.groups):
            block = keys.float32(group)
            medoid = int(np.argmin(((block - block.mean(0)) ** 2).sum(1)))
            others = generator.permutation(keys.n)
            self.entries[group, 0] = np.concatenate([[medoid], others[others != medoid]])[: self.entries.shape[2]]

    def _insert(self, first: int) -> None:
        self._encode(first)
        self._reserve()
        keys, options = self.keys, self.options
        order = np.arange(first, keys.n, dtype=np.int32)
        build_vamana(
            keys.rows, keys.stride, keys.groups, order, 0, self.graph, self.entries[:, 0], options.construction_ef,
            np.array([options.alpha]), np.empty((keys.groups, 0, 1), np.int32),
        )


@kernel
def insert_point(
    rows: Rows, base: int, node: int, graph: Int32, pool: Int64, size: int, alpha: float,
    order: Int64, kept: Int32,
) -> None:
    """Link a node with the pruned best of `pool` [size] and its present neighbours, both ways."""
    degree = graph.shape[1]
    count = 0
    for i in range(size):
        other = packed_id(pool[i])
        if other != node:
            order[count] = pack(squared_distance(rows, base + node, base + other), other)
            count += 1
    for j in range(degree):
        other = graph[node, j]
        if other < 0:
            break
        order[count] = pack(squared_distance(rows, base + node, base + other), other)
        count += 1
    order[:count].sort()
    unique = 0
    for i in range(count):
        if i == 0 or order[i] != order[i - 1]:
            order[unique] = order[i]
            unique += 1
    number = prune(rows, base, order, unique, degree, alpha, False, kept)
    for j in range(degree):
        graph[node, j] = kept[j] if j < number else -1
    chosen = kept[:number].copy()
    for i in range(number):
        link(rows, base, graph, chosen[i], node, degree, alpha, False, order, kept)


@parallel_kernel
def build_vamana(
    rows: Rows, stride: int, groups: int, order: Int32, offset: int, graph: Int32, entries: Int32, ef: int,
    alphas: NDArray[np.float64], fixed: Int32,
) -> None:
    """Insert the nodes in `order` into the graph of every head, once for each of `alphas`.

    `graph` [G, capacity, degree]; `entries` [G, E]. The nodes from `offset` on, if `fixed` [G, m, R] holds any, are
    queries: they keep those links, and only reverse links are pruned.
    """
    for group in numba.prange(groups):
        base = group * stride
        capacity, degree = graph.shape[1], graph.shape[2]
        half_norms = np.zeros(capacity, np.float32)
        pool = np.empty(ef, np.int64)
        scratch = np.empty(ef + degree + 1, np.int64)
        kept = np.empty(degree + 1, np.int32)
        visited = np.zeros(capacity, np.uint8)
        fresh = np.empty(degree, np.int32)
        query = np.empty(rows.shape[1], np.float32)
        known = 0
        for i in range(order.shape[0]):
            known = max(known, order[i] + 1)
        for node in range(known):
            total = np.float32(0)
            read_row(rows, base + node, query)
            for j in range(query.shape[0]):
                total += query[j] * query[j]
            half_norms[node] = total / np.float32(2)
        stamp = 0
        for alpha in alphas:
            for i in range(order.shape[0]):
                node = order[i]
                if fixed.shape[1] and node >= offset:
                    targets = fixed[group, node - offset]
                    for j in range(min(degree, targets.shape[0])):
                        graph[group, node, j] = targets[j]
                    for j in range(min(degree, targets.shape[0])):
                        link(rows, base, graph[group], targets[j], node, degree, alpha, False, scratch, kept)
                    continue
                stamp += 1
                if stamp == 256:
                    visited[:] = 0
                    stamp = 1
                read_row(rows, base + node, query)
                size = 0
                for e in range(entries.shape[1]):
                    entry = entries[group, e]
                    if visited[entry] != stamp:
                        visited[entry] = stamp
                        score = inner(rows, base + entry, query) - half_norms[entry]
                        _, size = insert_sorted(pool, size, pack(score, entry))
                size, _ = beam_search(
                    rows, base, query, graph[group], pool, size, visited, stamp, fresh, half_norms
                )
                insert_point(rows, base, node, graph[group], pool, size, alpha, scratch, kept)
