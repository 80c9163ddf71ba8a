"""Exact nearest keys of training queries: the bipartite graph that attention-aware indexes start from."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from kvbench.indexes.storage import KeyStore
from kvbench.indexes.threads import each_head


def nearest_keys(keys: KeyStore, queries: NDArray[np.float32], neighbors: int) -> NDArray[np.int32]:
    """Ids [S, m, min(neighbors, n)] of the keys with the largest inner products with queries [S, m, d], best first.

    S is a multiple of the key/value heads; queries [s] are compared with the keys of group s // (S // G).
    """
    sets, m, _ = queries.shape
    knn = np.empty((sets, m, min(neighbors, keys.n)), np.int32)

    def one(number: int) -> None:
        block = keys.float32(number * keys.groups // sets)
        knn[number] = faiss.knn(queries[number], block, knn.shape[2], metric=faiss.METRIC_INNER_PRODUCT)[1]

    each_head(sets, one)
    return knn


def draw(queries: NDArray[np.float32], sample: int, recent: float, seed: int) -> NDArray[np.float32]:
    """At most `sample` queries of each head [H, m, d], the same positions for all heads, in their order.

    The share `recent` comes from the last quarter of the positions, and half of that share from the very last ones.
    """
    m = queries.shape[1]
    if m <= sample:
        return queries
    generator = np.random.default_rng(seed)
    last = min(round(sample * recent / 2), m // 4)
    late = min(round(sample * recent) - last, m // 4 - last)
    quarter = m - m // 4
    chosen = np.zeros(m, bool)
    chosen[m - last :] = True
    chosen[quarter + generator.choice(m // 4 - last, late, replace=False)] = True
    free = np.flatnonzero(~chosen)
    chosen[generator.choice(free, sample - last - late, replace=False)] = True
    return np.ascontiguousarray(queries[:, chosen])
