"""One thread pool's worth of heads at a time, for libraries that release the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import faiss
import numba


def each_head(heads: int, work: Callable[[int], None]) -> None:
    """Run `work(head)` for every head on as many threads as numba is set to use, each with a single-threaded faiss."""
    threads = min(numba.get_num_threads(), heads)

    def run(first: int) -> None:
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            for head in range(first, heads, threads):
                work(head)
        finally:
            faiss.omp_set_num_threads(before)

    if threads == 1:
        run(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))
