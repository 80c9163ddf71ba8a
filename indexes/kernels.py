"""Compiled kernels over graphs: candidate lists, beam search, pruning, links and what they reach."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from kvbench.indexes.compiled import (
    Float32,
    Int32,
    Int64,
    Rows,
    inner,
    kernel,
    prefetch_row,
    read_row,
)

# One int64 that sorts by score, then by smaller id: sortable bits of the score, 31 bits of ~id, whether expanded.
WIDE = 512
"""Length of the candidate list from which on it is a heap."""


@kernel
def pack(score: np.float32, node: int) -> np.int64:
    """Score and id as one integer that orders by score, then by smaller id."""
    bits = np.int64(np.float32(score + np.float32(0)).view(np.int32))
    ordered = bits ^ ((bits >> np.int64(63)) & np.int64(0x7FFFFFFF))
    return np.int64((ordered << np.int64(32)) | ((np.int64(0x7FFFFFFF) - np.int64(node)) << np.int64(1)))


@kernel
def packed_id(entry: np.int64) -> int:
    """The id in a packed entry."""
    return int(np.int64(0x7FFFFFFF) - ((entry >> np.int64(1)) & np.int64(0x7FFFFFFF)))


@kernel
def packed_score(entry: np.int64) -> np.float32:
    """The score in a packed entry."""
    ordered = entry >> np.int64(32)
    bits = ordered ^ ((ordered >> np.int64(63)) & np.int64(0x7FFFFFFF))
    return np.int32(bits).view(np.float32)


@intrinsic  # type: ignore[untyped-decorator]
def _shift_up(context: Any, pool: Any, low: Any, end: Any) -> Any:
    """Move pool[low:end] to pool[low + 1:end + 1]."""
    signature = types.void(pool, types.intp, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        word = ir.IntType(64)
        byte = ir.IntType(8).as_pointer()
        eight = ir.Constant(word, 8)
        source = builder.add(builder.ptrtoint(array.data, word), builder.mul(arguments[1], eight))
        length = builder.mul(builder.sub(arguments[2], arguments[1]), eight)
        memmove = builder.module.declare_intrinsic("llvm.memmove", [byte, byte, word])
        target = builder.inttoptr(builder.add(source, eight), byte)
        builder.call(memmove, [target, builder.inttoptr(source, byte), length, ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return signature, codegen


@kernel
def insert_sorted(pool: Int64, size: int, entry: np.int64) -> tuple[int, int]:
    """Insert into a pool sorted downwards; gives position (capacity: no place) and size."""
    capacity = pool.shape[0]
    if size == capacity and entry < pool[capacity - 1]:
        return capacity, size
    low, high = 0, size
    while low < high:
        middle = (low + high) >> 1
        if pool[middle] > entry:
            low = middle + 1
        else:
            high = middle
    end = min(size, capacity - 1)
    _shift_up(pool, low, end)
    pool[low] = entry
    return low, end + 1


@kernel
def beam_search(
    rows: Rows,
    base: int,
    query: Float32,
    links: Int32,
    start: Int64,
    eager: int,
    pool: Int64,
    size: int,
    seen: NDArray[np.uint8],
    fresh: Int32,
    half_norms: Float32 | None,
) -> tuple[int, int]:
    """Best-first search from the entries already in `pool` [ef]; gives pool size and evaluations.

    By inner product, or with `half_norms` [n] (|key|² / 2) by Euclidean distance. Node i links to
    `links[start[i]:start[i + 1]]`, padded with -1. Its first `eager` links are evaluated at once, the others when a
    second expanded node links to them. `seen` [n] is 0, 1 (linked once) or 2 (evaluated); `fresh` is scratch.
    """
    evaluations = 0
    capacity = pool.shape[0]
    position = 0
    while position < size:
        entry = pool[position]
        if entry & 1:
            position += 1
            continue
        pool[position] = entry | 1
        node = packed_id(entry)
        first = start[node]
        count = 0
        for j in range(first, start[node + 1]):
            other = links[j]
            if other < 0:
                break
            before = seen[other]
            after = min(before + (2 if j - first < eager else 1), 2)
            seen[other] = after
            # Without a branch: the next write overwrites what is not counted.
            fresh[count] = other
            count += after - max(before, 1)
        for j in range(count):
            prefetch_row(rows, base + fresh[j])
        evaluations += count
        lowest = capacity
        for j in range(count):
            other = fresh[j]
            score = inner(rows, base + other, query)
            if half_norms is not None:
                score -= half_norms[other]
            at, size = insert_sorted(pool, size, pack(score, other))
            lowest = min(lowest, at)
        position = min(position + 1, lowest)
    return size, evaluations


@kernel
def push(heap: Int64, size: int, entry: np.int64) -> None:
    """Add an entry to a heap of `size` entries whose smallest is first."""
    place = size
    while place > 0:
        parent = (place - 1) >> 1
        if heap[parent] <= entry:
            break
        heap[place] = heap[parent]
        place = parent
    heap[place] = entry


@kernel
def replace_first(heap: Int64, size: int, entry: np.int64) -> None:
    """Put an entry in the place of a heap's smallest."""
    place = 0
    child = 1
    while child < size:
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= entry:
            break
        heap[place] = heap[child]
        place = child
        child = 2 * place + 1
    heap[place] = entry


@kernel
def wide_search(
    rows: Rows,
    base: int,
    query: Float32,
    links: Int32,
    start: Int64,
    eager: int,
    pool: Int64,
    size: int,
    seen: NDArray[np.uint8],
    fresh: Int32,
    frontier: Int64,
) -> tuple[int, int]:
    """`beam_search` by inner product for long pools: the same keys after the same evaluations, with heaps.

    Inserting into a sorted pool takes time in proportion to its length. Here the pool is a heap whose worst entry is
    first, and `frontier` [n], scratch, one of the entries that are not expanded, best first. The pool comes and goes
    sorted downwards.
    """
    evaluations = 0
    capacity = pool.shape[0]
    waiting = 0
    for i in range(size):
        push(frontier, waiting, ~pool[i])
        waiting += 1
    pool[:size].sort()
    while waiting > 0:
        entry = ~frontier[0]
        if size == capacity and entry < pool[0]:
            break
        waiting -= 1
        replace_first(frontier, waiting, frontier[waiting])
        node = packed_id(entry)
        first = start[node]
        count = 0
        for j in range(first, start[node + 1]):
            other = links[j]
            if other < 0:
                break
            before = seen[other]
            after = min(before + (2 if j - first < eager else 1), 2)
            seen[other] = after
            fresh[count] = other
            count += after - max(before, 1)
        for j in range(count):
            prefetch_row(rows, base + fresh[j])
        evaluations += count
        for j in range(count):
            other = fresh[j]
            new = pack(inner(rows, base + other, query), other)
            if size < capacity:
                push(pool, size, new)
                size += 1
            elif new > pool[0]:
                replace_first(pool, size, new)
            else:
                continue
            push(frontier, waiting, ~new)
            waiting += 1
    for i in range(size):
        pool[i] = ~pool[i]
    pool[:size].sort()
    for i in range(size):
        pool[i] = ~pool[i]
    return size, evaluations


@kernel
def enter(
    rows: Rows,
    base: int,
    query: Float32,
    entries: Int32,
    pool: Int64,
    seen: NDArray[np.uint8],
    half_norms: Float32 | None,
) -> tuple[int, int]:
    """Empty the pool and evaluate the entry points [E], ended by -1; gives pool size and evaluations."""
    size = 0
    evaluations = 0
    for e in range(entries.shape[0]):
        node = entries[e]
        if node < 0:
            break
        if seen[node] == 2:
            continue
        seen[node] = 2
        evaluations += 1
        score = inner(rows, base + node, query)
        if half_norms is not None:
            score -= half_norms[node]
        _, size = insert_sorted(pool, size, pack(score, node))
    return size, evaluations


@kernel
def find_near(
    rows: Rows,
    base: int,
    node: int,
    entries: Int32,
    links: Int32,
    start: Int64,
    eager: int,
    half_norms: Float32,
    pool: Int64,
    seen: NDArray[np.uint8],
    fresh: Int32,
    query: Float32,
    candidates: Int32,
) -> int:
    """Put the keys that a search by Euclidean distance finds near a node into candidates, nearest first; their number.

    `pool` [ef] is the candidate list; `seen`, `fresh` and `query` are scratch.
    """
    read_row(rows, base + node, query)
    seen[:] = 0
    size, _ = enter(rows, base, query, entries, pool, seen, half_norms)
    size, _ = beam_search(rows, base, query, links, start, eager, pool, size, seen, fresh, half_norms)
    count = 0
    for i in range(size):
        other = packed_id(pool[i])
        if other != node:
            candidates[count] = other
            count += 1
    return count


@kernel
def search_graph(
    part: int,
    parts: int,
    rows: Rows,
    stride: int,
    queries: Float32,
    groups: int,
    n: int,
    links: Int32,
    start: Int64,
    entries: Int32,
    ef: int,
    eager: int,
    degree: int,
    rerank: bool,
    exact_rows: Rows,
    exact_stride: int,
    exact_queries: Float32,
    ids: Int32,
    scores: Float32,
    evaluations: Int64,
) -> None:
    """Search this part's share of all heads' queries; fills ids and scores [H, q, k] and evaluations [H, q].

    queries [H, q, d] are scored against `rows`: keys, or SQ8 codes, and then `rerank` scores the pool again with
    `exact_queries` against `exact_rows`. start [S, ≥ n + 1] and entries [S, E] belong to S graphs of at most
    `degree` links a node, each shared by H // S heads.
    """
    heads, count, k = ids.shape
    graphs = start.shape[0]
    seen = np.empty(n, np.uint8)
    pool = np.empty(ef, np.int64)
    fresh = np.empty(degree, np.int32)
    frontier = np.empty(n if ef >= WIDE else 0, np.int64)
    for item in range(part, heads * count, parts):
        head, number = item // count, item % count
        graph = head * graphs // heads
        group = head * groups // heads
        base = group * stride
        query = queries[head, number]
        seen[:] = 0
        size, total = enter(rows, base, query, entries[graph], pool, seen, None)
        if ef >= WIDE:
            size, more = wide_search(
                rows, base, query, links, start[graph], eager, pool, size, seen, fresh, frontier
            )  # fmt: skip
        else:
            size, more = beam_search(rows, base, query, links, start[graph], eager, pool, size, seen, fresh, None)
        total += more
        if rerank:
            exact = exact_queries[head, number]
            for i in range(size):
                node = packed_id(pool[i])
                pool[i] = -pack(inner(exact_rows, group * exact_stride + node, exact), node)
            total += size
            pool[:size].sort()
            for i in range(size):
                pool[i] = -pool[i]
        found = min(size, k)
        for i in range(found):
            ids[head, number, i] = packed_id(pool[i])
            scores[head, number, i] = packed_score(pool[i])
        evaluations[head, number] = total
