"""Compiled construction of RoarGraph's links: projection, connectivity enhancement and repair, head by head."""

from __future__ import annotations

import numpy as np

from kvbench.indexes.compiled import Int32, Int64, Rows, half_squares, kernel
from kvbench.indexes.kernels import find_near, insert_sorted, pack, packed_id
from kvbench.indexes.links import anchor, append, link, prune, rank, sort_by_distance, spread


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
