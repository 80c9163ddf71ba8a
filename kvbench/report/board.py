"""The report's leaderboard: its columns, its cells, and its numbers for the CSV."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbench.compare.wording import budget_text
from kvbench.report.charts import MIB, Row, model_text, percent, setting_text
from kvbench.report.collect import BASELINE, Collection, ReportRun, labels
from kvbench.report.words import ALPHA, anchor_of, mark_texts, points, unmarked
from kvbench.runs.timing import mode_text

_MAIN = ("bytes.resident", "tpot_s.p50", "ttft_s.total", "recall_at_k")
"""Metrics among the columns that decide."""


@dataclass(frozen=True)
class Cell:
    """One cell of the leaderboard: what is shown, what it is sorted by, a second line, and `better` or `worse`."""

    text: str
    value: float | str = ""
    detail: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """One column of the leaderboard; `first` is the order of its first sorting."""

    key: str
    title: str
    help: str
    cell: Callable[[ReportRun], Cell]
    kind: str = "number"
    first: str = "descending"
    main: bool = True
    """Whether it decides, and is shown before the reader asks for all columns."""


@dataclass
class Board:
    """The leaderboard: columns, rows, caption; `groups` names the settings, by the number that each row has."""

    columns: list[Column]
    rows: list[dict[str, Any]]
    caption: str
    csv: str = ""
    groups: list[str] = field(default_factory=list)


def leaderboard(found: Collection) -> Board:
    """The leaderboard of all runs."""
    names: dict[int, str] = {}
    settings = found.settings()
    for runs in settings.values():
        names |= labels(runs, apart=("seed", "budget", "examples"))
    columns = _columns(found, names)
    places = {id(run): anchor_of(place) for place, run in enumerate(found.runs)}
    rows = [
        {"cells": [column.cell(run) for column in columns], "anchor": places[id(run)], "marks": mark_texts(run),
         "baseline": run.policy == BASELINE, "group": group}
        for group, runs in enumerate(settings.values())
        for run in sorted(runs, key=lambda run: (-run.accuracy, run.total_bytes))
    ]  # fmt: skip
    caption = (
        f"One row for each run, ranked within its task and length. Differences are from {BASELINE} on the same "
        "examples, with 95% intervals; p-values are adjusted for all comparisons of the table (Holm)."
    )
    return Board(columns, rows, caption, groups=[setting_text(setting, found) for setting in settings])


def _number(value: float | None, text: str, **more: str) -> Cell:
    return Cell("–") if value is None else Cell(text, value, **more)


def _columns(found: Collection, names: Mapping[int, str]) -> list[Column]:
    def config(key: str, title: str, help_text: str, kind: str = "text") -> Column:
        show = lambda run: Cell(str(run.config[key]), run.config[key])  # noqa: E731
        return Column(key, title, help_text, show, kind, "ascending", main=False)

    def metric(key: str, title: str, help_text: str, show: Callable[[float], str], first: str) -> Column:
        def cell(run: ReportRun) -> Cell:
            value: Any = run.metrics
            for part in key.split("."):
                value = None if value is None else value.get(part)
            return Cell("–") if value is None else Cell(show(value), value)

        return Column(key, title, help_text, cell, "number", first, key in _MAIN)

    def several(key: str) -> bool:
        return len({run.config[key] for run in found.runs}) > 1

    def mib(value: float) -> str:
        return f"{value / MIB:.1f}" if value >= 10 * MIB or not value else f"{value / MIB:#.3g}"

    columns = [Column("policy", "Policy", "Policy and what tells it from others of its name",
                      lambda run: Cell(unmarked(names[id(run)], run), names[id(run)]), "text",
                      "ascending")]  # fmt: skip
    columns.append(Column(
        "budget", "Budget", "Size and allocator asked for",
        lambda run: Cell(budget_text(run.config["budget"]), budget_text(run.config["budget"])), "text", "ascending",
    ))  # fmt: skip
    if several("model"):
        columns.append(Column("model", "Model", "Model", lambda run: Cell(
            model_text(run.config["model"]), run.config["model"]), "text", "ascending", main=False))  # fmt: skip
    if several("task"):
        columns.append(config("task", "Task", "Task"))
    if several("context_length"):
        columns.append(config("context_length", "Context, tokens", "Context length asked for", "number"))
    if several("question"):
        columns.append(config("question", "Question", "Whether the policy sees the question in the prompt"))
    if several("seed"):
        columns.append(config("seed", "Seed", "Seed of the examples", "number"))
    columns += [
        Column("accuracy", "Accuracy", "Mean score, with its 95% interval and the examples", _accuracy),
        Column("difference", f"Difference from {BASELINE}, points", "On the same examples, with its 95% interval",
               _difference),
        Column("p", "p (Holm)", "Adjusted p-value of the paired difference", lambda run: _number(
            run.p_adjusted, "" if run.p_adjusted is None else "< 0.001" if run.p_adjusted < 0.001
            else f"{run.p_adjusted:.3f}"), first="ascending"),
        Column("total_bytes", "Bytes, MiB", "All tiers and index", lambda run: Cell(
            mib(run.total_bytes), run.total_bytes), first="ascending"),
        metric("bytes.resident", "On device, MiB", "Bytes on the model's device", mib, "ascending"),
        metric("tpot_s.p50", "TPOT p50, ms", "Median time per output token", lambda v: f"{1000 * v:.1f}", "ascending"),
        metric("ttft_s.total", "TTFT, s", "Time to first token: prefill and index construction", "{:.2f}".format,
               "ascending"),
        metric("recall_at_k", "Recall@k", "Share of the exact top k attended", percent, "descending"),
        metric("recovered_mass", "Recovered mass", "Exact attention's weight on the attended tokens", percent,
               "descending"),
        metric("scanned_fraction", "Keys scanned", "Distance evaluations over indexed keys", percent, "ascending"),
        metric("density", "Density", "Attended tokens over context tokens", percent, "ascending"),
        metric("bytes.offloaded", "Offloaded, MiB", "Bytes in the host's memory", mib, "ascending"),
        metric("bytes.index", "Index, MiB", "Bytes of the policy's structures", mib, "ascending"),
        metric("ttft_s.index", "Index construction, s", "The part of TTFT in the policy", "{:.2f}".format, "ascending"),
        metric("tpot_s.p95", "TPOT p95, ms", "95th percentile", lambda v: f"{1000 * v:.1f}", "ascending"),
        Column("mode", "Steps", "How they ran: one CUDA graph (graph), the same code uncaptured (fixed), hook by hook "
               "(eager), and why not captured",
               lambda run: Cell(run.metrics.get("mode") or "–", mode_text(run.metrics),
                                run.metrics.get("mode_reason") or ""), "text", "ascending", main=False),
        metric("floor_ratio", "Times the floor", "Median step over the time that the bytes it must read take",
               "{:.2f}".format, "ascending"),
        metric("hot_hit_rate", "Hot set's hits", "Share of the tokens chosen from the host that a hot set on the "
               "device had", "{:.2f}".format, "descending"),
        metric("peak_memory_bytes", "Peak memory, MiB", "Weights included on a CPU", mib, "ascending"),
    ]  # fmt: skip
    return columns


def _accuracy(run: ReportRun) -> Cell:
    low, high = run.metrics["accuracy"]["ci95"]
    return Cell(
        percent(run.accuracy), run.accuracy, f"{percent(low)} to {percent(high)}, n = {run.metrics['accuracy']['n']}"
    )


def _difference(run: ReportRun) -> Cell:
    if run.paired is None:
        return Cell("baseline" if run.policy == BASELINE else "no baseline")
    low, high = run.paired.ci95
    told = run.p_adjusted is not None and run.p_adjusted < ALPHA
    mark = "" if not told else "worse" if run.paired.difference < 0 else "better"
    detail = f"{points(low)} to {points(high)}, n = {run.paired.n}"
    return Cell(points(run.paired.difference), run.paired.difference, detail, mark)


def board_rows(found: Collection) -> list[Row]:
    """The leaderboard's numbers, unrounded, for its CSV."""
    rows = []
    for run in found.runs:
        low, high = run.metrics["accuracy"]["ci95"]
        paired = run.paired
        row: Row = {
            **{key: run.config[key] for key in ("model", "task", "context_length", "question", "seed", "policy")},
            "budget": budget_text(run.config["budget"]), "status": run.status, "examples": len(run.rows),
            "accuracy": run.accuracy, "accuracy_low": low, "accuracy_high": high,
            "difference": paired.difference if paired else None,
            "difference_low": paired.ci95[0] if paired else None,
            "difference_high": paired.ci95[1] if paired else None,
            "pairs": paired.n if paired else None, "test": paired.test if paired else None,
            "p_value": paired.p_value if paired else None, "p_holm": run.p_adjusted,
        }  # fmt: skip
        row |= dict(flat(run.metrics, skip=("accuracy", "over_budget")))
        row["over_budget"] = run.over_budget
        rows.append({**row, "run": str(run.path)})
    return rows


def flat(values: Mapping[str, Any], prefix: str = "", skip: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """Nested values by their dotted keys."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if key in skip:
            continue
        if isinstance(value, Mapping) and value:
            found += flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
