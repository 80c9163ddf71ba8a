"""Compiled insertion of keys into RoarGraph: into the lists of training queries, and into the links."""

from __future__ import annotations

import numpy as np

from kvbench.indexes.compiled import Float32, Int32, Int64, Rows, inner, kernel, squared_distance
from kvbench.indexes.kernels import insert_sorted, pack, packed_id
from kvbench.indexes.links import anchor, append, prune, rank

LEAST_NEIGHBORS = 32
"""Nearest keys of a training query, at least."""


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
        if score <= worst[query] and (last >= 0 or node >= LEAST_NEIGHBORS or knn[query, node] >= 0):
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
