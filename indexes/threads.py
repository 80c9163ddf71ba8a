"""Heads on threads: kernels and libraries that release the interpreter's lock, as many at a time as numba is set to.

Not numba's own parallel loops: OpenMP threads that wait by spinning held up single decoding steps by milliseconds where
another process wanted the core, and its pool does not survive a fork.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numba

_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)


def on_threads(work: Callable[..., None], items: int, *arguments: Any) -> None:
    """Run `work(worker, workers, *arguments)` for every worker, at most one for each of the items, and wait for all."""
    workers = max(1, min(int(numba.get_num_threads()), items))
    others = []
    if workers > 1:
        pool = _pools.get(workers) or _pools.setdefault(workers, ThreadPoolExecutor(workers - 1, "kvbench-index"))
        others = [pool.submit(work, worker, workers, *arguments) for worker in range(1, workers)]
    try:
        work(0, workers, *arguments)
    finally:
        for other in others:
            other.result()


def each_head(heads: int, work: Callable[[int], None]) -> None:
    """Run `work(head)` for every head, each with a single-threaded faiss."""

    def run(worker: int, workers: int) -> None:
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            for head in range(worker, heads, workers):
                work(head)
        finally:
            faiss.omp_set_num_threads(before)

    on_threads(run, heads)
