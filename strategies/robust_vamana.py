"""OOD-DiskANN's graph over offloaded keys."""

from kvbench.indexes.robust_vamana import RobustVamana as RobustVamanaIndex
from kvbench.strategies.index_retrieval import IndexRetrieval, RetrievalOptions


class RobustVamana(IndexRetrieval):
    """Attends to the keys found by a Vamana graph that a sample of the prompt's queries took part in."""

    name = "robust_vamana"
    summary = "Top-k over offloaded keys by OOD-DiskANN's graph, built with queries of the prompt (RobustVamana)."
    reference = RobustVamanaIndex.reference
    index = RobustVamanaIndex

    class Options(RetrievalOptions, RobustVamanaIndex.Options):
        """Options of the retrieval policy and of the index."""
