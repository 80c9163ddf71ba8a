"""What an index benchmark found: curves of recall, the summary, the document and its figure."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvbench import figures, spreadsheet
from kvbench.analysis.index_benchmark import COLUMNS, IndexBenchmark
from kvbench.analysis.index_parts import environment
from kvbench.capture.datasets import Dataset
from kvbench.capture.files import Capture
from kvbench.contract.errors import KVBenchError, unwritable
from kvbench.plugins import registry

SCHEMA = 1
"""Version of `index.json` and of the `--json` document."""
TARGET = 0.95


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
    us_p50: float | None = None
    us_p95: float | None = None

    @property
    def qps(self) -> float:
        """Queries per second on one thread."""
        return 1e6 / self.us_per_query


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
                _mean(part, "us_p50"), _mean(part, "us_p95"),
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
    """Per index: curve, scanned fraction, µs and queries per second at recall 0.95, build and insertion, and bytes.

    What is of a whole index (from `build_s` on) is a mean over layers, for all chosen heads together.
    """
    result = []
    for name, points in curves(rows).items():
        layers = list({row["layer"]: row for row in rows if row["index"] == name}.values())
        us = at_recall(points, "us_per_query")
        inserted = layers[0]["insert_s"] is not None
        result.append({
            "index": name,
            "scanned_at_recall_95": at_recall(points, "scanned"),
            "us_per_query_at_recall_95": us,
            "qps_at_recall_95": None if us is None else 1e6 / us,
            "first_point_above": bool(points) and points[0].recall >= TARGET,
            "build_s": _mean(layers, "build_s"),
            "insert_s": _mean(layers, "insert_s") if inserted else None,
            "recall_grown": _mean(layers, "recall_grown") if inserted else None,
            "unreached": _mean(layers, "unreached"),
            "parallel_efficiency": _mean(layers, "parallel_efficiency"),
            "bytes": _mean(layers, "bytes"),
            "curve": [{**vars(point), "qps": point.qps} for point in points],
        })  # fmt: skip
    return result


def document(source: Capture | Dataset, config: IndexBenchmark, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The benchmark as one JSON document: capture or data set, configuration, environment, rows and summary."""
    of = isinstance(source, Capture)
    return {
        "schema": SCHEMA,
        "capture": source.manifest.config.model_dump(mode="json") if isinstance(source, Capture) else None,
        **({} if of else {"dataset": source.document()}),  # type: ignore[union-attr]
        "config": config.document(),
        "environment": environment(),
        "rows": [{name: row[name] for name in COLUMNS} for row in rows],
        "summary": summary(rows),
    }


def title(content: Mapping[str, Any]) -> str:
    """What a document's vectors are, in words."""
    capture = content["capture"]
    if capture is None:
        return f"{content['dataset']['name']}, {content['dataset']['keys']} vectors"
    return f"{capture['model']}, {capture['context_length']} tokens"


def folder_name(source: Capture | Dataset, config: IndexBenchmark) -> str:
    """Name of the results folder, from the hash of the source and the configuration."""
    of: Any = source.manifest.config.hash if isinstance(source, Capture) else source.document()
    canonical = json.dumps([SCHEMA, of, config.document()], sort_keys=True)
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
        rows = content["rows"]
        layers, heads = ({row[name] for row in rows} for name in ("layer", "head"))
        keys, queries = rows[0]["n_keys"], rows[0]["n_queries"]
        figure.suptitle(
            f"{title(content)}: {keys} keys, {queries} queries, {len(layers)} layers × {len(heads)} heads",
            fontsize=11,
        )
