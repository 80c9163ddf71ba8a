"""A navigable small world graph over offloaded keys."""

from kvbench.indexes import hnsw
from kvbench.strategies.index_retrieval import IndexRetrieval, RetrievalOptions


class HNSW(IndexRetrieval):
    """Attends to the keys that an HNSW graph over the keys finds for each head's query."""

    name = "hnsw"
    summary = "Top-k over offloaded keys by a navigable small world graph (HNSW)."
    reference = hnsw.HNSW.reference
    index = hnsw.HNSW

    class Options(RetrievalOptions, hnsw.HNSW.Options):
        """Options of the retrieval policy and of the index."""
