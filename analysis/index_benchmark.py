"""Compares vector indexes on captured queries and keys: recall, scanned keys and time over the search parameter.

Every index is built on keys of the prompt, learns from queries of the prompt, and is searched with decoding queries,
which no index saw. Instead of a capture, a data set in ann-benchmarks' layout serves, as one layer of one head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvbench.analysis.index_parts import Parts
from kvbench.capture.datasets import Dataset
from kvbench.capture.files import Capture, CapturedLayer
from kvbench.contract.errors import KVBenchError
from kvbench.plugins import registry

COLUMNS = (
    "index", "params", "layer", "head", "n_keys", "n_queries", "k", "recall", "scanned", "us_per_query", "us_p50",
    "us_p95", "qps", "build_s", "insert_s", "recall_grown", "unreached", "parallel_efficiency", "bytes",
)  # fmt: skip
INSERTED_AT_ONCE = 16
LADDER = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""Efforts searched by default, in multiples of the search parameter's default."""
Float = NDArray[np.float32]
Progress = Callable[[int, int, str], None]
"""Is told how many indexes of layers are measured, of how many, and what happens now."""
BLOCK_BYTES = 256 * 2**20
"""Of a table of scores in exact search."""


@dataclass(frozen=True)
class IndexBenchmark:
    """What a benchmark of indexes measures.

    `options` and `efforts` are by index name; an index without efforts gets a ladder around its search parameter's
    default. `sinks` first tokens and the prompt's last `window` are left out of the index. The queries are timed in
    `passes` passes, of which each query's fastest counts. `layers` and `heads` None: all that were captured.
    """

    indexes: tuple[str, ...]
    k: int = 100
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    efforts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sinks: int = 4
    window: int = 64
    passes: int = 3

    def document(self) -> dict[str, Any]:
        """The configuration as JSON can hold it, with every index's options complete."""
        found = registry()
        return {
            "indexes": list(self.indexes),
            "k": self.k,
            "layers": None if self.layers is None else list(self.layers),
            "heads": None if self.heads is None else list(self.heads),
            "efforts": {name: list(_efforts(self, name)) for name in self.indexes},
            "options": {
                name: found.options("index", name, self.options.get(name, {})).model_dump(mode="json")
                for name in self.indexes
            },
            "sinks": self.sinks,
            "window": self.window,
            "passes": self.passes,
        }


@dataclass(frozen=True)
class Vectors:
    """One layer's float32 vectors: keys [G, n, d], training and decoding queries [H, m, d] and [H, q, d], new keys.

    `truth` are the ids [H, q, any] of the nearest keys, where the source has them.
    """

    layer: int
    heads: tuple[int, ...]
    keys: Float
    training: Float
    queries: Float
    new_keys: Float
    truth: NDArray[np.int64] | None = None


def exact_top_k(queries: Float, keys: Float, k: int) -> NDArray[np.int64]:
    """Ids [q, k] of the k largest inner products of queries [q, d] with keys [n, d], float32, best first."""
    wide, block = torch.from_numpy(keys).T, max(1, BLOCK_BYTES // (4 * max(len(keys), 1)))
    parts = [(part @ wide).topk(k, dim=1).indices for part in torch.split(torch.from_numpy(queries), block)]
    ids: NDArray[np.int64] = torch.cat(parts).numpy()
    return ids


def recall_at_k(found: NDArray[Any], exact: NDArray[Any]) -> float:
    """Mean share of each row of `exact` [q, k] that is in the same row of `found` [q, any]; ids of −1 are none."""
    hits = [len(np.intersect1d(a[a >= 0], b)) for a, b in zip(found, exact, strict=True)]
    return float(np.mean(hits) / exact.shape[1])


def check_benchmark(source: Capture | Dataset, config: IndexBenchmark) -> None:
    """Raise KVBenchError for indexes, options, layers, heads, k or efforts that the source cannot serve."""
    found = registry()
    if not config.indexes:
        raise KVBenchError("No index was named: give at least one of `kvbench indexes`.")
    for name in config.indexes:
        found.options("index", name, config.options.get(name, {}))
    for what, given in (("Options", config.options), ("Efforts", config.efforts)):
        for name in given:
            if name not in config.indexes:
                raise KVBenchError(
                    f"{what} were given for index '{name}', which is not measured: choose from "
                    f"{', '.join(config.indexes)}."
                )
    if wrong := [effort for efforts in config.efforts.values() for effort in efforts if effort < 1]:
        raise KVBenchError(f"The effort {wrong[0]} is not positive: give whole numbers from 1 on.")
    if isinstance(source, Dataset):
        _check_dataset(source, config)
        return
    manifest = source.manifest
    for number in config.layers or ():
        source.layer(number)
    for head in config.heads or ():
        if not 0 <= head < manifest.heads:
            raise KVBenchError(f"There is no head {head}: the capture's {manifest.heads} query heads start at 0.")
    _groups(config.heads or tuple(range(manifest.heads)), manifest.heads, manifest.kv_heads)
    keys = manifest.prompt_tokens - config.sinks - config.window
    if config.sinks < 0 or config.window < 0 or not 1 <= config.k <= keys:
        raise KVBenchError(
            f"k = {config.k} does not fit the {max(keys, 0)} keys between {config.sinks} sinks and a window of "
            f"{config.window}: choose a smaller k or window, or a longer context."
        )


def _check_dataset(source: Dataset, config: IndexBenchmark) -> None:
    if config.layers is not None or config.heads is not None:
        raise KVBenchError(f"{source.path} has no layers or heads: leave --layers and --heads out.")
    if not 1 <= config.k <= source.keys:
        raise KVBenchError(f"k = {config.k} does not fit the {source.keys} vectors of {source.path}: choose a smaller.")
    if learning := [name for name in config.indexes if registry().find("index", name).uses_queries]:
        source.check_learnt(learning[0])


def run(
    source: Capture | Dataset, config: IndexBenchmark, progress: Progress = lambda *_: None, parts: Parts | None = None
) -> list[dict[str, Any]]:
    """Build, search and insert into every index on every layer; one row for each index, effort, layer and head.

    Rows hold COLUMNS. `recall` is recall@k of the decoding queries against exact search in float32; `scanned` is
    distance evaluations / n_keys. `us_per_query` is on one thread, one decoding step at a time as in decoding: all
    chosen heads' queries of a step in one call, its time divided by the heads, hence the same for a layer's heads; each
    step's fastest pass counts, `qps` is 1e6 over it, and `us_p50` and `us_p95` are percentiles over all steps of all
    passes. `build_s` (on `numba.get_num_threads()` threads), `insert_s` (decoded keys, 16 at a time) and `bytes` are of
    the layer's index for all chosen heads together, as are, at the default effort: `recall_grown`, recall@k of the
    later half of the decoding queries once the earlier half's keys are inserted, over all keys then indexed;
    `parallel_efficiency`, one thread's time for all queries in one call over that of all threads times their number;
    and `unreached`, the share of the prompt's keys that no search finds (0 where the index is no graph of ours). A data
    set has no keys to insert: `insert_s` and `recall_grown` are None. What is measured is kept in `parts`, where given,
    and taken from there by the next call.
    """
    check_benchmark(source, config)
    rows: list[dict[str, Any]] = []
    layers = config.layers or source.layers
    of, done = len(layers) * len(config.indexes), 0
    for number in layers:
        vectors: Vectors | None = None
        exact: list[NDArray[np.int64]] = []
        for place, name in enumerate(config.indexes):
            found = None if parts is None else parts.read(number, place, name)
            if found is None:
                if vectors is None:
                    progress(done, of, f"layer {number}: exact search")
                    vectors = _vectors(source, number, config)
                    exact = _exact(vectors, config.k)
                found = _measure(name, vectors, exact, config, partial(_tell, progress, done, of, number, name))
                if parts is not None:
                    parts.write(number, place, name, found)
                ended = f"built in {found[0]['build_s']:.2f} s"
            else:
                ended = "measured before"
            done += 1
            progress(done, of, f"layer {number}: {name}: {ended}")
            rows += found
    order = {name: place for place, name in enumerate(config.indexes)}
    return sorted(rows, key=lambda row: order[row["index"]])


def _tell(progress: Progress, done: int, of: int, number: int, name: str, now: str) -> None:
    progress(done, of, f"layer {number}: {name}: {now}")


def _vectors(source: Capture | Dataset, number: int, config: IndexBenchmark) -> Vectors:
    if isinstance(source, Capture):
        return load_vectors(source.layer(number), config, source.manifest.heads, source.manifest.kv_heads)
    found = source.read(config.k)
    none = np.zeros((1, 0, found.keys.shape[1]), np.float32)
    return Vectors(
        number, (0,), found.keys[None], none if found.learn is None else found.learn[None], found.queries[None], none,
        None if found.neighbors is None else found.neighbors[None],
    )  # fmt: skip


def _exact(vectors: Vectors, k: int) -> list[NDArray[np.int64]]:
    """The ids [q, k] of the nearest keys of each head's queries."""
    if vectors.truth is not None:
        return [truth[:, :k] for truth in vectors.truth]
    shared = len(vectors.heads) // len(vectors.keys)
    return [
        exact_top_k(vectors.queries[place], vectors.keys[place // shared], k) for place in range(len(vectors.heads))
    ]


def load_vectors(layer: CapturedLayer, config: IndexBenchmark, heads: int, kv_heads: int) -> Vectors:
    """Read the chosen heads of a captured layer as float32."""
    chosen = config.heads or tuple(range(heads))
    groups = _groups(chosen, heads, kv_heads)
    chosen = tuple(sorted(set(chosen)))
    keys = layer.prompt.keys
    stop = keys.shape[1] - config.window
    return Vectors(
        layer.number, chosen, _float32(keys[groups, config.sinks : stop]), _float32(layer.prompt.queries[list(chosen)]),
        _float32(layer.decode.queries[list(chosen)]), _float32(layer.decode.keys[groups]),
    )  # fmt: skip


def _float32(tensor: torch.Tensor) -> Float:
    array: Float = np.ascontiguousarray(tensor.float().numpy())
    return array


def _groups(chosen: Sequence[int], heads: int, kv_heads: int) -> list[int]:
    """The key/value heads of the chosen query heads; each must serve equally many of them, as indexes expect."""
    counts: dict[int, int] = {}
    for head in sorted(set(chosen)):
        group = head // (heads // kv_heads)
        counts[group] = counts.get(group, 0) + 1
    if len(set(counts.values())) > 1:
        spread = heads // kv_heads
        raise KVBenchError(
            f"Heads {', '.join(map(str, sorted(set(chosen))))} take unequal numbers of the query heads that share a "
            f"key/value head ({spread} each, in order): choose equally many of each."
        )
    return list(counts)


def _efforts(config: IndexBenchmark, name: str) -> tuple[int, ...]:
    """The efforts to search an index with, rising; none for an exact one."""
    cls = registry().find("index", name)
    if not cls.search_parameter:
        return ()
    if name in config.efforts:
        return tuple(sorted(set(config.efforts[name])))
    options = registry().options("index", name, config.options.get(name, {}))
    default = int(getattr(options, cls.search_parameter))
    return tuple(sorted({max(1, round(default * factor)) for factor in LADDER}))


def _measure(
    name: str, vectors: Vectors, exact: Sequence[NDArray[np.int64]], config: IndexBenchmark,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    chosen = registry().options("index", name, config.options.get(name, {}))
    progress("compiling")
    warm_up(name, chosen, vectors.keys, vectors.training, config.k)
    index = registry().find("index", name)(chosen)
    progress("building")
    began = time.perf_counter()
    index.build(vectors.keys, vectors.training if index.uses_queries else None, heads=len(vectors.heads))
    build_s = time.perf_counter() - began
    size, n_keys = int(index.nbytes), vectors.keys.shape[1]
    options = index.options.model_dump(mode="json")
    points: list[tuple[dict[str, Any], list[float], NDArray[np.float64], dict[str, float]]] = []
    before: NDArray[np.int64] | None = None
    for effort in _efforts(config, name) or (None,):
        progress("searching" if effort is None else f"searching, effort {effort}")
        with one_thread():
            found = index.search(vectors.queries, config.k, effort=effort)
        if before is not None and np.array_equal(found.evaluations, before):
            continue  # this effort changes nothing: below k, or more lists than there are
        before = found.evaluations
        recalls = [recall_at_k(found.ids[place], exact[place]) for place in range(len(exact))]
        params = options if effort is None else {**options, index.search_parameter: effort}
        points.append((params, recalls, found.evaluations.mean(1) / n_keys, _time(index, vectors, config, effort)))
    unreached = float(np.mean(index.unreached)) if hasattr(index, "unreached") else 0.0
    progress("inserting")
    of_index = {
        "build_s": build_s, "parallel_efficiency": _parallel_efficiency(index, vectors, config),
        "unreached": unreached, "bytes": size, **_grow(index, vectors, config),
    }  # fmt: skip
    rows = [
        {
            "index": name, "params": params, "layer": vectors.layer, "head": head, "n_keys": n_keys,
            "n_queries": vectors.queries.shape[1], "k": config.k, "recall": recalls[place],
            "scanned": float(scanned[place]), **times, **of_index,
        }
        for params, recalls, scanned, times in points
        for place, head in enumerate(vectors.heads)
    ]  # fmt: skip
    return [{column: row[column] for column in COLUMNS} for row in rows]


def _parallel_efficiency(index: Any, vectors: Vectors, config: IndexBenchmark) -> float:
    """One thread's time for all queries over that of all threads times their number, at the default effort."""
    import numba  # noqa: PLC0415 - slow

    def fastest() -> float:
        seconds = []
        for _ in range(config.passes):
            began = time.perf_counter()
            index.search(vectors.queries, config.k)
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    together = fastest()
    with one_thread():
        alone = fastest()
    return alone / (together * int(numba.get_num_threads()))


def _grow(index: Any, vectors: Vectors, config: IndexBenchmark) -> dict[str, float | None]:
    """Insert the decoded keys, half of them before the recall of the other half's queries is taken."""
    if not vectors.new_keys.shape[1]:
        return {"insert_s": None, "recall_grown": None}
    new, seconds, recall_grown = vectors.new_keys, 0.0, 0.0
    half = new.shape[1] // 2
    for start, stop in ((0, half), (half, new.shape[1])):
        if start == half:
            recall_grown = _recall_grown(index, vectors, half, config)
        for first in range(start, stop, INSERTED_AT_ONCE):
            piece = new[:, first : min(first + INSERTED_AT_ONCE, stop)]
            began = time.perf_counter()
            index.insert(piece)
            seconds += time.perf_counter() - began
    return {"insert_s": seconds, "recall_grown": recall_grown}


def _recall_grown(index: Any, vectors: Vectors, inserted: int, config: IndexBenchmark) -> float:
    keys = np.concatenate([vectors.keys, vectors.new_keys[:, :inserted]], axis=1)
    queries = np.ascontiguousarray(vectors.queries[:, inserted:])
    found = index.search(queries, config.k)
    shared = len(queries) // len(keys)
    return float(np.mean([
        recall_at_k(found.ids[place], exact_top_k(queries[place], keys[place // shared], config.k))
        for place in range(len(queries))
    ]))  # fmt: skip


def _time(index: Any, vectors: Vectors, config: IndexBenchmark, effort: int | None) -> dict[str, float]:
    """Microseconds per query on one thread, one step of all heads at a time, and their spread over steps and passes."""
    steps = [np.ascontiguousarray(vectors.queries[:, i : i + 1]) for i in range(vectors.queries.shape[1])]
    seconds = np.empty((config.passes, len(steps)))
    with one_thread():
        for times in seconds:
            for step, queries in enumerate(steps):
                began = time.perf_counter()
                index.search(queries, config.k, effort=effort)
                times[step] = time.perf_counter() - began
    us = 1e6 * seconds / len(vectors.heads)
    mean, (p50, p95) = float(us.min(0).mean()), (float(value) for value in np.percentile(us, [50, 95]))
    return {"us_per_query": mean, "us_p50": p50, "us_p95": p95, "qps": 1e6 / mean}


def warm_up(name: str, options: Any, keys: Float, training: Float, k: int) -> None:
    """Build, search and extend a small index over some of the keys, so that no time includes compilation."""
    small = min(keys.shape[1], max(2 * k, 512))
    index = registry().find("index", name)(options)
    index.build(keys[:, :small].copy(), training[:, -64:].copy() if index.uses_queries else None, heads=len(training))
    index.search(training[:, -1:].copy() if training.shape[1] else keys[:, -1:].copy(), min(k, small))
    index.insert(keys[:, :2].copy())


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch, faiss and numba to one thread."""
    import faiss  # noqa: PLC0415 - slow
    import numba  # noqa: PLC0415 - slow

    before = torch.get_num_threads(), faiss.omp_get_max_threads(), numba.get_num_threads()
    try:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
        numba.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])
        numba.set_num_threads(before[2])
