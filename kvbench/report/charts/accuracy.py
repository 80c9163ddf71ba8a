"""Accuracy against realised bytes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvbench import figures
from kvbench.report.charts.chart import (
    MIB,
    WIDTH,
    Chart,
    base_row,
    commands_of,
    legend,
    missing_chart,
    percent,
    policy_styles,
    portions,
    setting_text,
)
from kvbench.report.collect import Collection, ReportRun, Setting, labels

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase


def accuracy_charts(found: Collection) -> list[Chart]:
    """The figures of accuracy against bytes."""
    groups = found.settings()
    result = []
    for suffix, settings in portions(groups):
        rows, words = [], []
        for setting in settings:
            names = labels(groups[setting])
            for run in groups[setting]:
                low, high = run.metrics["accuracy"]["ci95"]
                rows.append({
                    **base_row(run, names[id(run)]), "accuracy": run.accuracy, "low": low, "high": high,
                    "examples": run.metrics["accuracy"]["n"],
                    **{f"{tier}_bytes": value for tier, value in run.metrics["bytes"].items()},
                    "total_bytes": run.total_bytes,
                })  # fmt: skip
            words.append(f"{setting_text(setting, found)}: " + ", ".join(
                f"{names[id(run)]} {percent(run.accuracy)} at {run.total_bytes / MIB:.1f} MiB"
                for run in groups[setting]) + ".")  # fmt: skip
        shown = {setting: groups[setting] for setting in settings}
        result.append(Chart(
            f"accuracy-bytes{suffix}", "Accuracy against realised bytes",
            "Each mark is a run: its mean score with the 95% interval, over the bytes that its cache held, averaged "
            "over the examples. Left: all tiers and the index together. Right: what stays on the model's device. "
            "Up and to the left is better; budgets of one policy are joined.",
            rows, " ".join(words), commands=commands_of(run for part in shown.values() for run in part),
            paint=partial(_paint_accuracy, groups=shown, found=found),
            size=(WIDTH, 0.7 + 2.4 * len(settings)),
        ))  # fmt: skip
    return result or [missing_chart("accuracy-bytes", "Accuracy against realised bytes", found)]


def _paint_accuracy(figure: FigureBase, groups: Mapping[Setting, list[ReportRun]], found: Collection) -> None:
    styles = policy_styles(found.runs)
    grid = figure.subplots(len(groups), 2, squeeze=False, sharey=True)
    for row, (setting, runs) in zip(grid, groups.items(), strict=True):
        everything = ("resident", "offloaded", "index")
        for axis, tiers, title in (
            (row[0], everything, "all tiers and index"),
            (row[1], ("resident",), "on the device"),
        ):
            lines: dict[str, list[ReportRun]] = {}
            for run in runs:
                same = {**run.config, "budget": {**(run.config["budget"] or {}), "tokens": 0, "ratio": 0, "bytes": 0}}
                lines.setdefault(str(same), []).append(run)
            for line in lines.values():
                points = sorted(
                    (sum(run.metrics["bytes"][tier] for tier in tiers) / MIB, 100 * run.accuracy,
                     *(100 * end for end in run.metrics["accuracy"]["ci95"]), run.partial)
                    for run in line
                )  # fmt: skip
                xs, ys, low, high, partial = zip(*points, strict=True)
                look = styles[line[0].policy]
                axis.errorbar(
                    xs, ys, yerr=(np.maximum(np.subtract(ys, low), 0), np.maximum(np.subtract(high, ys), 0)),
                    color=look.color, marker=look.marker, linestyle=look.dashes if len(xs) > 1 else "none",
                    elinewidth=0.8, label=line[0].policy,
                )  # fmt: skip
                for x, y, open_mark in zip(xs, ys, partial, strict=True):
                    if open_mark:
                        axis.annotate("partial", (x, y), (4, -10), textcoords="offset points", fontsize=7)
            positive = [sum(run.metrics["bytes"][tier] for tier in tiers) for run in runs]
            if min(positive) > 0 and max(positive) > 10 * min(positive):
                figures.logarithmic(axis)
                axis.set_xlabel(f"{title} (MiB, log)")
            else:
                axis.set_xlim(0, 1.1 * max(*positive, 1) / MIB)
                axis.set_xlabel(f"{title} (MiB)")
                axis.locator_params(axis="x", nbins=4)
            axis.set_ylim(-4, 104)
        row[0].set_ylabel("accuracy (%)")
        row[0].set_title(setting_text(setting, found), loc="left")
    legend(figure, grid.flat)
