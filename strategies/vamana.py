"""DiskANN's graph over offloaded keys."""

from kvbench.indexes.vamana import Vamana as VamanaIndex
from kvbench.strategies.index_retrieval import IndexRetrieval, RetrievalOptions


class Vamana(IndexRetrieval):
    """Attends to the keys that a Vamana graph over the keys finds for each head's query."""

    name = "vamana"
    summary = "Top-k over offloaded keys by DiskANN's graph (Vamana)."
    reference = VamanaIndex.reference
    index = VamanaIndex

    class Options(RetrievalOptions, VamanaIndex.Options):
        """Options of the retrieval policy and of the index."""
