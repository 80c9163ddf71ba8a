"""Compiled insertion of keys into RoarGraph: into the lists of training queries, and into the links."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvbench.indexes.compiled import Float32, Int32, Int64, Rows, inner, kernel, read_row, squared_distance
from kvbench.indexes.kernels import insert_sorted, pack, packed_id, packed_score
from kvbench.indexes.links import anchor, append, prune, rank

LEAST_NEIGHBORS = 32
"""Nearest keys of a training query, at least."""
LISTS = 32
"""Of the lists that take a new key, so many are looked at for its links, or up to twice as many."""
CANDIDATES = 192
"""Keys that a new key's links are chosen from, at most."""
NEAREST = 64
"""Of the nearest query's list so many keys are looked at where no list takes the new key."""


@kernel
def sort_lists(
    part: int, parts: int, rows: Rows, stride: int, groups: int, queries: Rows, knn: Int32, worst: Float32
) -> None:
    """Order the lists [S, m, N_q] of queries [S · m, d] by falling inner product, for this part's graphs.

    `worst` [S, m] gets that of the last key of each list.
    """
    graphs, m, width = knn.shape
    query = np.empty(queries.shape[1], np.float32)
    order = np.empty(width, np.int64)
    for graph in range(part, graphs, parts):
        base = (graph * groups // graphs) * stride
        for number in range(m):
            read_row(queries, graph * m + number, query)
            listed = knn[graph, number]
            length = 0
            while length < width and listed[length] >= 0:
                order[length] = -pack(inner(rows, base + listed[length], query), listed[length])
                length += 1
            order[:length].sort()
            for i in range(length):
                listed[i] = packed_id(-order[i])
            worst[graph, number] = packed_score(-order[length - 1])


@kernel
def enlist(
    rows: Rows,
    base: int,
    node: int,
    key: Float32,
    queries: Rows,
    first: int,
    knn: Int32,
    worst: Float32,
    frequency: NDArray[np.uint16],
    members: Int32,
    query: Float32,
) -> tuple[int, int]:
    """Put a node's key [d] into the lists [m, N_q] of the queries it is nearer to than their last, which leaves.

    The queries are the rows from `first` on. Lists, best first, grow to N_q before keys leave them. `frequency` [n]
    counts the lists that each key is in; `query` is scratch. Gives the number of lists that took the key, numbers in
    `members` [m], and the query nearest to it.
    """
    m, width = knn.shape
    nearest = 0
    best = -np.float32(np.inf)
    count = 0
    for number in range(m):
        score = inner(queries, first + number, key)
        if score > best:
            nearest, best = number, score
        listed = knn[number]
        full = listed[width - 1] >= 0
        if score <= worst[number] and (full or node >= LEAST_NEIGHBORS or listed[node] >= 0):
            continue
        members[count] = number
        count += 1
        high = width
        if not full:
            high = 0
            while listed[high] >= 0:
                high += 1
        last = high
        low = 0
        read_row(queries, first + number, query)
        while low < high:
            middle = (low + high) >> 1
            if inner(rows, base + listed[middle], query) >= score:
                low = middle + 1
            else:
                high = middle
        if full:
            frequency[listed[width - 1]] -= np.uint16(1)
            last = width - 1
            low = min(low, last)
        for i in range(last, low, -1):
            listed[i] = listed[i - 1]
        listed[low] = node
        if full or low == last:
            worst[number] = inner(rows, base + listed[last], query)
        frequency[node] += np.uint16(1)
    return count, nearest


@kernel
def count_lists(knn: Int32, frequency: NDArray[np.uint16]) -> None:
    """Count in `frequency` [S, ≥ n] the lists [S, m, N_q] that each key is in."""
    for graph in range(knn.shape[0]):
        for key in knn[graph].flat:
            if key >= 0:
                frequency[graph, key] += np.uint16(1)


@kernel
def insert_heads(
    part: int,
    parts: int,
    rows: Rows,
    stride: int,
    groups: int,
    first: int,
    n: int,
    queries: Rows,
    knn: Int32,
    worst: Float32,
    frequencies: NDArray[np.uint16],
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
        frequency = frequencies[head]
        counts = np.zeros(n, np.uint8)
        most = min(n, max(2 * LISTS * lists.shape[1], NEAREST * (degree + 1)))
        touched = np.empty(most, np.int32)
        scores = np.empty(most, np.float32)
        members = np.empty(m, np.int32)
        buckets = np.empty(257, np.int64)
        best = np.empty(CANDIDATES, np.int64)
        candidates = np.empty(CANDIDATES, np.int32)
        kept = np.empty(degree, np.int32)
        key = np.empty(rows.shape[1], np.float32)
        query = np.empty(rows.shape[1], np.float32)
        for node in range(first, n):
            read_row(rows, base + node, key)
            number, nearest = enlist(
                rows, base, node, key, queries, head * m, lists, worst[head], frequency, members, query
            )
            total = 0
            for i in range(0, number, max(1, number // LISTS)):
                for other in lists[members[i]]:
                    if other < 0:
                        break
                    if counts[other] == 0:
                        touched[total] = other
                        total += 1
                    counts[other] += np.uint8(1)
            if number == 0:
                # In no list: the nearest query's best keys, and those that they link to first.
                for other in lists[nearest, :NEAREST]:
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
                    scores[others] = np.float32(count) * np.float32(frequency[other]) ** np.float32(-0.25)
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
