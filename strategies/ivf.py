"""Inverted lists over offloaded keys: the baseline that clusters keys alone."""

from kvbench.indexes import ivf
from kvbench.strategies.index_retrieval import IndexRetrieval, RetrievalOptions


class IVF(IndexRetrieval):
    """Attends to the best keys of the inverted lists whose centroids are nearest to each head's query."""

    name = "ivf"
    summary = "Top-k over offloaded keys by the inverted lists of a k-means (IVF)."
    reference = ivf.IVF.reference
    index = ivf.IVF

    class Options(RetrievalOptions, ivf.IVF.Options):
        """Options of the retrieval policy and of the index."""
