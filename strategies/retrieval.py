"""RetrievalAttention (arXiv 2409.10516): an attention-aware graph over offloaded keys."""

from kvbench.indexes.roargraph import RoarGraph
from kvbench.strategies.index_retrieval import IndexRetrieval, RetrievalOptions


class Retrieval(IndexRetrieval):
    """Attends to the keys that a graph built from the prompt's queries finds, one graph per query head."""

    name = "retrieval"
    summary = "RetrievalAttention: top-k over offloaded keys by a graph built from the prompt's queries."
    reference = (
        "Liu et al., RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval, arXiv 2409.10516"
    )
    index = RoarGraph

    class Options(RetrievalOptions, RoarGraph.Options):
        """Options of the retrieval policy and of the index."""
