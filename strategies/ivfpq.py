"""Product-quantised inverted lists over offloaded keys."""

from kvbench.indexes import ivfpq
from kvbench.strategies.index_retrieval import IndexRetrieval, RetrievalOptions


class IVFPQ(IndexRetrieval):
    """Attends to the best keys of the nearest inverted lists, by product-quantised codes and exact re-ranking."""

    name = "ivfpq"
    summary = "Top-k over offloaded keys by inverted lists of product-quantised codes (IVF-PQ)."
    reference = ivfpq.IVFPQ.reference
    index = ivfpq.IVFPQ

    class Options(RetrievalOptions, ivfpq.IVFPQ.Options):
        """Options of the retrieval policy and of the index."""
