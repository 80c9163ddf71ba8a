"""Needles found, by depth and context length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from kvbench import figures
from kvbench.report.charts.chart import (
    WIDTH,
    Chart,
    Row,
    commands_of,
    grouped_title,
    in_few_words,
    not_baseline,
    percent,
)
from kvbench.report.collect import BASELINE, Collection, ReportRun, labels
from kvbench.report.commands import run_command

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase


MOST_NUMBERS = 20
"""Columns of a heat map whose cells have room for their numbers."""
MOST_PANELS = 9
"""Heat maps beside each other; more policies become the rows of one."""
DEPTHS = (0, 20, 40, 60, 80, 100)
"""Edges, in percent, between which needles at random depths are averaged."""


def needle_charts(found: Collection) -> list[Chart]:
    """The figures of needles found by depth and length."""
    title = "Needles by depth and context length"
    groups: dict[tuple[str, str, str], list[ReportRun]] = {}
    for run in found.runs:
        if any(_depth(row) is not None for row in run.rows):
            model, task, _, question = run.setting
            groups.setdefault((model, task, question), []).append(run)
    if not groups:
        first = not_baseline(found)
        config = {**first.config, "task": "needle_grid", "task_options": {}} if first else None
        return [Chart(
            "needles", title, "", missing="No run here has a task with needles at a known depth.",
            remedy=[run_command(config, first.path.parent)] if config and first else [],
        )]  # fmt: skip
    result = []
    for place, ((model, task, question), runs) in enumerate(groups.items()):
        names = labels(runs, apart=("context_length", "seed", "examples"))
        depths = sorted({depth for run in runs for row in run.rows if (depth := _depth(row)) is not None})
        grid = all("depths" in run.config["task_options"] for run in runs)
        binned = not grid or len(depths) > 11
        cells: dict[str, dict[tuple[str, int], list[float]]] = {}
        for run in sorted(runs, key=lambda run: run.policy != BASELINE):
            mine = cells.setdefault(names[id(run)], {})
            for row in run.rows:
                depth = _depth(row)
                if depth is not None:
                    mine.setdefault((_bin(depth) if binned else f"{depth:g}", run.config["context_length"]), []).append(
                        float(row["score"])
                    )
        order = [_bin(depth) for depth in DEPTHS[:-1]] if binned else [f"{depth:g}" for depth in depths]
        lengths = sorted({run.config["context_length"] for run in runs})
        rows = [
            {"model": model, "task": task, "question": question, "label": name, "depth_percent": depth,
             "context_length": length, "accuracy": fmean(scores), "examples": len(scores)}
            for name, mine in cells.items() for (depth, length), scores in sorted(mine.items(), key=lambda c: c[0][1])
        ]  # fmt: skip
        words = in_few_words((
            f"{name} " + ", ".join(
                f"{percent(fmean(scores))} at {length} tokens" for length in lengths
                if (scores := [score for (_, n), part in mine.items() if n == length for score in part])
            ) for name, mine in cells.items()
        ))  # fmt: skip
        many = len(cells) > MOST_PANELS
        columns = min(3, len(cells))
        lines = -(-len(cells) // columns)
        result.append(Chart(
            "needles" if not place else f"needles-{place + 1}",
            grouped_title(title, (model, task, question), groups),
            f"Mean score of {task} by the needle's depth in the context (0%: its start) and the context length"
            + (". " if many else "; the small number counts the examples. Crossed cells were not run.")
            + (" Depths are averaged within bands of 20%." if binned else ""),
            rows, f"Mean over depths: {words}.", commands=commands_of(runs),
            paint=partial(_paint_rows if many else _paint_needles, cells=cells, order=order, lengths=lengths),
            size=(WIDTH, 1.1 + 0.19 * len(cells) if many else 0.7 + lines * (0.7 + 0.36 * len(order))),
        ))  # fmt: skip
    return result


def _depth(row: Row) -> float | None:
    """The depth of an example's one needle; several needles have no one depth."""
    info = row.get("info") or {}
    depth = info.get("depth")
    return float(depth) if isinstance(depth, int | float) and "depths" not in info else None


def _bin(depth: float) -> str:
    place = min(int(np.searchsorted(DEPTHS, depth, side="right")) - 1, len(DEPTHS) - 2)
    return f"{DEPTHS[place]}–{DEPTHS[place + 1]}"


def _paint_rows(
    figure: FigureBase, cells: Mapping[str, Mapping[tuple[str, int], list[float]]], order: Sequence[str],
    lengths: Sequence[int],
) -> None:  # fmt: skip
    """One heat map of all: a row for each policy, a column for each length and depth."""
    axis = figure.subplots()
    columns = [(depth, length) for length in lengths for depth in order]
    values = np.array([
        [100 * fmean(mine[place]) if mine.get(place) else np.nan for place in columns] for mine in cells.values()
    ])  # fmt: skip
    mesh = axis.pcolormesh(values, cmap=figures.MAP, vmin=0, vmax=100, edgecolors="white", linewidth=0.8)
    if len(columns) <= MOST_NUMBERS:
        for y, x in zip(*np.nonzero(np.isfinite(values)), strict=True):
            ink = "#111111" if values[y, x] > 55 else "#f5f5f5"
            axis.text(x + 0.5, y + 0.55, f"{values[y, x]:.0f}", ha="center", va="center", color=ink, fontsize=6.5)
    for place in range(1, len(lengths)):
        axis.axvline(place * len(order), color="#000000", linewidth=1.0)
    axis.set_yticks([y + 0.5 for y in range(len(cells))], list(cells), fontsize=7)
    axis.set_xticks([x + 0.5 for x in range(len(columns))], [depth for depth, _ in columns], fontsize=6.5,
                    rotation=90 if len(columns) > MOST_NUMBERS // 2 else 0)  # fmt: skip
    above = axis.secondary_xaxis("top")
    above.set_xticks([(place + 0.5) * len(order) for place in range(len(lengths))],
                     [f"{length} tokens" for length in lengths])  # fmt: skip
    above.tick_params(length=0)
    axis.set(ylim=(len(cells), 0), xlim=(0, len(columns)), xlabel="depth (%)")
    axis.grid(visible=False)
    axis.tick_params(length=0)
    figure.colorbar(mesh, ax=axis, label="mean score (%)", fraction=0.04, aspect=40)


def _paint_needles(
    figure: FigureBase, cells: Mapping[str, Mapping[tuple[str, int], list[float]]], order: Sequence[str],
    lengths: Sequence[int],
) -> None:  # fmt: skip
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    mesh = None
    for axis, (name, mine) in zip(grid.flat, cells.items(), strict=False):
        values = np.full((len(order), len(lengths)), np.nan)
        for (depth, length), scores in mine.items():
            values[order.index(depth), lengths.index(length)] = 100 * fmean(scores)
        mesh = axis.pcolormesh(values, cmap=figures.MAP, vmin=0, vmax=100, edgecolors="white", linewidth=1.5)
        for y, depth in enumerate(order):
            for x, length in enumerate(lengths):
                scores = mine.get((depth, length), [])
                if scores:
                    ink = "#111111" if values[y, x] > 55 else "#f5f5f5"
                    axis.text(x + 0.5, y + 0.42, f"{values[y, x]:.0f}", ha="center", va="center", color=ink)
                    axis.text(x + 0.94, y + 0.9, str(len(scores)), ha="right", va="bottom", color=ink, fontsize=6)
                else:
                    axis.plot([x + 0.1, x + 0.9], [y + 0.1, y + 0.9], color=figures.REFERENCE, linewidth=0.8)
                    axis.plot([x + 0.1, x + 0.9], [y + 0.9, y + 0.1], color=figures.REFERENCE, linewidth=0.8)
        axis.set_xticks([x + 0.5 for x in range(len(lengths))], list(map(str, lengths)))
        axis.set_yticks([y + 0.5 for y in range(len(order))], list(order))
        axis.set(ylim=(len(order), 0), xlim=(0, len(lengths)))
        axis.grid(False)
        axis.tick_params(length=0)
        axis.set_title(name, loc="left", fontsize=8)
    for axis in list(grid.flat)[len(cells) :]:
        axis.set_axis_off()
    for axis in list(grid.flat)[: len(cells)][-columns:]:
        axis.set_xlabel("context length (tokens)")
        axis.tick_params(labelbottom=True)
    for axis in grid[:, 0]:
        axis.set_ylabel("depth (%)")
    assert mesh is not None
    figure.colorbar(mesh, ax=list(grid.flat), label="mean score (%)", fraction=0.04)
