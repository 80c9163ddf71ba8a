"""Product-quantised inverted lists over offloaded keys."""

from kvbench.indexes.ivfpq import IVFPQ as IVFPQIndex
from kvbench.strategies.index_retrieval import IndexRetrieval, RetrievalOptions


class IVFPQ(IndexRetrieval):
    """Attends to the best keys of the nearest inverted lists, found by product-quantised codes and re-ranked exactly."""

    name = "ivfpq"
    summary = "Top-k over offloaded keys by inverted lists of product-quantised codes (IVF-PQ)."
    reference = IVFPQIndex.reference
    index = IVFPQIndex

    class Options(RetrievalOptions, IVFPQIndex.Options):
        """Options of the retrieval policy and of the index."""
