"""RoarGraph: a graph over keys, projected from the prompt's queries and their nearest keys."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kvbench.contract.host import host_empty
from kvbench.indexes import device_graph
from kvbench.indexes.base import State, expect, expect_finite, expect_ids
from kvbench.indexes.compiled import decode
from kvbench.indexes.graph import GraphIndex, GraphOptions, rows_of, starts
from kvbench.indexes.insertion import LEAST_NEIGHBORS, count_lists, insert_heads, sort_lists
from kvbench.indexes.knn import draw, drawn, nearest_keys
from kvbench.indexes.links import move_links
from kvbench.indexes.projection import build_by_cooccurrence, build_by_pivots
from kvbench.indexes.threads import on_threads
from kvbench.kernels.top_keys import top_keys

# Places kept free at the end of each key's links, for keys inserted later.
_SPARE = 4

# Of the bipartite graph, what is kept for insertion: so many training queries of each graph, one for every 16 keys, and
# so many of their keys.
_LEAST_KEPT = 128
_MOST_KEPT = 1024
_KEYS_PER_KEPT = 16
_KEPT_NEIGHBORS = 64


class RoarGraph(GraphIndex):
    """Graph whose links join keys that the same queries attend to, one per key/value head or one per query head.

    1. Bipartite graph: the exact nearest keys of training queries drawn from the prompt, half of them from its last
       quarter, which decoding queries resemble most.
    2. Projection onto the keys. `cooccurrence` (ours) links each key with the keys that are most often nearest to the
       same queries, unless a kept one is nearer to them (Euclidean). `pivot` (the paper's) links each query's nearest
       key with its others.
    3. Connectivity enhancement: keys without links (with `pivot`, all) are linked with keys that a search finds.

    A search evaluates a key's first `eager` links at once and the others when a second expanded key links to them.
    A new key is linked with the nearest keys of the training query that is closest to it, both ways.
    """

    name: ClassVar[str] = "roargraph"
    summary: ClassVar[str] = "graph over keys projected from the prompt's queries"
    reference: ClassVar[str] = (
        "Chen et al., RoarGraph, VLDB 2024 (arXiv:2408.08933); Liu et al., RetrievalAttention, 2024 (arXiv:2409.10516)"
    )
    uses_queries: ClassVar[bool] = True

    class Options(GraphOptions):
        """Options of `roargraph`."""

        ef: int = Field(200, ge=1, description="length of the candidate list in search; at least k is used")
        degree: int = Field(48, ge=2, le=4096, description="most links of a key (2M)")
        eager: int = Field(16, ge=1, description="links of a key evaluated at once; the others need a second one")
        neighbors: int = Field(128, ge=2, description="nearest keys of a training query (N_q), n/32 at most")
        sample: int = Field(4096, ge=1, description="training queries of each graph; a sixth of all at most")
        recent: float = Field(0.5, ge=0, le=1, description="share of them drawn from the prompt's last quarter")
        projection: Literal["cooccurrence", "pivot"] = Field("cooccurrence", description="how links are chosen")
        construction_ef: int = Field(16, ge=1, description="candidate list of the connectivity enhancement (L)")
        shared: bool = Field(True, description="one graph for the query heads of a group, from the queries of all")
        entries: int = Field(16, ge=1, description="keys where a search enters: those nearest to most queries")

    queries: NDArray[np.int16]
    knn: NDArray[np.int32]
    _worst: NDArray[np.float32] | None
    _frequency: NDArray[np.uint16]
    _spare: ClassVar[int] = _SPARE

    @property
    def nbytes(self) -> int:
        """Bytes of links, entry points and codes, and of the queries and lists kept for insertion."""
        if not self.keys.n:
            return 0
        grown = 0
        if self._worst is not None:  # a loaded index counts its lists again with the next insertion
            grown = self._worst.nbytes + self.graphs * self.keys.n * self._frequency.itemsize
        return int(super().nbytes + self.queries.nbytes + self.knn.nbytes + grown)

    @property
    def graphs(self) -> int:
        """Number of graphs: one per key/value head where they are shared, else one per query head."""
        return self.keys.groups if self.options.shared else self.heads

    @property
    def _eager(self) -> int:
        if self.options.projection == "pivot":
            return self._degree
        return min(int(self.options.eager), self._degree)

    @classmethod
    def saved_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Graphs of query heads, where the file says nothing."""
        return {"shared": False} | options

    def _build(self, queries: NDArray[np.float32] | None) -> None:
        assert queries is not None
        training = self.training(queries)
        self.build_from_neighbors(training, nearest_keys(self.keys, training, self.neighbors))

    @property
    def neighbors(self) -> int:
        """Nearest keys of a training query."""
        return min(int(self.options.neighbors), max(LEAST_NEIGHBORS, self.keys.n // 32))

    def training(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """The training queries [S, m, d] of each graph among the prompt's queries [H, n, d]."""
        chosen = draw(queries, self._sample(queries.shape[1]), self.options.recent, self.seed)
        return chosen.reshape(self.graphs, -1, self.keys.d)

    def _sample(self, prompt: int) -> int:
        """Training queries of each query head among so many."""
        share = self.heads // self.graphs
        return -(-min(int(self.options.sample), max(256, prompt * share // 6)) // share)

    @property
    def builds_on_device(self) -> bool:
        """The projection by co-occurrence."""
        return bool(self.options.projection == "cooccurrence")

    def _build_on(self, keys: Tensor, queries: Tensor | None) -> None:
        assert queries is not None
        m, options = queries.shape[1], self.options
        chosen = drawn(m, self._sample(m), options.recent, self.seed)
        places = torch.from_numpy(np.flatnonzero(chosen)).to(queries.device)
        training = queries[:, places].reshape(self.graphs, -1, self.keys.d)
        if self.graphs > self.keys.groups:
            keys = keys.repeat_interleave(self.graphs // self.keys.groups, dim=0)
        knn = top_keys(training, keys, self.neighbors)
        graph = device_graph.build(
            keys, knn, degree=self._degree, eager=self._eager, entries=min(options.entries, self.keys.n)
        )
        links, start = device_graph.packed(graph, _SPARE)
        step = self._keep_every(training.shape[1])
        self._keep(training[:, ::step].float().cpu().numpy(), knn[:, ::step, :_KEPT_NEIGHBORS].cpu().numpy())
        self.links = host_empty(links.shape, torch.int32, links.device).copy_(links).numpy()
        self.start, self.entries = start.cpu().numpy(), graph.entries.cpu().numpy()

    def _keep_every(self, queries: int) -> int:
        """Of the training queries every which one is kept for insertion."""
        return -(-queries // min(max(self.keys.n // _KEYS_PER_KEPT, _LEAST_KEPT), _MOST_KEPT))

    def _keep(self, queries: NDArray[np.float32], knn: NDArray[np.int32]) -> None:
        """Keep queries [S, m, d], as the bits of bfloat16, and their lists for insertion, and code the keys."""
        self.queries = _bits(queries)
        self.knn = np.full((*queries.shape[:2], _KEPT_NEIGHBORS), -1, np.int32)
        self.knn[:, :, : knn.shape[2]] = knn
        self._worst = None
        self._encode()

    def build_from_neighbors(self, queries: NDArray[np.float32], knn: NDArray[np.int32]) -> None:
        """Build over the present keys from training queries [S, m, d] and the ids [S, m, N_q] of their nearest keys."""
        step = self._keep_every(queries.shape[1])
        self._keep(queries[:, ::step], knn[:, ::step, :_KEPT_NEIGHBORS])
        keys, options, heads = self.keys, self.options, self.graphs
        n, degree = keys.n, self._degree
        graph = np.empty((heads, n, degree), np.int32)
        self.entries = np.full((heads, min(options.entries, n)), -1, np.int32)
        lengths = np.empty((heads, n), np.int64)
        on_threads(
            build_by_pivots if options.projection == "pivot" else build_by_cooccurrence,
            heads,
            keys.rows,
            keys.stride,
            keys.groups,
            knn,
            self._eager,
            min(options.construction_ef, n),
            graph,
            self.entries,
            lengths,
        )
        whole = rows_of(heads, n, degree)
        self.start = starts(np.minimum(lengths + _SPARE, degree))
        self.links = np.empty(int(self.start[-1, -1]), np.int32)
        on_threads(move_links, heads, graph.reshape(-1), whole, self.links, self.start)

    def _insert(self, first: int) -> None:
        self._encode(first)
        self._reserve()
        keys = self.keys
        if self._worst is None:
            self._sort_lists()
        self._count_lists()
        on_threads(
            insert_heads,
            self.graphs,
            keys.rows,
            keys.stride,
            keys.groups,
            first,
            keys.n,
            self.queries.reshape(-1, keys.d),
            self.knn,
            self._worst,
            self._frequency,
            self._eager,
            self._degree,
            self.links,
            self.start,
        )

    def _state(self) -> State:
        worst = {} if self._worst is None else {"worst": self._worst}
        return super()._state() | {"queries": self.queries.view(np.uint16), "knn": self.knn, **worst}

    def _sort_lists(self) -> None:
        """Order the lists, and find the smallest inner product of each query with the keys in its own."""
        keys, self._worst = self.keys, np.empty(self.knn.shape[:2], np.float32)
        self._frequency = np.zeros((self.graphs, 0), np.uint16)
        rows = self.queries.reshape(-1, keys.d)
        on_threads(sort_lists, self.graphs, keys.rows, keys.stride, keys.groups, rows, self.knn, self._worst)

    def _count_lists(self) -> None:
        """Make room in the counts of the lists that each key is in, as much as the links have."""
        known, room = self._frequency.shape[1], self.start.shape[1] - 1
        if not known:
            self._frequency = np.zeros((self.graphs, room), np.uint16)
            count_lists(self.knn, self._frequency)
        elif known < room:
            self._frequency = np.pad(self._frequency, ((0, 0), (0, room - known)))

    def _restore(self, state: State) -> None:
        super()._restore(state)
        if np.any(np.diff(self.start, axis=1) < 1):
            raise ValueError("start")
        coded = state["queries"].dtype == np.uint16
        if coded:
            self.queries = expect(state, "queries", np.uint16, (self.graphs, None, self.keys.d)).view(np.int16)
            expect_finite({"queries": decode(self.queries)}, "queries", self.queries.shape)
        else:  # float32, as they were once kept
            self.queries = _bits(expect_finite(state, "queries", (self.graphs, None, self.keys.d)))
        self.knn = expect_ids(state, "knn", (self.graphs, self.queries.shape[1], _KEPT_NEIGHBORS), self.keys.n)
        # `enlist` counts on lists that hold a key or more, none twice, with -1 at their ends alone.
        filled = self.knn >= 0
        ordered = np.sort(self.knn, axis=2)
        twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)
        if not self.queries.shape[1] or not filled[:, :, 0].all() or (filled[:, :, 1:] > filled[:, :, :-1]).any():
            raise ValueError("knn")
        if twice.any():
            raise ValueError("knn")
        if "worst" not in state:
            self._worst = None
            return
        worst, lists = expect_finite(state, "worst", self.knn.shape[:2]), self.knn.copy()
        self._sort_lists()
        if coded:
            assert self._worst is not None
            if not np.array_equal(self._worst, worst):
                raise ValueError("worst")
            self.knn = lists  # in the order of equals that they came in


def _bits(queries: NDArray[np.float32]) -> NDArray[np.int16]:
    """The bits of float32 numbers rounded to bfloat16."""
    found: NDArray[np.int16] = torch.from_numpy(np.ascontiguousarray(queries)).bfloat16().view(torch.int16).numpy()
    return found
