"""RobustVamana (OOD-DiskANN): a Vamana graph that a sample of queries takes part in while it is built."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvbench.indexes.compiled import Int32, Rows, kernel, squared_distance
from kvbench.indexes.graph import rows_of
from kvbench.indexes.kernels import pack, packed_id
from kvbench.indexes.knn import nearest_keys
from kvbench.indexes.threads import on_threads
from kvbench.indexes.vamana import Vamana, VamanaOptions, build_vamana


class RobustVamana(Vamana):
    """Vamana with query nodes, one graph per key/value head, trained with queries of all heads that share it.

    A query node keeps its nearest keys unpruned, and reverse links. After the two passes the graph is stitched: each
    key's links to query nodes give way to the nearest of those queries' keys.
    """

    name: ClassVar[str] = "robust_vamana"
    summary: ClassVar[str] = "DiskANN's graph with query nodes, stitched"
    reference: ClassVar[str] = "Jaiswal et al., OOD-DiskANN, 2022 (arXiv:2211.12850)"
    uses_queries: ClassVar[bool] = True

    class Options(VamanaOptions):
        """Options of `robust_vamana`."""

        query_share: float = Field(0.01, gt=0, le=1, description="query nodes, as a share of the keys")

    @property
    def graphs(self) -> int:
        """One graph per key/value head."""
        return int(self.keys.groups)

    def _build(self, queries: NDArray[np.float32] | None) -> None:
        assert queries is not None
        keys, options = self.keys, self.options
        generator = np.random.default_rng(self.seed)
        # Group-wise pools of the queries of every head that reads the group's keys.
        pooled = queries.reshape(keys.groups, -1, keys.d)
        number = min(pooled.shape[1], max(1, round(options.query_share * keys.n)))
        nodes = pooled[:, np.sort(generator.choice(pooled.shape[1], number, replace=False))]
        nearest = nearest_keys(keys, nodes, options.degree)
        self._encode()
        self._enter()
        # Keys and queries side by side while building: the one float32 copy, dropped with this call.
        rows = np.concatenate([np.stack([keys.float32(g) for g in range(keys.groups)]), nodes], axis=1)
        total = keys.n + number
        graph = np.full((keys.groups, total, options.degree), -1, np.int32)
        order = generator.permutation(total).astype(np.int32)
        on_threads(
            build_vamana,
            keys.groups,
            rows.reshape(-1, keys.d),
            total,
            total,
            keys.n,
            order,
            graph,
            self.entries,
            min(options.construction_ef, total),
            np.array([1.0, options.alpha]),
            nearest,
        )
        on_threads(stitch, keys.groups, rows.reshape(-1, keys.d), total, keys.n, graph)
        self.links = np.ascontiguousarray(graph[:, : keys.n]).reshape(-1)
        self.start = rows_of(keys.groups, keys.n, options.degree)


@kernel
def stitch_head(rows: Rows, base: int, n: int, graph: Int32) -> None:
    """Replace the query nodes (ids from n on) in each key's list by the nearest keys of those queries."""
    degree = graph.shape[1]
    order = np.empty(degree * degree, np.int64)
    listed = np.full(n, -1, np.int32)
    for node in range(n):
        listed[node] = node
        number = 0
        count = 0
        for j in range(degree):
            if 0 <= graph[node, j] < n:
                listed[graph[node, j]] = node
        for j in range(degree):
            other = graph[node, j]
            if other < 0:
                break
            if other < n:
                graph[node, number] = other
                number += 1
                continue
            for i in range(degree):
                key = graph[other, i]
                if 0 <= key < n and listed[key] != node:
                    listed[key] = node
                    order[count] = pack(squared_distance(rows, base + node, base + key), key)
                    count += 1
        order[:count].sort()
        for i in range(min(count, degree - number)):
            graph[node, number] = packed_id(order[i])
            number += 1
        graph[node, number:] = -1


@kernel
def stitch(part: int, parts: int, rows: Rows, stride: int, n: int, graph: Int32) -> None:
    """Stitch the graphs of this part's groups."""
    for group in range(part, graph.shape[0], parts):
        stitch_head(rows, group * stride, n, graph[group])
