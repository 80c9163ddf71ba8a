"""Exact attention over a cache that keeps everything: the baseline."""

from kvbench.contract.policy import KVCachePolicy


class Full(KVCachePolicy):
    """Keeps and attends to every token, through the model's own attention."""

    name = "full"
    summary = "Exact attention over the whole cache: the baseline of every table."
    exact = True
    takes_budget = False
    query_window = 0
