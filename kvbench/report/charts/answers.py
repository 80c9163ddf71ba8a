"""The cache and the steps over long answers: tokens held where a cache is compressed again and again, and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean, median
from typing import TYPE_CHECKING

from kvbench.report.charts.chart import Chart, policy_styles, run_styles, setting_charts, setting_text
from kvbench.report.collect import Collection, ReportRun, Setting, labels

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

LONG = 64
"""Steps of an answer from which on it is drawn."""
WINDOWS = 40
"""Windows of steps that times are drawn by."""


def answer_charts(found: Collection) -> list[Chart]:
    """The figures of tokens held and times over the answer; none where no cache was compressed over a long answer."""
    curves = {id(run): curve for run in found.runs if len(curve := _curve(run)) >= LONG}
    compressed = {run.setting for run in found.runs if id(run) in curves and any(row[1] for row in curves[id(run)])}
    runs = [run for run in found.runs if id(run) in curves and run.setting in compressed]
    chart = Chart(
        "answers", "The cache over the answer",
        "Tokens a head that the cache holds after each step, the mean over heads, layers and the examples whose "
        f"answers came so far, of runs with --compress-every; and the time of a step, the median in {WINDOWS} "
        "windows of steps.",
    )  # fmt: skip
    return setting_charts(
        found, runs, chart,
        row=lambda run: ({"step": step, "held_tokens": held, "step_s": seconds, "examples": count}
                         for step, held, seconds, count in curves[id(run)]),
        told=lambda run, name: _told(name, curves[id(run)]),
        paint=partial(_paint, curves=curves), height=lambda shown: 0.7 + 2.2 * len(shown),
    )  # fmt: skip


Point = tuple[int, float | None, float, int]
"""Step, tokens held, seconds, and the examples whose answer came so far."""


def _curve(run: ReportRun) -> list[Point]:
    steps = [row["step_s"] for row in run.rows]
    held = [row.get("held_tokens") or [] for row in run.rows]
    points: list[Point] = []
    for step in range(max(map(len, steps), default=0)):
        seconds = [one[step] for one in steps if len(one) > step]
        tokens = [one[step] for one in held if len(one) > step]
        points.append((step + 1, fmean(tokens) if tokens else None, median(seconds), len(seconds)))
    return points


def _told(name: str, curve: Sequence[Point]) -> str:
    held = [tokens for _, tokens, _, _ in curve if tokens is not None]
    text = f"held {min(held):.0f} to {max(held):.0f} tokens, " if held else ""
    return f"{name} {text}{1000 * median(point[2] for point in curve):.3g} ms a step"


def _paint(
    figure: FigureBase, groups: Mapping[Setting, list[ReportRun]], curves: Mapping[int, list[Point]], found: Collection
) -> None:
    styles = policy_styles(found.runs)
    grid = figure.subplots(len(groups), 2, squeeze=False)
    for (left, right), (setting, runs) in zip(grid, groups.items(), strict=True):
        names = labels(runs)
        looks = run_styles(runs, styles)
        for run in runs:
            look = looks[id(run)]
            curve = curves[id(run)]
            held = [(step, tokens) for step, tokens, _, _ in curve if tokens is not None]
            if held:
                left.plot(*zip(*held, strict=True), color=look.color, linestyle=look.dashes, label=names[id(run)])
            size = max(1, len(curve) // WINDOWS)
            parts = [curve[start : start + size] for start in range(0, len(curve), size)]
            right.plot(
                [fmean(point[0] for point in part) for part in parts],
                [1000 * median(point[2] for point in part) for part in parts],
                color=look.color, linestyle=look.dashes, label=names[id(run)],
            )  # fmt: skip
        left.set_title(setting_text(setting, found), loc="left")
        for axis, label in ((left, "tokens held a head"), (right, "ms a step")):
            axis.set_ylim(bottom=0)
            axis.set_ylabel(label)
            if axis.has_data():
                axis.legend(fontsize=6.5)
    for axis in grid[-1]:
        axis.set_xlabel("step of the answer")
