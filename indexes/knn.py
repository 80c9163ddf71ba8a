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


def draw(queries: NDArray[np.float32], sample: int, seed: int) -> NDArray[np.float32]:
    """At most `sample` queries of each head [H, m, d], the same positions for all heads, in their order."""
    m = queries.shape[1]
    if m <= sample:
        return queries
    chosen = np.sort(np.random.default_rng(seed).choice(m, sample, replace=False))
    return np.ascontiguousarray(queries[:, chosen])
