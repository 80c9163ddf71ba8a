"""Compiled inverted lists: arranging the keys by list, and scanning the lists of the best centroids."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvbench.indexes.compiled import Float32, Int32, Int64, Rows, inner, kernel, prefetch_row, read_row
from kvbench.indexes.kernels import pack, packed_id, packed_score

AHEAD = 8
"""Keys whose memory is asked for before they are scored."""


@kernel
def arrange_lists(part: int, parts: int, assigned: Int32, n: int, begins: Int64, sizes: Int64, members: Int32) -> None:
    """Sort this part's groups' keys by their list `assigned` [G, ≥ n], in the keys' order within one.

    List l of group g is the first `sizes[g, l]` of `members[g, begins[g, l]:begins[g, l + 1]]`; it has room for an
    eighth more keys, and four: `members` [G, ≥ n + n // 8 + 4 L].
    """
    for group in range(part, assigned.shape[0], parts):
        begin, size = begins[group], sizes[group]
        size[:] = 0
        for i in range(n):
            size[assigned[group, i]] += 1
        begin[0] = 0
        for number in range(size.shape[0]):
            begin[number + 1] = begin[number] + size[number] + size[number] // 8 + 4
            size[number] = 0
        for i in range(n):
            number = assigned[group, i]
            members[group, begin[number] + size[number]] = i
            size[number] += 1


@kernel
def place_keys(
    part: int,
    parts: int,
    rows: Rows,
    stride: int,
    first: int,
    n: int,
    centroids: Float32,
    half_norms: Float32,
    assigned: Int32,
    begins: Int64,
    sizes: Int64,
    members: Int32,
    full: NDArray[np.uint8],
) -> None:
    """Put the keys `first` to n − 1 of this part's groups into the list of their nearest centroid [G, L, d].

    `half_norms` [G, L] are half the centroids' squared norms. Of a list without room the key is left out, and `full`
    [G] set; `assigned` is right in any case.
    """
    row = np.empty(rows.shape[1], np.float32)
    for group in range(part, centroids.shape[0], parts):
        for key in range(first, n):
            read_row(rows, group * stride + key, row)
            best, nearest = np.float32(-np.inf), 0
            for number in range(centroids.shape[1]):
                score = inner(centroids[group], number, row) - half_norms[group, number]
                if score > best:
                    best, nearest = score, number
            assigned[group, key] = nearest
            place = begins[group, nearest] + sizes[group, nearest]
            if place < begins[group, nearest + 1]:
                members[group, place] = key
                sizes[group, nearest] += 1
            else:
                full[group] = 1


@kernel
def best_first(entries: Int64, count: int, k: int) -> int:
    """Bring the k largest of the first `count` different entries to the front, largest first; gives their number.

    By quickselect (Hoare 1961), so that only those k are sorted.
    """
    low, high = 0, count - 1
    while k < count and low < high:
        a, b, c = entries[low], entries[(low + high) >> 1], entries[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while entries[i] > pivot:
                i += 1
            while entries[j] < pivot:
                j -= 1
            if i <= j:
                entries[i], entries[j] = entries[j], entries[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    number = min(k, count)
    for i in range(number):
        entries[i] = ~entries[i]
    entries[:number].sort()
    for i in range(number):
        entries[i] = ~entries[i]
    return number


@kernel
def search_lists(
    part: int,
    parts: int,
    rows: Rows,
    stride: int,
    queries: Float32,
    centroids: Float32,
    begins: Int64,
    sizes: Int64,
    members: Int32,
    nprobe: int,
    ids: Int32,
    scores: Float32,
    evaluations: Int64,
) -> None:
    """Scan, for this part's share of all heads' queries [H, q, d], the lists of the `nprobe` best centroids [G, L, d].

    Fills ids and scores [H, q, k] and evaluations [H, q]: centroids and keys compared. Lists are those of
    `arrange_lists`; key i of group g is row `g * stride + i`.
    """
    heads, count, k = ids.shape
    groups, number = centroids.shape[:2]
    near = np.empty(number, np.int64)
    found = np.empty(1024, np.int64)
    for item in range(part, heads * count, parts):
        head, at = item // count, item % count
        group = head * groups // heads
        query = queries[head, at]
        for i in range(number):
            near[i] = pack(inner(centroids[group], i, query), i)
        best_first(near, number, nprobe)
        begin = begins[group]
        total = 0
        for i in range(nprobe):
            probed = packed_id(near[i])
            total += sizes[group, probed]
        if total > found.shape[0]:
            found = np.empty(2 * total, np.int64)
        base = group * stride
        size = 0
        for i in range(nprobe):
            probed = packed_id(near[i])
            first, last = begin[probed], begin[probed] + sizes[group, probed]
            for j in range(first, min(first + AHEAD, last)):
                prefetch_row(rows, base + members[group, j])
            for j in range(first, last):
                if j + AHEAD < last:
                    prefetch_row(rows, base + members[group, j + AHEAD])
                key = members[group, j]
                found[size] = pack(inner(rows, base + key, query), key)
                size += 1
        evaluations[head, at] = number + total
        kept = best_first(found, size, k)
        for i in range(kept):
            ids[head, at, i] = packed_id(found[i])
            scores[head, at, i] = packed_score(found[i])
