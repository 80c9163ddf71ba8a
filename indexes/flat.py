"""Exact search: every key is compared with every query."""

from __future__ import annotations

from typing import ClassVar

import faiss
import numpy as np
from numpy.typing import NDArray

from kvbench.indexes.base import Index, SearchResult, State
from kvbench.indexes.threads import each_head

_BLOCK = 65536


class Flat(Index):
    """Exact top-k by inner product (faiss)."""

    name: ClassVar[str] = "flat"
    summary: ClassVar[str] = "exact search over all keys"
    reference: ClassVar[str] = "Douze et al., The Faiss library, 2024 (arXiv:2401.08281)"

    @property
    def nbytes(self) -> int:
        """No structure: 0 bytes."""
        return 0

    def _build(self, queries: NDArray[np.float32] | None) -> None:
        pass

    def _insert(self, first: int) -> None:
        pass

    def _search(self, queries: NDArray[np.float32], k: int, effort: int, result: SearchResult) -> None:
        each_head(self.heads, lambda head: self._search_head(head, queries[head], k, result))
        result.evaluations[:] = self.keys.n

    def _search_head(self, head: int, queries: NDArray[np.float32], k: int, result: SearchResult) -> None:
        group = head * self.keys.groups // self.heads
        scores, ids = [], []
        for first in range(0, self.keys.n, _BLOCK):
            block = self.keys.float32(group, first, first + _BLOCK)
            part, where = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            scores.append(part)
            ids.append(where + first)
        keep_best(np.concatenate(ids, 1), np.concatenate(scores, 1), result.ids[head], result.scores[head])

    def _state(self) -> State:
        return {}

    def _restore(self, state: State) -> None:
        pass


def keep_best(
    ids: NDArray[np.int64], scores: NDArray[np.float32], best_ids: NDArray[np.int32], best_scores: NDArray[np.float32]
) -> None:
    """Fill the best k of each query's candidates [q, c], equal scores by smaller id; an id of -1 is none."""
    scores = np.where(ids < 0, -np.inf, scores).astype(np.float32, copy=False)
    order = np.lexsort((ids, -scores), axis=1)[:, : best_ids.shape[1]]
    rows, width = np.arange(len(ids))[:, None], order.shape[1]
    best_ids[:, :width] = ids[rows, order]
    best_scores[:, :width] = scores[rows, order]
