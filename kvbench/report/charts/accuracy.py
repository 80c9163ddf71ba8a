"""Accuracy against realised bytes and against latency, with the front of the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvbench import figures
from kvbench.compare.wording import budget_text
from kvbench.report.charts.chart import (
    MIB,
    Chart,
    Row,
    missing_chart,
    panel_height,
    percent,
    policy_legend,
    policy_styles,
    setting_charts,
    setting_text,
)
from kvbench.report.collect import Collection, ReportRun, Setting

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

MOST_SETTINGS = 2
"""Settings in one figure, two panels each."""
SPREAD = 8
"""Largest over smallest value from which an axis is logarithmic, in every panel of the report."""
_READ = (
    "Each mark is a run, labelled with its budget; the thin line is its 95% interval. Up and to the left is better: "
    "the dashed line joins the runs that none beats in both. Hollow marks are partial runs. Marks that would hide one "
    "another stand apart, tied to their place; a label without room is left out (all are in the CSV)."
)


@dataclass(frozen=True)
class _Quantity:
    """What a panel has on its x axis."""

    key: str
    text: str
    unit: str
    of: Callable[[ReportRun], float | None]


_BYTES = (
    _Quantity("total_bytes", "bytes of all tiers and index", "MiB", lambda run: run.total_bytes / MIB),
    _Quantity("resident_bytes", "bytes on the device", "MiB", lambda run: run.metrics["bytes"]["resident"] / MIB),
)
_TIMES = (
    _Quantity("tpot_p50_ms", "time per output token, median", "ms",
              lambda run: None if run.metrics["tpot_s"]["p50"] is None else 1000 * run.metrics["tpot_s"]["p50"]),
    _Quantity("ttft_s", "time to first token", "s", lambda run: run.metrics["ttft_s"]["total"]),
)  # fmt: skip


def accuracy_charts(found: Collection) -> list[Chart]:
    """The figures of accuracy against bytes."""
    return _fronts(found, "accuracy-bytes", "Accuracy against realised bytes", _BYTES, (
        "The bytes that a run's cache held, averaged over the examples: first all tiers and the index together, then "
        "what stays on the model's device, on the same axis. "))  # fmt: skip


def accuracy_latency_charts(found: Collection) -> list[Chart]:
    """The figures of accuracy against latency."""
    return _fronts(found, "accuracy-latency", "Accuracy against latency", _TIMES, (
        "First the median time per output token, then the time to first token, index construction "
        "included. "))  # fmt: skip


def _fronts(found: Collection, name: str, title: str, quantities: Sequence[_Quantity], lead: str) -> list[Chart]:
    first = quantities[0]

    def row(run: ReportRun) -> list[Row]:
        low, high = run.metrics["accuracy"]["ci95"]
        return [{
            "accuracy": run.accuracy, "low": low, "high": high, "examples": run.metrics["accuracy"]["n"],
            **{f"{tier}_bytes": value for tier, value in run.metrics["bytes"].items()},
            "total_bytes": run.total_bytes, "tpot_p50_s": run.metrics["tpot_s"]["p50"],
            "ttft_s": run.metrics["ttft_s"]["total"],
        }]  # fmt: skip

    def told(run: ReportRun, label: str) -> str:
        value = first.of(run)
        return f"{label} {percent(run.accuracy)}" + ("" if value is None else f" at {value:.4g} {first.unit}")

    return setting_charts(
        found, found.runs, Chart(name, title, lead + _READ), row=row, told=told, most=MOST_SETTINGS,
        paint=partial(_paint, quantities=quantities, scales=_scales(found, quantities)),
        height=lambda shown: 0.2 + 2 * sum(_heights(shown)),
    ) or [missing_chart(name, title, found)]  # fmt: skip


def _heights(groups: Mapping[Setting, list[ReportRun]]) -> list[float]:
    """Inches of a panel of each setting."""
    return [panel_height(len({run.policy for run in runs})) for runs in groups.values()]


def _scales(found: Collection, quantities: Sequence[_Quantity]) -> dict[str, bool]:
    """By unit, whether its axes are logarithmic: in every panel of the report or in none."""
    values: dict[str, list[float]] = {}
    for one in quantities:
        values.setdefault(one.unit, []).extend(v for run in found.runs if (v := one.of(run)) is not None)
    return {unit: min(known) > 0 and max(known) > SPREAD * min(known) for unit, known in values.items() if known}


def _paint(
    figure: FigureBase, groups: Mapping[Setting, list[ReportRun]], found: Collection, quantities: Sequence[_Quantity],
    scales: Mapping[str, bool],
) -> None:  # fmt: skip
    from kvbench.report.charts.scatter import Point, scatter  # noqa: PLC0415 - imports matplotlib, slow

    styles = policy_styles(found.runs)
    grid = figure.subplots(
        2 * len(groups),
        1,
        squeeze=False,
        gridspec_kw={"height_ratios": [h for h in _heights(groups) for _ in quantities]},
    )
    for row, (setting, runs) in enumerate(groups.items()):
        for place, quantity in enumerate(quantities):
            axis = grid[2 * row + place, 0]
            points = []
            for run in runs:
                value, (low, high) = quantity.of(run), _interval(run)
                if value is not None:
                    label = budget_text(run.config["budget"]) if run.config["budget"] else ""
                    points.append(Point(value, 100 * run.accuracy, 100 * low, 100 * high, styles[run.policy], label,
                                        run.partial))  # fmt: skip
            alike = [one for one in quantities if one.unit == quantity.unit]
            values = [v for one in alike for run in runs if (v := one.of(run)) is not None]
            axis.set_ylim(-4, 106)
            if scales.get(quantity.unit) and values:
                figures.logarithmic(axis)
                axis.set_xlim(min(values) / 1.3, 1.3 * max(values))
            elif values:
                axis.set_xlim(0, 1.08 * max(*values, 1e-9))
            log = ", log" if scales.get(quantity.unit) else ""
            axis.set_xlabel(f"{quantity.text} ({quantity.unit}{log})")
            axis.set_ylabel("accuracy (%)")
            axis.set_title(setting_text(setting, found), loc="left")
            scatter(axis, points)
            policy_legend(axis, [run.policy for run in runs], styles)


def _interval(run: ReportRun) -> tuple[float, float]:
    low, high = run.metrics["accuracy"]["ci95"]
    return (run.accuracy if low is None else low), (run.accuracy if high is None else high)
