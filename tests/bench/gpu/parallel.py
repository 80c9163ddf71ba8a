"""Parallel efficiency of `retrieval`'s search on 1 to all cores, beside what the machine's memory allows.

`python tests/bench/gpu/parallel.py --output parallel.json`. Three kinds of work, each on 1 to 16 threads that wait by
spinning as in a step: the searches of a step's 32 heads; inner products with keys at random places, a search's reading
without the rest of it; and with all keys in order. Efficiency is the rate over that of one thread times the threads.
Where keys at random places scale no better than searches, memory forbids more. Keys and queries are random, in
Llama-3-8B's shape.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from kvbench.indexes import RoarGraph
from kvbench.indexes.compiled import inner, kernel, prefetch_row
from kvbench.indexes.threads import assemble, dismiss, on_threads


@kernel
def read_rows(part: int, parts: int, rows: Any, order: Any, query: Any, out: Any) -> None:
    """Inner products of the query [d] with the rows of this part's share of `order`, each asked for 16 rows before."""
    first, last = part * len(order) // parts, (part + 1) * len(order) // parts
    total = np.float32(0)
    for i in range(first, last):
        prefetch_row(rows, order[min(i + 16, last - 1)])
        total += inner(rows, order[i], query)
    out[part] = total


def rate(work: Callable[[], Any], rounds: int) -> float:
    """Calls per second: the median of `rounds`."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return 1 / float(np.median(seconds))


def main() -> None:
    """Build, measure on rising numbers of threads, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("-k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, dim, heads, groups = arguments.tokens, arguments.dim, arguments.heads, arguments.groups
    keys = torch.randn(groups, n, dim, dtype=torch.bfloat16, device=device)
    queries = torch.randn(heads, 4096, dim, dtype=torch.bfloat16, device=device)
    index, host = RoarGraph(), keys.cpu()
    began = time.perf_counter()
    index.build_beside(host, keys, queries, heads=heads)
    print(f"{n} keys a head, built in {time.perf_counter() - began:.1f} s, k = {arguments.k}", flush=True)
    asked = np.random.default_rng(0).standard_normal((heads, 1, dim)).astype(np.float32)
    rows = index.keys.rows
    places = np.random.default_rng(1).integers(0, len(rows), 400_000)
    in_order, out = np.arange(len(rows)), np.zeros(4096, np.float32)
    query, parts = asked[0, 0].copy(), 256

    def reading(order: Any) -> Callable[[], Any]:
        return lambda: on_threads(read_rows, parts, rows, order, query, out)

    work: dict[str, tuple[Callable[[], Any], float]] = {
        "searches": (lambda: index.search(asked, arguments.k), heads),
        "keys at random, GB/s": (reading(places), len(places) * dim * 2e-9),
        "keys in order, GB/s": (reading(in_order), rows.nbytes * 1e-9),
    }  # fmt: skip
    whole = int(numba.config.NUMBA_NUM_THREADS)
    found: dict[str, Any] = {"tokens": n, "k": arguments.k, "threads": {}}
    numba.set_num_threads(1)
    for call, _ in work.values():
        call()
    for threads in [t for t in (1, 2, 4, 8, 12, 16) if t <= whole]:
        numba.set_num_threads(threads)
        assemble()
        row = {}
        for name, (call, amount) in work.items():
            call()
            row[name] = amount * rate(call, arguments.rounds)
        dismiss()
        found["threads"][threads] = row
        one = found["threads"][1]
        told = ", ".join(f"{name} {value:.4g} ({value / one[name] / threads:.0%})" for name, value in row.items())
        print(f"{threads:2} threads: {told}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
