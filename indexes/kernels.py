"""Compiled kernels over rows of vectors: inner products, beam search, pruning.

Rows are float32, the bits of float16 (uint16) or of bfloat16 (int16), or SQ8 codes (uint8); `widen` reads one number.
Every kernel gives the same result for any number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")
Rows = NDArray[Any]
Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

# Sums may be reordered and fused (SIMD needs it); infinities and NaN keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


@cache
def digest_of(folder: Path) -> str:
    """SHA-256 of a folder's Python files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class _Cache(FunctionCache):
    """numba's disk cache watches the file of the compiled function alone; its key here covers those it calls too."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._digest = digest_of(Path(function.__code__.co_filename).parent)

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), self._digest)


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function that holds no lock and is cached on disk until a file in its folder changes."""
    compiled = numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")(function)
    compiled._cache = _Cache(function)
    return cast(Callable[P, R], compiled)


def widen(bits: Any) -> Any:
    """One stored number as float32."""
    raise NotImplementedError


@overload(widen, inline="always")  # type: ignore[untyped-decorator]
def _widen(bits: Any) -> Any:
    # numba compares these signatures with the stub's, annotations included.
    if bits == types.float32:

        def read(bits: Any) -> Any:
            return bits

    elif bits == types.uint8:

        def read(bits: Any) -> Any:
            return np.float32(bits)

    elif bits == types.int16:

        def read(bits: Any) -> Any:
            return np.uint32(np.uint32(np.uint16(bits)) << np.uint32(16)).view(np.float32)

    elif bits == types.uint16:

        def read(bits: Any) -> Any:
            magnitude = np.uint32(np.uint32(bits & np.uint16(0x7FFF)) << np.uint32(13))
            sign = np.uint32(np.uint32(bits & np.uint16(0x8000)) << np.uint32(16))
            return np.uint32(magnitude | sign).view(np.float32) * np.float32(2.0**112)

    else:
        return None
    return read


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch_row(context: Any, rows: Any, row: Any) -> Any:
    """Ask for the cache lines of a row before it is read."""
    signature = types.void(rows, row)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type, _ = signature.args
        array = context.make_array(array_type)(context, builder, arguments[0])
        word = ir.IntType(64)
        byte = ir.IntType(8).as_pointer()
        stride = builder.extract_value(array.strides, 0)
        start = builder.add(builder.ptrtoint(array.data, word), builder.mul(builder.sext(arguments[1], word), stride))
        void = ir.VoidType()
        integer = ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(void, [byte, integer, integer, integer])
        )
        for line in range(4):
            address = builder.inttoptr(builder.add(start, ir.Constant(word, 64 * line)), byte)
            builder.call(prefetch, [address, integer(0), integer(3), integer(1)])
        return context.get_dummy_value()

    return signature, codegen


@kernel
def inner(rows: Rows, row: int, query: Float32) -> np.float32:
    """Inner product of one row and a float32 query [d]."""
    total = np.float32(0)
    for j in range(query.shape[0]):
        total += widen(rows[row, j]) * query[j]
    return total


@kernel
def squared_distance(rows: Rows, first: int, second: int) -> np.float32:
    """Squared Euclidean distance of two rows."""
    total = np.float32(0)
    for j in range(rows.shape[1]):
        difference = widen(rows[first, j]) - widen(rows[second, j])
        total += difference * difference
    return total


@kernel
def decode(array: Rows) -> Float32:
    """Rows [h, n, d] of any stored format as float32."""
    out = np.empty(array.shape, np.float32)
    source, target = array.reshape(-1), out.reshape(-1)
    for i in range(source.shape[0]):
        target[i] = widen(source[i])
    return out


@kernel
def find_beyond(rows: Rows, stride: int, groups: int, first: int, n: int, limit: float) -> int:
    """Number (`group * n + key`) of the first key from `first` on with NaN or a magnitude above `limit`, or -1."""
    for group in range(groups):
        for i in range(first, n):
            beyond = 0
            for j in range(rows.shape[1]):
                beyond += not abs(widen(rows[group * stride + i, j])) <= limit
            if beyond:
                return group * n + i
    return -1


@kernel
def read_row(rows: Rows, row: int, out: Float32) -> None:
    """One row as float32 [d]."""
    for j in range(out.shape[0]):
        out[j] = widen(rows[row, j])


# One int64 that sorts by score, then by smaller id: sortable bits of the score, 31 bits of ~id, whether expanded.
@kernel
def half_squares(rows: Rows, base: int, n: int) -> Float32:
    """Half the squared norm of each of n rows."""
    half_norms = np.empty(n, np.float32)
    row = np.empty(rows.shape[1], np.float32)
    for node in range(n):
        read_row(rows, base + node, row)
        norm = np.float32(0)
        for j in range(row.shape[0]):
            norm += row[j] * row[j]
        half_norms[node] = norm / np.float32(2)
    return half_norms


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
            _prefetch_row(rows, base + fresh[j])
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
    for item in range(part, heads * count, parts):
        head, number = item // count, item % count
        graph = head * graphs // heads
        group = head * groups // heads
        base = group * stride
        query = queries[head, number]
        seen[:] = 0
        size, total = enter(rows, base, query, entries[graph], pool, seen, None)
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


@kernel
def quantize_rows(rows: Float32, low: Float32, scale: Float32) -> NDArray[np.uint8]:
    """Rows [n, d] as 8-bit steps of `scale` [d] above `low` [d], clipped."""
    codes = np.empty(rows.shape, np.uint8)
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            step = np.rint((rows[i, j] - low[j]) / scale[j])
            codes[i, j] = np.uint8(min(max(step, 0.0), 255.0))
    return codes
