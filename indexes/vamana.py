"""Vamana: the graph of DiskANN, by greedy search and robust pruning over the keys alone."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvbench.indexes.base import State
from kvbench.indexes.compiled import Int32, Int64, Rows, half_squares, kernel
from kvbench.indexes.graph import GraphIndex, GraphOptions, rows_of
from kvbench.indexes.kernels import find_near
from kvbench.indexes.links import link, prune, sort_by_distance
from kvbench.indexes.threads import on_threads


class VamanaOptions(GraphOptions):
    """Options of the Vamana graphs."""

    degree: int = Field(64, ge=1, le=4096, description="links per key (R)")
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
        keys = self.keys
        self._encode()
        self._enter()
        self.links = np.full(keys.groups * keys.n * self._degree, -1, np.int32)
        self.start = rows_of(keys.groups, keys.n, self._degree)
        order = np.random.default_rng(self.seed).permutation(keys.n).astype(np.int32)
        self._take(order, np.array([1.0, self.options.alpha]))

    def _take(self, order: NDArray[np.int32], alphas: NDArray[np.float64]) -> None:
        keys = self.keys
        graph = self.links.reshape(keys.groups, -1, self._degree)
        nobody = np.empty((keys.groups, 0, 1), np.int32)
        on_threads(
            build_vamana,
            keys.groups,
            keys.rows,
            keys.stride,
            keys.n,
            keys.n,
            order,
            graph,
            self.entries,
            min(self.options.construction_ef, keys.n),
            alphas,
            nobody,
        )

    def _restore(self, state: State) -> None:
        super()._restore(state)
        if np.any(np.diff(self.start, axis=1) != self._degree):
            raise ValueError("start")

    def _enter(self) -> None:
        """Entry points of every graph: the key nearest to the mean, and random others."""
        keys = self.keys
        generator = np.random.default_rng(self.seed)
        self.entries = np.empty((keys.groups, min(self.options.starts, keys.n)), np.int32)
        for group in range(keys.groups):
            block = keys.float32(group)
            medoid = int(np.argmin(((block - block.mean(0)) ** 2).sum(1)))
            others = generator.permutation(keys.n)
            self.entries[group] = np.concatenate([[medoid], others[others != medoid]])[: self.entries.shape[1]]

    def _insert(self, first: int) -> None:
        self._encode(first)
        self._reserve()
        self._take(np.arange(first, self.keys.n, dtype=np.int32), np.array([self.options.alpha]))


@kernel
def take_up(
    rows: Rows,
    base: int,
    node: int,
    graph: Int32,
    count: int,
    alpha: float,
    order: Int64,
    candidates: Int32,
    kept: Int32,
) -> None:
    """Link a node with the pruned best of the first `count` candidates and its present neighbours, both ways."""
    degree = graph.shape[1]
    for j in range(degree):
        other = graph[node, j]
        if other < 0:
            break
        candidates[count] = other
        count += 1
    sort_by_distance(rows, base, node, candidates, count, order)
    unique = 0
    for i in range(count):
        if i == 0 or order[i] != order[i - 1]:
            candidates[unique] = candidates[i]
            unique += 1
    number = prune(rows, base, node, candidates, unique, degree, alpha, False, kept)
    for j in range(degree):
        graph[node, j] = kept[j] if j < number else -1
    for j in range(number):
        link(rows, base, graph, graph[node, j], node, degree, alpha, False, order, candidates, kept)


@kernel
def build_vamana(
    part: int,
    parts: int,
    rows: Rows,
    stride: int,
    total: int,
    n: int,
    order: Int32,
    graph: Int32,
    entries: Int32,
    ef: int,
    alphas: NDArray[np.float64],
    nearest: Int32,
) -> None:
    """Insert the nodes in `order` into the graphs of this part's groups, once for each of `alphas`.

    Row `g * stride + i` is node i of `total`; graph [G, ≥ total, degree]; entries [G, E]. Nodes from n on are queries:
    they keep links to their `nearest` keys [G, m, degree] unpruned, and the reverse links are pruned as others are.
    """
    for group in range(part, graph.shape[0], parts):
        base = group * stride
        mine = graph[group]
        degree = mine.shape[1]
        links = mine.reshape(-1)
        start = np.arange(0, links.shape[0] + 1, degree)
        half_norms = half_squares(rows, base, total)
        query = np.empty(rows.shape[1], np.float32)
        pool = np.empty(ef, np.int64)
        sorting = np.empty(ef + degree + 1, np.int64)
        candidates = np.empty(ef + degree + 1, np.int32)
        kept = np.empty(degree + 1, np.int32)
        seen = np.empty(total, np.uint8)
        fresh = np.empty(degree, np.int32)
        for alpha in alphas:
            for i in range(order.shape[0]):
                node = order[i]
                if node >= n:
                    targets = nearest[group, node - n]
                    for j in range(targets.shape[0]):
                        mine[node, j] = targets[j]
                    for j in range(targets.shape[0]):
                        link(rows, base, mine, targets[j], node, degree, alpha, False, sorting, candidates, kept)
                    continue
                entering = entries[group]
                count = find_near(
                    rows, base, node, entering, links, start, degree, half_norms, pool, seen, fresh, query, candidates
                )
                take_up(rows, base, node, mine, count, alpha, sorting, candidates, kept)
