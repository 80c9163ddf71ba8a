"""Heads on threads: kernels and libraries that release the interpreter's lock, as many at a time as numba is set to.

Not numba's own parallel loops: OpenMP threads that wait by spinning held up single decoding steps by milliseconds where
another process wanted the core, and its pool does not survive a fork. Where cores are to spare (steps of a GPU that
wait for a search) `assemble` keeps threads spinning for as long as a step takes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import faiss
import numba
import torch
from numba.core.dispatcher import Dispatcher

from kvbench.indexes.crew import Crew

Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}
_crews: dict[int, Crew] = {}
os.register_at_fork(after_in_child=_pools.clear)
os.register_at_fork(after_in_child=_crews.clear)


PARTS = 4
"""Parts that a thread's share of the work is cut into, so that a slow core does fewer of them."""


def on_threads(work: Callable[..., None], items: int, *arguments: Any, least: int = 1) -> None:
    """Run `work(part, parts, *arguments)` for every part of the items; a thread that is free takes the next one.

    Parts have at least `least` items: waking a thread costs some 50 microseconds.
    """
    workers = max(1, min(int(numba.get_num_threads()), items // least))
    if workers == 1:
        work(0, 1, *arguments)
        return
    crew = _crews.get(0)
    handed = crew is not None and crew.assembled and isinstance(work, Dispatcher)
    if handed and crew is not None and crew.run(work, min(items, 2 * PARTS * (crew.threads + 1)), arguments):
        return
    parts = min(items // least, PARTS * workers)
    turns = itertools.count()

    def take() -> None:
        while (part := next(turns)) < parts:
            work(part, parts, *arguments)

    pool = _pools.get(workers) or _pools.setdefault(workers, ThreadPoolExecutor(workers - 1, "kvbench-index"))
    others = [pool.submit(take) for _ in range(workers - 1)]
    try:
        take()
    finally:
        for other in others:
            other.result()


def assemble() -> None:
    """Keep threads at hand, which wait by spinning, for compiled kernels until `dismiss`."""
    threads = int(numba.get_num_threads()) - 1
    if threads < 1:
        return
    crew = _crews.get(0)
    if crew is None or crew.threads != threads:
        crew = _crews[0] = Crew(threads)
    crew.assemble()


def dismiss() -> None:
    """Let the threads of `assemble` sleep soon."""
    crew = _crews.get(0)
    if crew is not None:
        crew.dismiss()


def beside(work: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Run `work(*arguments)` on a thread of its own, after what was handed to it before."""
    pool = _pools.get(0) or _pools.setdefault(0, ThreadPoolExecutor(1, "kvbench-search"))
    return pool.submit(work, *arguments)


def each_head(heads: int, work: Callable[[int], None]) -> None:
    """Run `work(head)` for every head, each with a single-threaded faiss and torch."""
    theirs = torch.get_num_threads()

    def run(part: int, parts: int) -> None:
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        torch.set_num_threads(1)
        try:
            for head in range(part, heads, parts):
                work(head)
        finally:
            faiss.omp_set_num_threads(before)
            torch.set_num_threads(theirs)

    on_threads(run, heads)
