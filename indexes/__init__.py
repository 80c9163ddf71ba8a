"""Vector indexes over keys: arrays in, ids out, for all heads of a layer in one call."""

import pluggy

from kvbench.indexes.base import Index, SearchResult
from kvbench.indexes.cagra import Cagra
from kvbench.indexes.flat import Flat
from kvbench.indexes.hnsw import HNSW
from kvbench.indexes.ivf import IVF
from kvbench.indexes.ivfpq import IVFPQ
from kvbench.indexes.roargraph import RoarGraph
from kvbench.indexes.robust_vamana import RobustVamana
from kvbench.indexes.sq8 import SQ8
from kvbench.indexes.vamana import Vamana

__all__ = [
    "HNSW",
    "IVF",
    "IVFPQ",
    "SQ8",
    "Cagra",
    "Flat",
    "Index",
    "RoarGraph",
    "RobustVamana",
    "SearchResult",
    "Vamana",
    "kvbench_indexes",
]

hookimpl = pluggy.HookimplMarker("kvbench")


@hookimpl
def kvbench_indexes() -> list[type[Index]]:
    """The indexes that come with kvbench."""
    return [Flat, IVF, HNSW, IVFPQ, SQ8, Vamana, RobustVamana, Cagra, RoarGraph]
