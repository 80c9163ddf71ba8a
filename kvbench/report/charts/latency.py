"""Where the time goes: time to first token, and a decoding step by its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean, median
from typing import TYPE_CHECKING

import numpy as np

from kvbench import figures
from kvbench.report.charts.chart import (
    WIDTH,
    Chart,
    base_row,
    commands_of,
    commands_with,
    grouped_title,
    in_few_words,
    missing_chart,
)
from kvbench.report.collect import Collection, ReportRun, labels
from kvbench.runs.published import Bar, published

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase


PARTS = {
    "prefill_s": "prefill", "index_s": "index construction", "retrieval_s": "retrieval", "attention_s": "attention",
    "insertion_s": "insertion", "other_s": "other", "unsplit_s": "not split (no latency probe)",
}  # fmt: skip
"""Where the time goes, by the CSV's column."""


def _split(run: ReportRun) -> dict[str, float | None]:
    """Seconds of a run by part; without the latency probe a decoding step is `unsplit_s`."""
    ttft, step = run.metrics["ttft_s"], run.metrics["tpot_s"]["p50"]
    found: dict[str, float | None] = {"prefill_s": ttft["prefill"], "index_s": ttft["index"]}
    inner = {name: run.probed(name) for name in ("retrieval_s", "attention_s", "insertion_s")}
    if not all(inner.values()):
        return {**found, "unsplit_s": step}
    rows = [row for row in run.rows if (row.get("probes") or {}).get("retrieval_s") is not None]
    steps = [second for row in rows for second in row["step_s"]]
    parts = {name: fmean(values) for name, values in inner.items()}
    return {**found, **parts, "other_s": max(median(steps) - sum(parts.values()), 0.0) if steps else None}


def latency_charts(found: Collection) -> list[Chart]:
    """The figures of where the time goes."""
    title = "Where the time goes"
    if not found.runs:
        return [missing_chart("latency", title, found)]
    groups: dict[tuple[str, str, str], list[ReportRun]] = {}
    for run in found.runs:
        model, task, _, question = run.setting
        groups.setdefault((model, task, question), []).append(run)
    result = []
    for place, ((model, task, question), runs) in enumerate(groups.items()):
        names = labels(runs, apart=("context_length",))
        ordered = sorted(runs, key=lambda run: run.config["context_length"])
        splits = [(run, _split(run)) for run in ordered]
        rows = [
            {**base_row(run, names[id(run)]), **split, "tpot_p50_s": run.metrics["tpot_s"]["p50"],
             **{key: run.metrics[key] for key in ("mode", "mode_reason", "floor_s", "floor_ratio")},
             "device_tpot_p50_s": run.metrics["device_tpot_s"]["p50"],
             "published_s": bar.seconds(run.config["context_length"]) if (bar := _bar(run)) else None,
             "device": run.environment.get("device_name"), "threads": run.environment.get("threads")}
            for run, split in splits
        ]  # fmt: skip
        words = in_few_words((
            f"{names[id(run)]} at {run.config['context_length']} tokens: " + ", ".join(
                f"{PARTS[key]} " + (f"{value:.2f} s" if key in ("prefill_s", "index_s") else f"{1000 * value:.1f} ms")
                for key, value in split.items() if value is not None)
            for run, split in splits
        ), most=24)  # fmt: skip
        chart = Chart(
            "latency" if not place else f"latency-{place + 1}",
            grouped_title(title, (model, task, question), groups),
            "Left: time to first token, prefill and index construction, means over the examples. Right: a decoding "
            "step of the probed examples' undisturbed generation, split by the latency probe; other is the rest of the "
            "step: the model's own layers. The tick is the median step of all examples.",
            rows, words + ".", commands=commands_of(ordered),
            paint=partial(_paint_latency, splits=splits, names=names),
            size=(WIDTH, 1.3 + 0.24 * len(runs) + 0.12 * len({run.config["context_length"] for run in runs})),
        )  # fmt: skip
        if any(run.metrics["floor_s"] is not None for run in runs):
            chart.caption += (
                " The dashed tick is the floor: the time that the bytes take which a step must read, at the bandwidths "
                "measured on that device."
            )
        bars = dict.fromkeys(bar.text for bar in map(_bar, runs) if bar is not None)
        chart.caption += "".join(f" The dotted tick: {text}." for text in bars)
        lack = [run for run, split in splits if "unsplit_s" in split]
        if lack:
            chart.missing = (
                f"{len(lack)} of {len(runs)} runs have no latency probe, so their decoding steps are not split."
            )
            chart.remedy = commands_with(lack, ("latency",))
        over = [names[id(run)] for run, split in splits if split.get("other_s") == 0.0]
        if over:
            chart.caption += (
                f" For {', '.join(over)} the timed parts exceed the undisturbed step: timings too noisy to split."
            )
        result.append(chart)
    return result


def _bar(run: ReportRun) -> Bar | None:
    """What was published for just this model and card."""
    config = run.config
    return published(config["model"], config["dtype"], run.environment.get("device_name"), config["batch_size"])


def _paint_latency(
    figure: FigureBase, splits: Sequence[tuple[ReportRun, Mapping[str, float | None]]], names: Mapping[int, str]
) -> None:
    first, step = figure.subplots(1, 2, sharey=True)
    places, ticks, y, length = [], [], 0.0, None
    for run, _ in splits:
        if length not in (None, run.config["context_length"]):
            y += 0.5
        length = run.config["context_length"]
        places.append(y)
        ticks.append(f"{length} · {names[id(run)]}")
        y += 1
    for axis, keys, unit in ((first, ("prefill_s", "index_s"), 1.0), (step, tuple(PARTS)[2:], 1000.0)):
        left = np.zeros(len(splits))
        for key in keys:
            widths = np.array([unit * (split.get(key) or 0.0) for _, split in splits])
            if not widths.any():
                continue
            look = figures.style(list(PARTS).index(key) if key != "unsplit_s" else 7)
            axis.barh(
                places, widths, 0.8, left=left, color=look.color, hatch=look.hatch, edgecolor="#ffffff", linewidth=0.4,
                label=PARTS[key],
            )  # fmt: skip
            left += widths
    medians = [(run.metrics["tpot_s"]["p50"], place) for (run, _), place in zip(splits, places, strict=True)]
    for value, place in medians:
        if value is not None:
            step.plot([1000 * value] * 2, [place - 0.48, place + 0.48], color="#000000", linewidth=1.2)
    for (run, _), place in zip(splits, places, strict=True):
        bar = _bar(run)
        theirs = None if bar is None else bar.seconds(run.config["context_length"])
        marks = ((run.metrics["floor_s"], "--"), (theirs, ":"))
        for value, dashes in marks:
            if value is not None:
                step.plot([1000 * value] * 2, [place - 0.48, place + 0.48], color=figures.REFERENCE, linestyle=dashes)
    first.set_yticks(places, ticks)
    first.set_ylim(y - 0.4, -0.6)
    first.set_xlabel("time to first token (s)")
    step.set_xlabel("time per output token (ms)")
    for axis in (first, step):
        axis.grid(visible=False, axis="y")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=7, borderaxespad=0.2)
