"""RoarGraph: a graph over keys, projected from the prompt's queries and their nearest keys."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvbench.indexes.base import State, expect_finite, expect_ids
from kvbench.indexes.graph import GraphIndex, GraphOptions, rows_of, starts
from kvbench.indexes.kernels import (
    Float32,
    Int32,
    Int64,
    Rows,
    find_near,
    half_squares,
    inner,
    insert_sorted,
    kernel,
    link,
    move_links,
    pack,
    packed_id,
    prune,
    sort_by_distance,
    spread,
    squared_distance,
)
from kvbench.indexes.knn import draw, nearest_keys
from kvbench.indexes.threads import on_threads

# Places kept free at the end of each key's links, for keys inserted later.
_SPARE = 4

# Of the bipartite graph, what is kept for insertion: so many training queries of each head, and so many of their keys.
_KEPT_QUERIES = 1024
_KEPT_NEIGHBORS = 64
_LEAST_NEIGHBORS = 32


class RoarGraph(GraphIndex):
    """Graph whose links join keys that the same queries attend to, one per query head.

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
        sample: int = Field(4096, ge=1, description="training queries of each head; a sixth of all at most")
        recent: float = Field(0.5, ge=0, le=1, description="share of them drawn from the prompt's last quarter")
        projection: Literal["cooccurrence", "pivot"] = Field("cooccurrence", description="how links are chosen")
        construction_ef: int = Field(16, ge=1, description="candidate list of the connectivity enhancement (L)")
        entries: int = Field(16, ge=1, description="keys where a search enters: those nearest to most queries")

    queries: NDArray[np.float32]
    knn: NDArray[np.int32]
    _worst: NDArray[np.float32] | None
    _spare: ClassVar[int] = _SPARE

    @property
    def nbytes(self) -> int:
        """Bytes of links, entry points and codes, and of the queries and lists kept for insertion."""
        if not self.keys.n:
            return 0
        worst = 0 if self._worst is None else self._worst.nbytes
        return int(super().nbytes + self.queries.nbytes + self.knn.nbytes + worst)

    @property
    def _eager(self) -> int:
        if self.options.projection == "pivot":
            return self._degree
        return min(int(self.options.eager), self._degree)

    def _build(self, queries: NDArray[np.float32] | None) -> None:
        assert queries is not None
        options = self.options
        sample = min(options.sample, max(256, queries.shape[1] // 6))
        neighbors = min(options.neighbors, max(_LEAST_NEIGHBORS, self.keys.n // 32))
        training = draw(queries, sample, options.recent, self.seed)
        self.build_from_neighbors(training, nearest_keys(self.keys, training, neighbors))

    def build_from_neighbors(self, queries: NDArray[np.float32], knn: NDArray[np.int32]) -> None:
        """Build over the present keys from training queries [H, m, d] and the ids [H, m, N_q] of their nearest keys."""
        step = -(-queries.shape[1] // _KEPT_QUERIES)
        self.queries = np.ascontiguousarray(queries[:, ::step])
        self.knn = np.full((*self.queries.shape[:2], _KEPT_NEIGHBORS), -1, np.int32)
        kept = knn[:, ::step, :_KEPT_NEIGHBORS]
        self.knn[:, :, : kept.shape[2]] = kept
        self._worst = None
        self._encode()
        keys, options, heads = self.keys, self.options, self.heads
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
            self._worst = self._find_worst()
        on_threads(
            insert_heads,
            self.heads,
            keys.rows,
            keys.stride,
            keys.groups,
            first,
            keys.n,
            self.queries,
            self.knn,
            self._worst,
            self._eager,
            self._degree,
            self.links,
            self.start,
        )

    def _state(self) -> State:
        worst = {} if self._worst is None else {"worst": self._worst}
        return super()._state() | {"queries": self.queries, "knn": self.knn, **worst}

    def _find_worst(self) -> NDArray[np.float32]:
        """The smallest inner product of each query with the keys in its list, [H, m]."""
        keys, worst = self.keys, np.empty(self.knn.shape[:2], np.float32)
        on_threads(find_worst, self.heads, keys.rows, keys.stride, keys.groups, self.queries, self.knn, worst)
        return worst

    def _restore(self, state: State) -> None:
        super()._restore(state)
        if np.any(np.diff(self.start, axis=1) < 1):
            raise ValueError("start")
        self.queries = expect_finite(state, "queries", (self.heads, None, self.keys.d))
        self.knn = expect_ids(state, "knn", (self.heads, self.queries.shape[1], _KEPT_NEIGHBORS), self.keys.n)
        # `enlist` counts on lists that hold a key or more, none twice, with -1 at their ends alone.
        filled = self.knn >= 0
        ordered = np.sort(self.knn, axis=2)
        twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)
        if not self.queries.shape[1] or not filled[:, :, 0].all() or (filled[:, :, 1:] > filled[:, :, :-1]).any():
            raise ValueError("knn")
        if twice.any():
            raise ValueError("knn")
        self._worst = self._find_worst() if "worst" in state else None
        if self._worst is not None and not np.array_equal(self._worst, state["worst"]):
            raise ValueError("worst")


@kernel
def lists_of(knn: Int32, n: int) -> tuple[Int32, Int64]:
    """For each key the queries [m] that have it among their nearest keys [m, N_q]: `queries[begin[i]:begin[i + 1]]`."""
    begin = np.zeros(n + 1, np.int64)
    for query in range(knn.shape[0]):
        for key in knn[query]:
            begin[key + 1] += 1
    for i in range(n):
        begin[i + 1] += begin[i]
    queries = np.empty(begin[n], np.int32)
    place = begin[:n].copy()
    for query in range(knn.shape[0]):
        for key in knn[query]:
            queries[place[key]] = query
            place[key] += 1
    return queries, begin


@kernel
def rank(touched: Int32, scores: Float32, total: int, buckets: Int64, candidates: Int32) -> int:
    """Put the ids of the best of `total` positive scores into candidates [c], best first; gives their number.

    Scores are told apart to 1/255 of the largest; within that they keep their order. `buckets` [257] is scratch.
    """
    largest = np.float32(0)
    for i in range(total):
        largest = max(largest, scores[i])
    scale = np.float32(255) / max(largest, np.float32(1e-30))
    buckets[:] = 0
    for i in range(total):
        buckets[256 - int(scores[i] * scale)] += 1
    for i in range(256):
        buckets[i + 1] += buckets[i]
    size: int = min(total, candidates.shape[0])
    for i in range(total):
        bucket = 255 - int(scores[i] * scale)
        place = buckets[bucket]
        if place < size:
            candidates[place] = touched[i]
            buckets[bucket] = place + 1
    return size


@kernel
def project_cooccurrence(rows: Rows, base: int, knn: Int32, graph: Int32, lengths: Int64) -> None:
    """Link each key with those most often nearest to the same queries; fills graph [n, degree] and lengths [n].

    Frequent keys weigh less: the count is divided by the fourth root of the number of queries a key is nearest to.
    Of a frequent key, 32 to 63 queries are looked at. The kept links stand by falling count.
    """
    n, degree = graph.shape
    queries, begin = lists_of(knn, n)
    counts = np.zeros(n, np.int32)
    touched = np.empty(n, np.int32)
    scores = np.empty(n, np.float32)
    weights = np.empty(n, np.float32)
    for i in range(n):
        weights[i] = np.float32(max(1, begin[i + 1] - begin[i]) ** -0.25)
    buckets = np.empty(257, np.int64)
    candidates = np.empty(4 * degree, np.int32)
    for node in range(n):
        total = 0
        step = max(1, (begin[node + 1] - begin[node]) // 32)
        for place in range(begin[node], begin[node + 1], step):
            for other in knn[queries[place]]:
                if counts[other] == 0:
                    touched[total] = other
                    total += 1
                counts[other] += 1
        counts[node] = 0
        others = 0
        for i in range(total):
            other = touched[i]
            if other != node:
                touched[others] = other
                scores[others] = counts[other] * weights[other]
                others += 1
                counts[other] = 0
        size = rank(touched, scores, others, buckets, candidates)
        lengths[node] = prune(rows, base, node, candidates, size, degree, 1.0, False, graph[node])
        graph[node, lengths[node] :] = -1


@kernel
def project_pivots(rows: Rows, base: int, knn: Int32, graph: Int32) -> None:
    """Link each query's nearest key, its pivot, with its other nearest keys, and back; fills graph [n, degree].

    Lists of queries with the same pivot are merged, so that the graph does not depend on the queries' order.
    """
    m, width = knn.shape
    n, degree = graph.shape[0], graph.shape[1] // 2
    graph[:] = -1
    by_pivot = np.argsort(knn[:, 0], kind="mergesort")
    order = np.empty(n + 1, np.int64)
    candidates = np.empty(n + 1, np.int32)
    kept = np.empty(graph.shape[1] + 1, np.int32)
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
                    candidates[count] = other
                    count += 1
            i += 1
        sort_by_distance(rows, base, pivot, candidates, count, order)
        chosen = prune(rows, base, pivot, candidates, count, degree, 1.0, True, kept)
        for j in range(chosen):
            graph[pivot, j] = kept[j]
    forward = graph[pivots[:number], :degree].copy()
    for p in range(number):
        for j in range(degree):
            if forward[p, j] < 0:
                break
            link(rows, base, graph, forward[p, j], pivots[p], degree, 1.0, True, order, candidates, kept)


@kernel
def count_links(graph: Int32, lengths: Int64) -> None:
    """Lengths [n] of the lists in graph [n, degree], padded with -1."""
    for node in range(graph.shape[0]):
        lengths[node] = 0
        while lengths[node] < graph.shape[1] and graph[node, lengths[node]] >= 0:
            lengths[node] += 1


@kernel
def link_all(rows: Rows, base: int, entries: Int32, ef: int, graph: Int32) -> None:
    """Link every key with the keys that a search by Euclidean distance finds, both ways, pruned."""
    n, degree = graph.shape
    links = graph.reshape(-1)
    start = np.arange(0, links.shape[0] + 1, degree)
    half_norms = half_squares(rows, base, n)
    pool = np.empty(ef, np.int64)
    seen = np.empty(n, np.uint8)
    fresh = np.empty(degree, np.int32)
    query = np.empty(rows.shape[1], np.float32)
    order = np.empty(max(ef, degree) + 1, np.int64)
    candidates = np.empty(max(ef, degree) + 1, np.int32)
    kept = np.empty(degree + 1, np.int32)
    chosen = np.empty(degree + 1, np.int32)
    for node in range(n):
        count = find_near(
            rows, base, node, entries, links, start, degree, half_norms, pool, seen, fresh, query, candidates
        )
        number = prune(rows, base, node, candidates, count, degree // 2, 1.0, False, chosen)
        for i in range(number):
            other = int(chosen[i])
            link(rows, base, graph, node, other, degree, 1.0, True, order, candidates, kept)
            link(rows, base, graph, other, node, degree, 1.0, True, order, candidates, kept)


@kernel
def connect(rows: Rows, base: int, entries: Int32, eager: int, ef: int, graph: Int32, lengths: Int64) -> None:
    """Link keys without links with keys that a search by Euclidean distance finds, both ways, where there is place.

    Then keys that no search from the entries reaches are linked from one that it finds near them.
    """
    n, degree = graph.shape
    links = graph.reshape(-1)
    start = np.arange(0, links.shape[0] + 1, degree)
    half_norms = half_squares(rows, base, n)
    pool = np.empty(ef, np.int64)
    seen = np.empty(n, np.uint8)
    fresh = np.empty(degree, np.int32)
    query = np.empty(rows.shape[1], np.float32)
    candidates = np.empty(ef, np.int32)
    kept = np.empty(degree + 1, np.int32)
    reached = np.zeros(n, np.uint8)
    stack = np.empty(n, np.int32)
    for repairing in (False, True):
        if repairing:
            for entry in entries:
                if entry >= 0:
                    spread(links, start, eager, int(entry), reached, stack)
        for node in range(n):
            if reached[node] == 2 if repairing else lengths[node] > 0:
                continue
            count = find_near(
                rows, base, node, entries, links, start, eager, half_norms, pool, seen, fresh, query, candidates
            )
            if repairing:
                anchor(links, start, eager, candidates, count, node)
                spread(links, start, eager, node, reached, stack)
                continue
            number = prune(rows, base, node, candidates, count, min(4, degree), 1.0, False, kept)
            for i in range(number):
                append(links, start, node, int(kept[i]))
                append(links, start, int(kept[i]), node)
    count_links(graph, lengths)


@kernel
def append(links: Int32, start: Int64, node: int, other: int) -> None:
    """Put the link node → other into the first free place, if there is one."""
    for j in range(start[node], start[node + 1]):
        if links[j] == other:
            return
        if links[j] < 0:
            links[j] = other
            return


@kernel
def anchor(links: Int32, start: Int64, eager: int, candidates: Int32, count: int, node: int) -> None:
    """Link a node from the first of `count` candidates with a free place among its first `eager`; all have places.

    If none has, the node takes the last such place of the first candidate and links on to the key that had it, so that
    whatever a search reached before it still reaches.
    """
    for i in range(count):
        first = start[candidates[i]]
        for j in range(first, min(first + eager, start[candidates[i] + 1])):
            if links[j] == node:
                return
            if links[j] < 0:
                links[j] = node
                return
    place = min(start[candidates[0]] + eager, start[candidates[0] + 1]) - 1
    displaced = links[place]
    links[place] = node
    first = start[node]
    last = min(first + eager, start[node + 1]) - 1
    for j in range(first, last):
        if links[j] == displaced:
            return
        if links[j] < 0:
            links[j] = displaced
            return
    moved = links[last]
    links[last] = displaced
    if moved >= 0:
        append(links, start, node, moved)


@kernel
def choose_entries(knn: Int32, n: int, entries: Int32) -> None:
    """Fill entries [E] with the keys that are nearest to most queries, by knn [m, N_q]."""
    counts = np.zeros(n, np.int64)
    for query in range(knn.shape[0]):
        for key in knn[query]:
            counts[key] += 1
    size = 0
    best = np.empty(entries.shape[0], np.int64)
    for node in range(n):
        if counts[node]:
            _, size = insert_sorted(best, size, pack(np.float32(counts[node]), node))
    for i in range(size):
        entries[i] = packed_id(best[i])


@kernel
def build_by_cooccurrence(
    part: int,
    parts: int,
    rows: Rows,
    stride: int,
    groups: int,
    knn: Int32,
    eager: int,
    ef: int,
    graph: Int32,
    entries: Int32,
    lengths: Int64,
) -> None:
    """Build this part's heads' graphs [n, degree] from knn [H, m, N_q]; fills graph, entries and lengths."""
    heads, n, _ = graph.shape
    for head in range(part, heads, parts):
        base = (head * groups // heads) * stride
        choose_entries(knn[head], n, entries[head])
        project_cooccurrence(rows, base, knn[head], graph[head], lengths[head])
        connect(rows, base, entries[head], eager, ef, graph[head], lengths[head])


@kernel
def build_by_pivots(
    part: int,
    parts: int,
    rows: Rows,
    stride: int,
    groups: int,
    knn: Int32,
    eager: int,
    ef: int,
    graph: Int32,
    entries: Int32,
    lengths: Int64,
) -> None:
    """As `build_by_cooccurrence`; a kernel of its own, so that only what is used is compiled."""
    heads, n, _ = graph.shape
    for head in range(part, heads, parts):
        base = (head * groups // heads) * stride
        choose_entries(knn[head], n, entries[head])
        project_pivots(rows, base, knn[head], graph[head])
        link_all(rows, base, entries[head], ef, graph[head])
        count_links(graph[head], lengths[head])
        connect(rows, base, entries[head], eager, ef, graph[head], lengths[head])


@kernel
def find_worst(
    part: int, parts: int, rows: Rows, stride: int, groups: int, queries: Float32, knn: Int32, worst: Float32
) -> None:
    """Smallest inner product of each query [H, m, d] with the keys in its list [H, m, N_q], for this part's heads."""
    heads, m, _ = knn.shape
    for head in range(part, heads, parts):
        base = (head * groups // heads) * stride
        for query in range(m):
            worst[head, query] = smallest(rows, base, queries[head, query], knn[head, query])[1]


@kernel
def smallest(rows: Rows, base: int, query: Float32, listed: Int32) -> tuple[int, np.float32]:
    """Place and inner product of the listed key [N_q], -1 at its end, that is farthest from the query."""
    place = 0
    worst = np.float32(np.inf)
    for i in range(listed.shape[0]):
        if listed[i] < 0:
            break
        score = inner(rows, base + listed[i], query)
        if score < worst:
            place, worst = i, score
    return place, worst


@kernel
def enlist(
    rows: Rows, base: int, node: int, queries: Float32, knn: Int32, worst: Float32, frequency: Int32, members: Int32
) -> tuple[int, int]:
    """Put a key into the lists [m, N_q] of the queries it is nearer to than a listed key, in place of the farthest.

    Lists grow to N_q before keys leave them. `frequency` [n] counts the lists that each key is in. Gives the number of
    lists that took the key, numbers in `members` [m], and the query nearest to it.
    """
    m, width = knn.shape
    nearest = 0
    best = -np.float32(np.inf)
    count = 0
    for query in range(m):
        score = inner(rows, base + node, queries[query])
        if score > best:
            nearest, best = query, score
        last = knn[query, width - 1]
        if score <= worst[query] and (last >= 0 or node >= _LEAST_NEIGHBORS or knn[query, node] >= 0):
            continue
        members[count] = query
        count += 1
        if last >= 0:
            place, _ = smallest(rows, base, queries[query], knn[query])
            frequency[knn[query, place]] -= 1
            knn[query, place] = node
            worst[query] = smallest(rows, base, queries[query], knn[query])[1]
        else:
            place = 0
            while knn[query, place] >= 0:
                place += 1
            knn[query, place] = node
            worst[query] = min(worst[query], score)
        frequency[node] += 1
    return count, nearest


@kernel
def insert_heads(
    part: int,
    parts: int,
    rows: Rows,
    stride: int,
    groups: int,
    first: int,
    n: int,
    queries: Float32,
    knn: Int32,
    worst: Float32,
    eager: int,
    degree: int,
    links: Int32,
    start: Int64,
) -> None:
    """Insert the keys from `first` (at least 1) to n into the graphs of this part's heads."""
    heads, m, _ = knn.shape
    for head in range(part, heads, parts):
        base = (head * groups // heads) * stride
        mine = start[head]
        lists = knn[head]
        frequency = np.zeros(n, np.int32)
        for key in lists.flat:
            if key >= 0:
                frequency[key] += 1
        counts = np.zeros(n, np.int32)
        touched = np.empty(n, np.int32)
        scores = np.empty(n, np.float32)
        members = np.empty(m, np.int32)
        buckets = np.empty(257, np.int64)
        best = np.empty(4 * degree, np.int64)
        candidates = np.empty(4 * degree, np.int32)
        kept = np.empty(degree, np.int32)
        for node in range(first, n):
            number, nearest = enlist(rows, base, node, queries[head], lists, worst[head], frequency, members)
            total = 0
            for i in range(0, number, max(1, number // 32)):
                for other in lists[members[i]]:
                    if other < 0:
                        break
                    if counts[other] == 0:
                        touched[total] = other
                        total += 1
                    counts[other] += 1
            if number == 0:
                # In no list: the nearest query's keys, and those that they link to.
                for other in lists[nearest]:
                    if other < 0:
                        break
                    for j in range(mine[other] - 1, mine[other + 1]):
                        near = other if j < mine[other] else links[j]
                        if near < 0:
                            break
                        if counts[near] == 0:
                            counts[near] = 1
                            touched[total] = near
                            total += 1
            size = 0
            others = 0
            for i in range(total):
                other = touched[i]
                count = counts[other]
                counts[other] = 0
                if other == node:
                    continue
                if number == 0:
                    distance = squared_distance(rows, base + node, base + other)
                    _, size = insert_sorted(best, size, pack(-distance, other))
                else:
                    touched[others] = other
                    scores[others] = np.float32(count * frequency[other] ** -0.25)
                    others += 1
            if number:
                size = rank(touched, scores, others, buckets, candidates)
            for i in range(0 if number else size):
                candidates[i] = packed_id(best[i])
            number = prune(rows, base, node, candidates, size, degree, 1.0, False, kept)
            if number == 0:
                kept[0] = node - 1
                number = 1
            for i in range(number):
                append(links, mine, node, kept[i])
            anchor(links, mine, eager, kept, number, node)
            for i in range(number):
                append(links, mine, kept[i], node)
