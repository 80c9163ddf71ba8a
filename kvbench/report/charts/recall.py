"""Recall, recovered attention mass and scanned keys, over a run and by decoding step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from kvbench.report.charts.chart import (
    NO_RECALL,
    Chart,
    commands_with,
    missing_chart,
    panel_height,
    percent,
    policy_styles,
    run_styles,
    setting_charts,
    setting_text,
    side_legend,
)
from kvbench.report.collect import BASELINE, Collection, ReportRun, Setting, labels

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase


MOST_STEPS = 200
"""Decoding steps drawn one by one; more are averaged in as many windows."""
MOST_NAMES = 36
"""Lines of a panel that its legend names one by one; of more it names the policies."""
_PROBED = {
    "recall_at_k": ("recall@k", "o", "#000000"), "recovered_mass": ("recovered mass", "|", "#000000"),
    "scanned_fraction": ("keys scanned", "s", "#555555"),
}  # fmt: skip


def recall_charts(found: Collection) -> list[Chart]:
    """The figures of recall, recovered mass and scanned keys."""
    title = "Recall and scanned keys"
    have = [run for run in found.runs if run.metrics["recall_at_k"] is not None]
    lack = [run for run in found.runs if run not in have and run.policy != BASELINE]
    if not have:
        return [missing_chart("recall-scanned", title, found, NO_RECALL, lack, probes=())]  # fmt: skip
    chart = Chart(
        "recall-scanned", title,
        "Recall@k against the exact top k by inner product, recovered attention mass, and the share of the keys "
        "that finding them took; averages over decoding steps, layers and heads of the probed examples. Policies "
        "that search nothing have no scanned share.",
        missing=f"{len(lack)} of {len(found.runs)} runs measured no recall and are left out." if lack else "",
        remedy=commands_with(lack, ()),
    )  # fmt: skip
    return setting_charts(
        found, have, chart,
        row=lambda run: [{"k": run.config["recall_k"], "probed_examples": run.metrics["probed_examples"],
                          **{key: run.metrics.get(key) for key in _PROBED}}],
        told=lambda run, name: (
            f"{name} recall {percent(run.metrics['recall_at_k'])}, recovered mass "
            f"{percent(run.metrics['recovered_mass'])}, scanned {percent(run.metrics.get('scanned_fraction'))}"
        ),
        paint=_paint_recall, height=lambda shown: 0.8 + sum(0.6 + 0.24 * len(runs) for runs in shown.values()),
    )  # fmt: skip


def _paint_recall(figure: FigureBase, groups: Mapping[Setting, list[ReportRun]], found: Collection) -> None:
    grid = figure.subplots(
        len(groups),
        1,
        squeeze=False,
        sharex=True,
        gridspec_kw={"height_ratios": [len(g) + 1.5 for g in groups.values()]},
    )
    for axis, (setting, runs) in zip(grid.flat, groups.items(), strict=True):
        names = labels(runs)
        for key, (label, marker, color) in _PROBED.items():
            points: list[tuple[float, int]] = [
                (run.metrics[key], y) for y, run in enumerate(runs) if run.metrics.get(key) is not None
            ]
            if points:
                axis.plot(
                    [100 * x for x, _ in points], [y for _, y in points], marker=marker, linestyle="none",
                    color=color, label=label, markersize=9 if marker == "|" else 5,
                    markerfacecolor="none" if key == "scanned_fraction" else None, markeredgewidth=1.4,
                )  # fmt: skip
        side_legend(axis, *axis.get_legend_handles_labels())
        axis.set_yticks(range(len(runs)), [names[id(run)] for run in runs])
        axis.set_ylim(len(runs) - 0.5, -0.5)
        axis.set_xlim(-2, 102)
        axis.set_title(setting_text(setting, found), loc="left")
    grid.flat[-1].set_xlabel("% (of the top k, of the attention mass, of the keys)")


def step_charts(found: Collection) -> list[Chart]:
    """The figures of recall over the decoding steps."""
    title = "Recall over the decoding steps"
    curves = {id(run): curve for run in found.runs if (curve := _curve(run))}
    have = [run for run in found.runs if id(run) in curves]
    lack = [run for run in found.runs if id(run) not in curves and run.policy != BASELINE]
    if not have:
        return [missing_chart("recall-steps", title, found, NO_RECALL, lack, probes=())]  # fmt: skip
    windows = any(len(curve) > MOST_STEPS for curve in curves.values())
    chart = Chart(
        "recall-steps", title,
        "Recall@k at each decoding step, averaged over layers, heads and the probed examples that came so far. A "
        "policy has one colour and marker in all figures; its budgets differ in their dashes, the smallest solid."
        + (f" Beyond {MOST_STEPS} steps, means of as many windows." if windows else ""),
        missing=f"{len(lack)} of {len(found.runs)} runs have no trace of recall and are left out." if lack else "",
        remedy=commands_with(lack, ()),
    )  # fmt: skip

    def told(run: ReportRun, name: str) -> str:
        (_, first, _), (step, last, _) = curves[id(run)][0], curves[id(run)][-1]
        return f"{name} {percent(first)} at the first step, {percent(last)} at step {step}"

    return setting_charts(
        found, have, chart, told=told,
        row=lambda run: ({"step": step, "recall_at_k": value, "examples": count}
                         for step, value, count in curves[id(run)]),
        paint=partial(_paint_steps, curves=curves),
        height=lambda shown: 0.7 + sum(panel_height(_entries(runs)) for runs in shown.values()),
    )  # fmt: skip


def _entries(runs: Sequence[ReportRun]) -> int:
    return len(runs) if len(runs) <= MOST_NAMES else len({run.policy for run in runs})


def _curve(run: ReportRun) -> list[tuple[int, float, int]]:
    """Step, recall and probed examples, over all steps that any probed example has."""
    steps: dict[int, list[float]] = {}
    for trace in run.traces:
        column = trace.columns.get("recall_at_k")
        if column is None:
            continue
        for position, values in zip(trace.positions, column, strict=True):
            if np.isfinite(values).any():
                steps.setdefault(int(position) - trace.prompt_tokens, []).append(float(np.nanmean(values)))
    return [(step, fmean(values), len(values)) for step, values in sorted(steps.items())]


def _paint_steps(
    figure: FigureBase, groups: Mapping[Setting, list[ReportRun]], curves: Mapping[int, list[tuple[int, float, int]]],
    found: Collection,
) -> None:  # fmt: skip
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - slow

    styles = policy_styles(found.runs)
    grid = figure.subplots(
        len(groups), 1, squeeze=False,
        gridspec_kw={"height_ratios": [panel_height(_entries(runs)) for runs in groups.values()]},
    )  # fmt: skip
    for axis, (setting, runs) in zip(grid.flat, groups.items(), strict=True):
        names = labels(runs)
        by_policy = len(runs) > MOST_NAMES
        looks = run_styles(runs, styles)
        named: set[str] = set()
        for run in runs:
            points = np.array([(step, 100 * value) for step, value, _ in curves[id(run)]])
            if len(points) > MOST_STEPS:
                points = np.array([part.mean(0) for part in np.array_split(points, MOST_STEPS)])
            look = looks[id(run)]
            axis.plot(
                points[:, 0], points[:, 1], color=look.color, linestyle=look.dashes, marker=look.marker,
                markersize=3.5, linewidth=1.0, markevery=max(1, len(points) // 12),
                label=(None if run.policy in named else run.policy) if by_policy else names[id(run)],
            )  # fmt: skip
            named.add(run.policy)
        handles, texts = axis.get_legend_handles_labels()
        side_legend(axis, handles, texts, handlelength=2.6)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(-4, 104)
        axis.set_ylabel("recall@k (%)")
        axis.set_title(setting_text(setting, found), loc="left")
    grid.flat[-1].set_xlabel("decoding step (tokens after the prompt)")
