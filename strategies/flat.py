"""Exact top-k over offloaded keys: what any index can reach at best."""

from kvbench.indexes.flat import Flat as FlatIndex
from kvbench.strategies.index_retrieval import IndexRetrieval, RetrievalOptions


class Flat(IndexRetrieval):
    """Attends to the exact top-k keys by inner product, scanning all of them at each step."""

    name = "flat"
    summary = "Exact top-k over offloaded keys, by a full scan at each step."
    reference = FlatIndex.reference
    index = FlatIndex

    class Options(RetrievalOptions):
        """Options of the retrieval policy; the index has none."""
