"""Exhaustive search over 8-bit codes, re-ranked exactly."""

from __future__ import annotations

from typing import Any, ClassVar

import faiss
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kvbench.contract.extension import Options
from kvbench.indexes.base import Index, SearchResult, State, expect, expect_finite
from kvbench.indexes.flat import keep_best
from kvbench.indexes.ivf import rescore
from kvbench.indexes.threads import each_head


class SQ8(Index):
    """All keys as 8 bits per dimension; the best candidates are scored again with the keys (faiss)."""

    name: ClassVar[str] = "sq8"
    summary: ClassVar[str] = "exhaustive search over 8-bit codes, re-ranked exactly"
    reference: ClassVar[str] = "Douze et al., The Faiss library, 2024 (arXiv:2401.08281)"
    search_parameter: ClassVar[str] = "refine"

    class Options(Options):
        """Options of `sq8`."""

        refine: int = Field(2, ge=1, description="candidates re-ranked exactly, in multiples of k")

    scalers: list[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and of the two scales per dimension."""
        return self.keys.groups * self.keys.d * (self.keys.n + 8) if self.keys.n else 0

    def _new(self) -> Any:
        return faiss.IndexScalarQuantizer(self.keys.d, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)

    def _build(self, queries: NDArray[np.float32] | None) -> None:
        self.scalers = [self._new() for _ in range(self.keys.groups)]
        each_head(self.keys.groups, lambda group: self.scalers[group].train(self.keys.float32(group)))
        self._insert(0)

    def _insert(self, first: int) -> None:
        each_head(self.keys.groups, lambda group: self.scalers[group].add(self.keys.float32(group, first)))

    def _search(self, queries: NDArray[np.float32], k: int, effort: int, result: SearchResult) -> None:
        keys = self.keys

        def one(head: int) -> None:
            group = head * keys.groups // self.heads
            _, ids = self.scalers[group].search(queries[head], min(k * effort, keys.n))
            scores = rescore(keys, group, queries[head], ids)
            result.evaluations[head] = keys.n + (ids >= 0).sum(1)
            keep_best(ids, scores, result.ids[head], result.scores[head])

        each_head(self.heads, one)

    def _state(self) -> State:
        shape = (self.keys.groups, self.keys.n, self.keys.d)
        return {
            "codes": np.stack([faiss.vector_to_array(scaler.codes) for scaler in self.scalers]).reshape(shape),
            "scales": np.stack([faiss.vector_to_array(scaler.sq.trained) for scaler in self.scalers]),
        }

    def _restore(self, state: State) -> None:
        keys = self.keys
        codes = expect(state, "codes", np.uint8, (keys.groups, keys.n, keys.d))
        scales = expect_finite(state, "scales", (keys.groups, 2 * keys.d))
        if scales[:, keys.d :].min() < 0:
            raise ValueError("scales")
        self.scalers = [self._new() for _ in range(keys.groups)]
        for group, scaler in enumerate(self.scalers):
            faiss.copy_array_to_vector(scales[group], scaler.sq.trained)
            scaler.is_trained = True
            scaler.add_sa_codes(np.ascontiguousarray(codes[group]))
