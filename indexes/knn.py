"""Exact nearest keys of training queries: the bipartite graph that attention-aware indexes start from."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvbench.indexes.storage import KeyStore
from kvbench.indexes.threads import each_head

SCORES = 1 << 22
"""Inner products of queries and keys that a thread holds at a time."""


def nearest_keys(keys: KeyStore, queries: NDArray[np.float32], neighbors: int) -> NDArray[np.int32]:
    """Ids [S, m, min(neighbors, n)] of the keys with the largest inner products with queries [S, m, d], best first.

    S is a multiple of the key/value heads; queries [s] are compared with the keys of group s // (S // G).
    """
    sets, m, _ = queries.shape
    n = keys.n
    knn = np.empty((sets, m, min(neighbors, n)), np.int32)
    k, rows = knn.shape[2], max(1, SCORES // n)

    def one(number: int) -> None:
        across = torch.from_numpy(keys.float32(number * keys.groups // sets)).T
        for first in range(0, m, rows):
            scores = (torch.from_numpy(queries[number, first : first + rows]) @ across).numpy()
            found = np.argpartition(scores, n - k, axis=1)[:, n - k :]
            order = np.argsort(-np.take_along_axis(scores, found, axis=1), axis=1, kind="stable")
            knn[number, first : first + rows] = np.take_along_axis(found, order, axis=1)

    each_head(sets, one)
    return knn


def draw(queries: NDArray[np.float32], sample: int, recent: float, seed: int) -> NDArray[np.float32]:
    """At most `sample` queries of each head [H, m, d], the same positions for all heads, in their order.

    The share `recent` comes from the last quarter of the positions, and half of that share from the very last ones.
    """
    m = queries.shape[1]
    return queries if m <= sample else np.ascontiguousarray(queries[:, drawn(m, sample, recent, seed)])


def drawn(m: int, sample: int, recent: float, seed: int) -> NDArray[np.bool_]:
    """Which of m positions, bool [m], `draw` takes."""
    if m <= sample:
        return np.ones(m, bool)
    generator = np.random.default_rng(seed)
    last = min(round(sample * recent / 2), m // 4)
    late = min(round(sample * recent) - last, m // 4 - last)
    quarter = m - m // 4
    chosen = np.zeros(m, bool)
    chosen[m - last :] = True
    chosen[quarter + generator.choice(m // 4 - last, late, replace=False)] = True
    free = np.flatnonzero(~chosen)
    chosen[generator.choice(free, sample - last - late, replace=False)] = True
    return chosen
