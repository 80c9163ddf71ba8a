"""The least effort of a search that reaches a target recall on queries that the index has not seen."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvbench.indexes.base import Index

STEP = 1.25
"""Neighbouring efforts that are tried differ by this factor."""


def recall_at(index: Index, queries: NDArray[np.float32], best: NDArray[np.int64], k: int, effort: int) -> float:
    """Share of the `best` ids [H, q, b], b at most k, that a search for k keys finds, over all heads and queries."""
    found = index.search(queries, k, effort=effort).ids
    hits = [len(np.intersect1d(mine, theirs, assume_unique=True)) for mine, theirs in zip(
        found.reshape(-1, found.shape[2]), best.reshape(-1, best.shape[2]), strict=True)]  # fmt: skip
    return sum(hits) / best.size


def least_effort(
    index: Index, queries: NDArray[np.float32], best: NDArray[np.int64], k: int, recall: float
) -> int | None:
    """The least effort, up to a quarter, whose searches of `queries` [H, q, d] for k keys reach the mean `recall`.

    `best` [H, q, b] are the exact answers. Where no effort reaches it, one for all keys; None for exact indexes.
    """
    if not index.search_parameter:
        return None
    last = math.ceil(math.log(max(index.keys.n, 2), STEP))
    known: dict[int, bool] = {last: True}

    def reached(power: int) -> bool:
        if power not in known:
            known[power] = recall_at(index, queries, best, k, effort_of(power)) >= recall
        return known[power]

    start = int(getattr(index.options, index.search_parameter))
    low = high = min(round(math.log(start, STEP)), last)
    stride = 1
    if reached(high):
        while low > 0 and reached(low):
            high, low, stride = low, max(low - stride, 0), 2 * stride
        if low == 0 and reached(0):
            return effort_of(0)
    else:
        while not reached(high):
            low, high, stride = high, min(high + stride, last), 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return effort_of(high)


def effort_of(power: int) -> int:
    """The effort of a power of `STEP`."""
    return round(STEP**power)
