"""Exact attention without a cache: every token costs a pass over the whole context."""

from kvbench.contract.policy import KVCachePolicy


class FullNoCache(KVCachePolicy):
    """Computes the whole context anew for every token, the slowest and an unfair baseline: no system serves like this.

    RetrievalAttention's latency table calls it Full, so published speed-ups over it are over this, not over `full`.
    """

    name = "full_no_cache"
    summary = "Exact attention that keeps no cache and computes the whole context anew for every token."
    reference = (
        "The baseline 'Full' in the latency table of Liu et al., RetrievalAttention: Accelerating Long-Context LLM "
        "Inference via Vector Retrieval, arXiv 2409.10516"
    )
    exact = True
    takes_budget = False
    cached = False
    query_window = 0
