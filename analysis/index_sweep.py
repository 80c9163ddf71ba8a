"""Compares vector indexes on captured queries and keys: recall, scanned keys and time over the search parameter.

Every index is built on keys of the prompt, learns from queries of the prompt, and is searched with decoding queries,
which no index saw.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvbench import figures, spreadsheet
from kvbench.capture.files import Capture, CapturedLayer
from kvbench.contract.errors import KVBenchError, unwritable
from kvbench.plugins import registry

SCHEMA = 1
"""Version of `index.json` and of the `--json` document."""

COLUMNS = (
    "index", "params", "layer", "head", "n_keys", "n_queries", "k", "recall", "scanned", "us_per_query", "build_s",
    "insert_s", "recall_grown", "unreached", "parallel_efficiency", "bytes",
)  # fmt: skip
TARGET = 0.95
INSERTED_AT_ONCE = 16
LADDER = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""Efforts searched by default, in multiples of the search parameter's default."""

Float = NDArray[np.float32]


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep measures.

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
    """One layer's float32 vectors: keys [G, n, d], training and decoding queries [H, m, d] and [H, q, d], new keys."""

    layer: int
    heads: tuple[int, ...]
    keys: Float
    training: Float
    queries: Float
    new_keys: Float


def exact_top_k(queries: Float, keys: Float, k: int) -> NDArray[np.int64]:
    """Ids [q, k] of the k largest inner products of queries [q, d] with keys [n, d], float32, best first."""
    scores = torch.from_numpy(queries) @ torch.from_numpy(keys).T
    ids: NDArray[np.int64] = scores.topk(k, dim=1).indices.numpy()
    return ids


def recall_at_k(found: NDArray[Any], exact: NDArray[Any]) -> float:
    """Mean share of each row of `exact` [q, k] that is in the same row of `found` [q, any]; ids of −1 are none."""
    hits = [len(np.intersect1d(a[a >= 0], b)) for a, b in zip(found, exact, strict=True)]
    return float(np.mean(hits) / exact.shape[1])


def check_sweep(capture: Capture, config: SweepConfig) -> None:
    """Raise KVBenchError for indexes, options, layers, heads, k or efforts that the capture cannot serve."""
    found, manifest = registry(), capture.manifest
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
    for number in config.layers or ():
        capture.layer(number)
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


def sweep(
    capture: Capture, config: SweepConfig, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Build, search and insert into every index on every layer; one row for each index, effort, layer and head.

    Rows hold COLUMNS. `recall` is recall@k of the decoding queries against exact search in float32; `scanned` is
    distance evaluations / n_keys. `us_per_query` is on one thread, one decoding step at a time as in decoding: all
    chosen heads' queries of a step in one call, its time divided by the heads, hence the same for a layer's heads.
    `build_s` (on `numba.get_num_threads()` threads), `insert_s` (the decoded keys, 16 at a time) and `bytes` are of the
    layer's index for all chosen heads together, as are, at the default effort: `recall_grown`, recall@k of the later
    half of the decoding queries once the earlier half's keys are inserted, over all keys then indexed;
    `parallel_efficiency`, one thread's time for all queries in one call over that of all threads times their number;
    and `unreached`, the share of the prompt's keys that no search finds (0 where the index is no graph of ours).
    """
    check_sweep(capture, config)
    rows: list[dict[str, Any]] = []
    for number in config.layers or capture.layers:
        vectors = load_vectors(capture.layer(number), config, capture.manifest.heads, capture.manifest.kv_heads)
        shared = len(vectors.heads) // len(vectors.keys)
        exact = [
            exact_top_k(vectors.queries[place], vectors.keys[place // shared], config.k)
            for place in range(len(vectors.heads))
        ]
        for name in config.indexes:
            progress(f"layer {number}: {name}")
            rows += _measure(name, vectors, exact, config)
    order = {name: place for place, name in enumerate(config.indexes)}
    return sorted(rows, key=lambda row: order[row["index"]])


def load_vectors(layer: CapturedLayer, config: SweepConfig, heads: int, kv_heads: int) -> Vectors:
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


def _efforts(config: SweepConfig, name: str) -> tuple[int, ...]:
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
    name: str, vectors: Vectors, exact: Sequence[NDArray[np.int64]], config: SweepConfig
) -> list[dict[str, Any]]:
    chosen = registry().options("index", name, config.options.get(name, {}))
    warm_up(name, chosen, vectors.keys, vectors.training, config.k)
    index = registry().find("index", name)(chosen)
    began = time.perf_counter()
    index.build(vectors.keys, vectors.training if index.uses_queries else None, heads=len(vectors.heads))
    build_s = time.perf_counter() - began
    size, n_keys = int(index.nbytes), vectors.keys.shape[1]
    options = index.options.model_dump(mode="json")
    points: list[tuple[dict[str, Any], list[float], NDArray[np.float64], float]] = []
    before: NDArray[np.int64] | None = None
    for effort in _efforts(config, name) or (None,):
        with one_thread():
            found = index.search(vectors.queries, config.k, effort=effort)
        if before is not None and np.array_equal(found.evaluations, before):
            continue  # this effort changes nothing: below k, or more lists than there are
        before = found.evaluations
        recalls = [recall_at_k(found.ids[place], exact[place]) for place in range(len(exact))]
        params = options if effort is None else {**options, index.search_parameter: effort}
        points.append((params, recalls, found.evaluations.mean(1) / n_keys, _time(index, vectors, config, effort)))
    unreached = float(np.mean(index.unreached)) if hasattr(index, "unreached") else 0.0
    of_index = {
        "build_s": build_s, "parallel_efficiency": _parallel_efficiency(index, vectors, config),
        "unreached": unreached, "bytes": size, **_grow(index, vectors, config),
    }  # fmt: skip
    rows = [
        {
            "index": name, "params": params, "layer": vectors.layer, "head": head, "n_keys": n_keys,
            "n_queries": vectors.queries.shape[1], "k": config.k, "recall": recalls[place],
            "scanned": float(scanned[place]), "us_per_query": 1e6 * seconds, **of_index,
        }
        for params, recalls, scanned, seconds in points
        for place, head in enumerate(vectors.heads)
    ]  # fmt: skip
    return [{column: row[column] for column in COLUMNS} for row in rows]


def _parallel_efficiency(index: Any, vectors: Vectors, config: SweepConfig) -> float:
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


def _grow(index: Any, vectors: Vectors, config: SweepConfig) -> dict[str, float]:
    """Insert the decoded keys, half of them before the recall of the other half's queries is taken."""
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


def _recall_grown(index: Any, vectors: Vectors, inserted: int, config: SweepConfig) -> float:
    keys = np.concatenate([vectors.keys, vectors.new_keys[:, :inserted]], axis=1)
    queries = np.ascontiguousarray(vectors.queries[:, inserted:])
    found = index.search(queries, config.k)
    shared = len(queries) // len(keys)
    return float(np.mean([
        recall_at_k(found.ids[place], exact_top_k(queries[place], keys[place // shared], config.k))
        for place in range(len(queries))
    ]))  # fmt: skip


def _time(index: Any, vectors: Vectors, config: SweepConfig, effort: int | None) -> float:
    """Seconds per query on one thread, one step of all heads at a time; each step's fastest pass counts."""
    steps = [np.ascontiguousarray(vectors.queries[:, i : i + 1]) for i in range(vectors.queries.shape[1])]
    seconds = np.empty((config.passes, len(steps)))
    with one_thread():
        for times in seconds:
            for step, queries in enumerate(steps):
                began = time.perf_counter()
                index.search(queries, config.k, effort=effort)
                times[step] = time.perf_counter() - began
    return float(seconds.min(0).mean() / len(vectors.heads))


def warm_up(name: str, options: Any, keys: Float, training: Float, k: int) -> None:
    """Build, search and extend a small index over some of the keys, so that no time includes compilation."""
    small = min(keys.shape[1], max(2 * k, 512))
    index = registry().find("index", name)(options)
    index.build(keys[:, :small].copy(), training[:, -64:].copy() if index.uses_queries else None, heads=len(training))
    index.search(training[:, -1:].copy(), min(k, small))
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


@dataclass(frozen=True)
class Point:
    """One index at one effort, averaged over layers and heads, with 95% intervals of the means over those means."""

    index: str
    effort: int | None
    recall: float
    recall_ci95: tuple[float, float] | None
    scanned: float
    scanned_ci95: tuple[float, float] | None
    us_per_query: float
    us_per_query_ci95: tuple[float, float] | None


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Average the rows of each index and effort over layers and heads; points by rising effort.

    Intervals: bias-corrected and accelerated bootstrap (Efron 1987, scipy) over the layer and head means, over layers
    for the time; None for fewer than two. Only efforts that every layer has are averaged.
    """
    points: dict[str, list[Point]] = {}
    for name in dict.fromkeys(row["index"] for row in rows):
        parameter = registry().find("index", name).search_parameter
        mine = [row for row in rows if row["index"] == name]
        layers = {row["layer"] for row in mine}
        efforts: dict[int | None, list[Mapping[str, Any]]] = {}
        for row in mine:
            efforts.setdefault(row["params"][parameter] if parameter else None, []).append(row)
        points[name] = [
            Point(
                name, effort, _mean(part, "recall"), _interval([row["recall"] for row in part]),
                _mean(part, "scanned"), _interval([row["scanned"] for row in part]), _mean(part, "us_per_query"),
                _interval(list({row["layer"]: row["us_per_query"] for row in part}.values())),
            )
            for effort, part in sorted(efforts.items(), key=lambda item: item[0] or 0)
            if {row["layer"] for row in part} == layers
        ]  # fmt: skip
    return points


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    from scipy import stats  # noqa: PLC0415 - slow

    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap((values,), np.mean, n_resamples=2000, rng=np.random.default_rng(0), method="BCa")
    low, high = found.confidence_interval
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None


def at_recall(points: Sequence[Point], attribute: str, target: float = TARGET) -> float | None:
    """The lowest `attribute` (`scanned` or `us_per_query`) at which a curve reaches the recall; None: not reached.

    Linear between the two measured points on either side; where the first point is above the target already, its value.
    """
    for place, point in enumerate(points):
        if point.recall >= target:
            here = float(getattr(point, attribute))
            if place == 0:
                return here
            before = points[place - 1]
            share = (target - before.recall) / (point.recall - before.recall)
            start = float(getattr(before, attribute))
            return start + share * (here - start)
    return None


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per index: curve, scanned fraction and µs per query at recall 0.95, build and insertion seconds, and bytes.

    What is of a whole index (from `build_s` on) is a mean over layers, for all chosen heads together.
    """
    result = []
    for name, points in curves(rows).items():
        layers = {row["layer"]: row for row in rows if row["index"] == name}.values()
        result.append({
            "index": name,
            "scanned_at_recall_95": at_recall(points, "scanned"),
            "us_per_query_at_recall_95": at_recall(points, "us_per_query"),
            "first_point_above": bool(points) and points[0].recall >= TARGET,
            "build_s": _mean(list(layers), "build_s"),
            "insert_s": _mean(list(layers), "insert_s"),
            "recall_grown": _mean(list(layers), "recall_grown"),
            "unreached": _mean(list(layers), "unreached"),
            "parallel_efficiency": _mean(list(layers), "parallel_efficiency"),
            "bytes": _mean(list(layers), "bytes"),
            "curve": [vars(point) for point in points],
        })  # fmt: skip
    return result


def document(capture: Capture, config: SweepConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sweep as one JSON document: capture, configuration, environment, rows and summary."""
    import numba  # noqa: PLC0415 - slow

    return {
        "schema": SCHEMA,
        "capture": capture.manifest.config.model_dump(mode="json"),
        "config": config.document(),
        "environment": {
            "python": platform.python_version(),
            "packages": {name: version(name) for name in ("kvbench", "faiss-cpu", "numba", "numpy", "torch")},
            "build_threads": numba.get_num_threads(),
            "search_threads": 1,
        },
        "rows": [{name: row[name] for name in COLUMNS} for row in rows],
        "summary": summary(rows),
    }


def folder_name(capture: Capture, config: SweepConfig) -> str:
    """Name of the results folder, from the hash of capture and configuration."""
    canonical = json.dumps([SCHEMA, capture.manifest.config.hash, config.document()], sort_keys=True)
    return f"index-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"


def write(content: Mapping[str, Any], folder: Path) -> None:
    """Write `index.json`, `rows.csv`, `curves.csv` and the figure `curves.svg` and `.png` into the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
            rows = [{**row, "params": json.dumps(row["params"], sort_keys=True)} for row in content["rows"]]
            spreadsheet.write_table(file, rows, COLUMNS)
        points = [point for entry in content["summary"] for point in entry["curve"]]
        with (folder / "curves.csv").open("w", encoding="utf-8", newline="") as file:
            names = [name for name in points[0] if not name.endswith("_ci95")]
            ends = [f"{name}_{end}" for name in ("recall", "scanned", "us_per_query") for end in ("low", "high")]
            lines = []
            for point in points:
                bounds = [bound for name in ("recall", "scanned", "us_per_query")
                          for bound in point[f"{name}_ci95"] or ("", "")]  # fmt: skip
                lines.append([*("" if point[name] is None else point[name] for name in names), *bounds])
            spreadsheet.write_rows(file, lines, [*names, *ends])
        draw(content, folder)
        (folder / "index.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    except OSError as error:
        raise KVBenchError(unwritable(folder, error)) from None


def draw(content: Mapping[str, Any], folder: Path) -> None:
    """Draw recall against scanned fraction and against time per query, with 95% intervals, as SVG and PNG."""
    with figures.drawing(folder, "curves", (10, 4.6)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for place, entry in enumerate(content["summary"]):
            color, marker, dashes, _ = figures.style(place)
            recall = [point["recall"] for point in entry["curve"]]
            spread = [point["recall_ci95"] or (point["recall"],) * 2 for point in entry["curve"]]
            above = [max(high - mean, 0) for (_, high), mean in zip(spread, recall, strict=True)]
            below = [max(mean - low, 0) for (low, _), mean in zip(spread, recall, strict=True)]
            for axis, name, unit in ((left, "scanned", 100), (right, "us_per_query", 1)):
                axis.errorbar(
                    [unit * point[name] for point in entry["curve"]], recall, yerr=(below, above), color=color,
                    marker=marker, linestyle=dashes, markersize=6, markeredgecolor="white", markeredgewidth=0.6,
                    elinewidth=0.9, label=entry["index"],
                )  # fmt: skip
        labels = {left: "keys scanned (% of indexed keys, log)", right: "time per query (µs, one thread, log)"}
        for axis, label in labels.items():
            figures.logarithmic(axis)
            axis.set_xlabel(label)
            axis.axhline(TARGET, color=figures.REFERENCE, linewidth=0.9, linestyle=(0, (1, 1)))
        k = content["config"]["k"]
        left.set_ylabel(f"recall@{k} (mean, 95% interval)")
        left.set_ylim(max(0, left.get_ylim()[0]), 1.02)
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center")
        source, rows = content["capture"], content["rows"]
        layers, heads = ({row[name] for row in rows} for name in ("layer", "head"))
        keys, queries = rows[0]["n_keys"], rows[0]["n_queries"]
        figure.suptitle(
            f"{source['model']}, {source['context_length']} tokens: {keys} keys, {queries} decoding queries, "
            f"{len(layers)} layers × {len(heads)} heads",
            fontsize=11,
        )
