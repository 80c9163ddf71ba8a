"""Compiled kernels over a graph's links: choosing, adding and moving them, and what they reach."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvbench.indexes.compiled import Float32, Int32, Int64, Rows, kernel, squared_distance
from kvbench.indexes.kernels import pack, packed_id


@kernel
def sort_by_distance(rows: Rows, base: int, node: int, ids: Int32, count: int, order: Int64) -> None:
    """Sort the first `count` ids by Euclidean distance to the node; `order` is scratch."""
    for i in range(count):
        order[i] = pack(squared_distance(rows, base + node, base + ids[i]), ids[i])
    order[:count].sort()
    for i in range(count):
        ids[i] = packed_id(order[i])


@kernel
def prune(
    rows: Rows, base: int, node: int, candidates: Int32, count: int, degree: int, alpha: float, fill: bool, kept: Int32
) -> int:
    """Choose up to `degree` of the first `count` candidates, the preferred first, into `kept`; gives their number.

    A candidate is passed over if a kept one is nearer to it, `alpha` times, than the node is (squared Euclidean
    distances); `fill` then takes passed-over ones in their order.
    """
    number = 0
    for i in range(count):
        if number == degree:
            break
        candidate = candidates[i]
        distance = squared_distance(rows, base + candidate, base + node)
        free = True
        for j in range(number):
            if alpha * squared_distance(rows, base + candidate, base + kept[j]) < distance:
                free = False
                break
        if free:
            kept[number] = candidate
            number += 1
    if fill and number < min(degree, count):
        chosen = number
        for i in range(count):
            if number == degree:
                break
            new = True
            for j in range(chosen):
                if kept[j] == candidates[i]:
                    new = False
                    break
            if new:
                kept[number] = candidates[i]
                number += 1
    return number


@kernel
def link(
    rows: Rows,
    base: int,
    graph: Int32,
    node: int,
    other: int,
    limit: int,
    alpha: float,
    fill: bool,
    order: Int64,
    candidates: Int32,
    kept: Int32,
) -> None:
    """Add the link node → other to `graph` [n, degree]; a list of `limit` links is pruned anew, nearest first.

    `order`, `candidates` and `kept` are scratch of at least limit + 1.
    """
    count = 0
    for j in range(limit):
        present = graph[node, j]
        if present < 0:
            break
        if present == other:
            return
        candidates[count] = present
        count += 1
    if count < limit:
        graph[node, count] = other
        return
    candidates[count] = other
    sort_by_distance(rows, base, node, candidates, count + 1, order)
    number = prune(rows, base, node, candidates, count + 1, limit, alpha, fill, kept)
    for j in range(limit):
        graph[node, j] = kept[j] if j < number else -1


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
def spread(links: Int32, start: Int64, eager: int, source: int, reached: NDArray[np.uint8], stack: Int32) -> int:
    """Mark in `reached` [n] what an exhaustive search evaluates from node `source` on; gives the number newly reached.

    As in `beam_search`: 0, 1 (one link past the first `eager` leads here) or 2 (reached). `stack` [n] is scratch.
    """
    if reached[source] == 2:
        return 0
    reached[source] = 2
    stack[0] = source
    top = 1
    number = 1
    while top:
        top -= 1
        node = stack[top]
        first = start[node]
        for j in range(first, start[node + 1]):
            other = links[j]
            if other < 0:
                break
            if reached[other] == 2:
                continue
            reached[other] += 2 if j - first < eager else 1
            if reached[other] >= 2:
                reached[other] = 2
                number += 1
                stack[top] = other
                top += 1
    return number


@kernel
def count_reached(links: Int32, start: Int64, eager: int, entries: Int32, n: int) -> int:
    """Number of nodes that an exhaustive search from the entries [E], ended by -1, evaluates."""
    reached = np.zeros(n, np.uint8)
    stack = np.empty(n, np.int32)
    number = 0
    for entry in entries:
        if entry >= 0:
            number += spread(links, start, eager, entry, reached, stack)
    return number


@kernel
def move_links(part: int, parts: int, links: Int32, start: Int64, new_links: Int32, new_start: Int64) -> None:
    """Copy this part's graphs to the places that `new_start` [S, ≥ n + 1] gives the nodes of `start` [S, n + 1].

    All other places become -1. Links beyond a node's new places are dropped.
    """
    graphs, n = start.shape[0], start.shape[1] - 1
    for graph in range(part, graphs, parts):
        new_links[new_start[graph, 0] : new_start[graph, -1]] = -1
        for node in range(n):
            first, place = start[graph, node], new_start[graph, node]
            for j in range(min(start[graph, node + 1] - first, new_start[graph, node + 1] - place)):
                new_links[place + j] = links[first + j]
