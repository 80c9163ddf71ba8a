"""The report's figures: each draws what the runs hold, or says what is missing and which command records it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench import figures, spreadsheet
from kvbench.report.collect import BASELINE, Collection, ReportRun, Setting, budget_text, labels
from kvbench.report.commands import analyze_command, run_command
from kvbench.runs.published import Bar, published

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

MIB = 2**20
MOST_PANELS = 4
"""Settings in one figure; more go into a second."""
MOST_STEPS = 200
"""Decoding steps drawn one by one; more are averaged in as many windows."""
DEPTHS = (0, 20, 40, 60, 80, 100)
"""Edges, in percent, between which needles at random depths are averaged."""
WIDTH = 6.8
_BASELINE_STYLE = 6  # black

NO_RECALL = "measured recall: they ran with --probe-examples 0, or under a budget that left no choice"

PARTS = {
    "prefill_s": "prefill", "index_s": "index construction", "retrieval_s": "retrieval", "attention_s": "attention",
    "insertion_s": "insertion", "other_s": "other", "unsplit_s": "not split (no latency probe)",
}  # fmt: skip
"""Where the time goes, by the CSV's column."""

Row = dict[str, Any]


@dataclass
class Chart:
    """A figure of the report: its texts, the rows of its CSV, and how it is painted.

    `summary` is the figure in words, for those who do not see it. `missing` says why there is no figure, or what
    is left out of it, and `remedy` holds the commands that would record that. `commands` made what it shows.
    """

    name: str
    title: str
    caption: str
    rows: list[Row] = field(default_factory=list)
    summary: str = ""
    missing: str = ""
    remedy: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    paint: Callable[[FigureBase], None] | None = None
    picture: Path | None = None
    """A figure that is there already, `.svg` beside the `.png` that this names, and is shown as it is."""
    size: tuple[float, float] = (WIDTH, 3.0)


def charts(found: Collection) -> list[Chart]:
    """Every figure of the report, in its order, not yet drawn."""
    return [
        *_accuracy(found), *_recall(found), *_needles(found), *_latency(found), *_steps(found), *_ood(found),
        *_analyses(found),
    ]  # fmt: skip


def write(chart: Chart, folder: Path) -> list[Path]:
    """Write a chart's figure (SVG and PNG) and CSV into the folder; nothing where it has no data."""
    if chart.paint is None:
        return []
    if chart.picture is not None:
        for ending in (".svg", ".png"):
            shutil.copyfile(chart.picture.with_suffix(ending), folder / f"{chart.name}{ending}")
    else:
        with figures.drawing(folder, chart.name, chart.size) as figure:
            chart.paint(figure)
    with (folder / f"{chart.name}.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        spreadsheet.write_table(file, chart.rows)
    return [folder / f"{chart.name}.{ending}" for ending in ("svg", "png", "csv")]


def setting_text(setting: Setting, found: Collection) -> str:
    """A setting in words, without what all runs share beyond task and length."""
    model, task, length, question = setting
    parts = [task, f"{length} tokens"]
    if len({run.config["model"] for run in found.runs}) > 1:
        parts.insert(0, model_text(model))
    if len({run.config["question"] for run in found.runs}) > 1:
        parts.append(f"question {question}")
    return ", ".join(parts)


def model_text(model: str) -> str:
    """A model's name; of a local folder, the last part of its path."""
    return Path(model).name if Path(model).is_absolute() else model


# -- what the figures share --------------------------------------------------------------------------------------------


def _styles(runs: Iterable[ReportRun]) -> dict[str, figures.Style]:
    """The same style for a policy in every figure; black for exact attention."""
    places = (place for place in range(10**6) if place != _BASELINE_STYLE)
    names = sorted({run.policy for run in runs})
    return {name: figures.style(_BASELINE_STYLE if name == BASELINE else next(places)) for name in names}


def _parts(groups: Mapping[Setting, Any]) -> Iterator[tuple[str, list[Setting]]]:
    """Settings in portions for one figure each, with the suffix of the figure's name."""
    keys = list(groups)
    for start in range(0, len(keys), MOST_PANELS):
        yield "" if not start else f"-{start // MOST_PANELS + 1}", keys[start : start + MOST_PANELS]


def _title(title: str, group: tuple[str, str, str], groups: Iterable[tuple[str, str, str]]) -> str:
    """The title with the group's model, task and question mode, as far as the groups differ in them."""
    differing = [model_text(part) for place, part in enumerate(group) if len({other[place] for other in groups}) > 1]
    return f"{title}: {', '.join(differing)}" if differing else title


def _commands(runs: Iterable[ReportRun]) -> list[str]:
    return list(dict.fromkeys(run_command(run.config, run.path.parent) for run in runs))


def _base(run: ReportRun, label: str) -> Row:
    return {
        **{key: run.config[key] for key in ("model", "task", "context_length", "question", "seed", "policy")},
        "label": label, "budget": budget_text(run.config["budget"]), "status": run.status, "run": run.path.name,
    }  # fmt: skip


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _legend(figure: FigureBase, axes: Iterable[Axes]) -> None:
    """One legend for all axes, above them, each name once."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside upper center", ncols=min(len(handles), 4),
            handlelength=2.6,
        )  # fmt: skip


# -- accuracy against bytes --------------------------------------------------------------------------------------------


def _accuracy(found: Collection) -> list[Chart]:
    groups = found.settings()
    result = []
    for suffix, settings in _parts(groups):
        rows, words = [], []
        for setting in settings:
            names = labels(groups[setting])
            for run in groups[setting]:
                low, high = run.metrics["accuracy"]["ci95"]
                rows.append({
                    **_base(run, names[id(run)]), "accuracy": run.accuracy, "low": low, "high": high,
                    "examples": run.metrics["accuracy"]["n"],
                    **{f"{tier}_bytes": value for tier, value in run.metrics["bytes"].items()},
                    "total_bytes": run.total_bytes,
                })  # fmt: skip
            words.append(f"{setting_text(setting, found)}: " + ", ".join(
                f"{names[id(run)]} {_percent(run.accuracy)} at {run.total_bytes / MIB:.1f} MiB"
                for run in groups[setting]) + ".")  # fmt: skip
        shown = {setting: groups[setting] for setting in settings}
        result.append(Chart(
            f"accuracy-bytes{suffix}", "Accuracy against realised bytes",
            "Each mark is a run: its mean score with the 95% interval, over the bytes that its cache held, averaged "
            "over the examples. Left: all tiers and the index together. Right: what stays on the model's device. "
            "Up and to the left is better; budgets of one policy are joined.",
            rows, " ".join(words), commands=_commands(run for part in shown.values() for run in part),
            paint=partial(_paint_accuracy, groups=shown, found=found),
            size=(WIDTH, 0.7 + 2.4 * len(settings)),
        ))  # fmt: skip
    return result or [_nothing("accuracy-bytes", "Accuracy against realised bytes", found)]


def _paint_accuracy(figure: FigureBase, groups: Mapping[Setting, list[ReportRun]], found: Collection) -> None:
    styles = _styles(found.runs)
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
    _legend(figure, grid.flat)


# -- recall, recovered mass and scanned keys ---------------------------------------------------------------------------

_PROBED = {
    "recall_at_k": ("recall@k", "o", 0), "recovered_mass": ("recovered attention mass", "^", 2),
    "scanned_fraction": ("keys scanned", "s", 1),
}  # fmt: skip


def _recall(found: Collection) -> list[Chart]:
    title = "Recall and scanned keys"
    have = [run for run in found.runs if run.metrics["recall_at_k"] is not None]
    lack = [run for run in found.runs if run not in have and run.policy != BASELINE]
    if not have:
        return [_nothing("recall-scanned", title, found, NO_RECALL, lack, probes=())]  # fmt: skip
    groups = found.settings(have)
    result = []
    for suffix, settings in _parts(groups):
        shown = {setting: groups[setting] for setting in settings}
        rows, words = [], []
        for setting, runs in shown.items():
            names = labels(runs)
            rows += [
                {**_base(run, names[id(run)]), "k": run.config["recall_k"],
                 "probed_examples": run.metrics["probed_examples"], **{key: run.metrics.get(key) for key in _PROBED}}
                for run in runs
            ]  # fmt: skip
            words.append(f"{setting_text(setting, found)}: " + "; ".join(
                f"{names[id(run)]} recall {_percent(run.metrics['recall_at_k'])}, recovered mass "
                f"{_percent(run.metrics['recovered_mass'])}, scanned {_percent(run.metrics.get('scanned_fraction'))}"
                for run in runs) + ".")  # fmt: skip
        chart = Chart(
            f"recall-scanned{suffix}", title,
            "Recall@k against the exact top k by inner product, recovered attention mass, and the share of the keys "
            "that finding them took; averages over decoding steps, layers and heads of the probed examples. Policies "
            "that search nothing have no scanned share.",
            rows, " ".join(words), commands=_commands(run for part in shown.values() for run in part),
            paint=partial(_paint_recall, groups=shown, found=found),
            size=(WIDTH, 0.8 + sum(0.6 + 0.24 * len(runs) for runs in shown.values())),
        )  # fmt: skip
        if lack:
            chart.missing = f"{len(lack)} of {len(found.runs)} runs measured no recall and are left out."
            chart.remedy = _commands_with(lack, ())
        result.append(chart)
    return result


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
        for key, (label, marker, place) in _PROBED.items():
            points: list[tuple[float, int]] = [
                (run.metrics[key], y) for y, run in enumerate(runs) if run.metrics.get(key) is not None
            ]
            if points:
                axis.plot(
                    [100 * x for x, _ in points], [y for _, y in points], marker=marker, linestyle="none",
                    color=figures.style(place).color, label=label, markersize=6,
                    markerfacecolor="none" if key == "scanned_fraction" else None, markeredgewidth=1.4,
                )  # fmt: skip
        axis.set_yticks(range(len(runs)), [names[id(run)] for run in runs])
        axis.set_ylim(len(runs) - 0.5, -0.5)
        axis.set_xlim(-2, 102)
        axis.set_title(setting_text(setting, found), loc="left")
    grid.flat[-1].set_xlabel("% (of the top k, of the attention mass, of the keys)")
    _legend(figure, grid.flat)


# -- needles -----------------------------------------------------------------------------------------------------------


def _needles(found: Collection) -> list[Chart]:
    title = "Needles by depth and context length"
    groups: dict[tuple[str, str, str], list[ReportRun]] = {}
    for run in found.runs:
        if any(_depth(row) is not None for row in run.rows):
            model, task, _, question = run.setting
            groups.setdefault((model, task, question), []).append(run)
    if not groups:
        first = _not_baseline(found)
        config = {**first.config, "task": "needle_grid", "task_options": {}} if first else None
        return [Chart(
            "needles", title, "", missing="No run here has a task with needles at a known depth.",
            remedy=[run_command(config, first.path.parent)] if config and first else [],
        )]  # fmt: skip
    result = []
    for place, ((model, task, question), runs) in enumerate(groups.items()):
        names = labels(runs, apart=("context_length", "seed", "examples"))
        depths = sorted({depth for run in runs for row in run.rows if (depth := _depth(row)) is not None})
        binned = len(depths) > 11
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
        words = "; ".join(
            f"{name} " + ", ".join(
                f"{_percent(fmean(scores))} at {length} tokens" for length in lengths
                if (scores := [score for (_, n), part in mine.items() if n == length for score in part])
            ) for name, mine in cells.items()
        )  # fmt: skip
        columns = min(3, len(cells))
        lines = -(-len(cells) // columns)
        result.append(Chart(
            "needles" if not place else f"needles-{place + 1}",
            _title(title, (model, task, question), groups),
            f"Mean score of {task} by the needle's depth in the context (0%: its start) and the context length; the "
            "small number counts the examples. Crossed cells were not run."
            + (" Depths are averaged within bands of 20%." if binned else ""),
            rows, f"Mean over depths: {words}.", commands=_commands(runs),
            paint=partial(_paint_needles, cells=cells, order=order, lengths=lengths),
            size=(WIDTH, 0.7 + lines * (0.7 + 0.36 * len(order))),
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


# -- latency -----------------------------------------------------------------------------------------------------------


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


def _latency(found: Collection) -> list[Chart]:
    title = "Where the time goes"
    if not found.runs:
        return [_nothing("latency", title, found)]
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
            {**_base(run, names[id(run)]), **split, "tpot_p50_s": run.metrics["tpot_s"]["p50"],
             **{key: run.metrics[key] for key in ("mode", "mode_reason", "floor_s", "floor_ratio")},
             "device_tpot_p50_s": run.metrics["device_tpot_s"]["p50"],
             "published_s": bar.seconds(run.config["context_length"]) if (bar := _bar(run)) else None,
             "device": run.environment.get("device_name"), "threads": run.environment.get("threads")}
            for run, split in splits
        ]  # fmt: skip
        words = "; ".join(
            f"{names[id(run)]} at {run.config['context_length']} tokens: " + ", ".join(
                f"{PARTS[key]} " + (f"{value:.2f} s" if key in ("prefill_s", "index_s") else f"{1000 * value:.1f} ms")
                for key, value in split.items() if value is not None)
            for run, split in splits
        )  # fmt: skip
        chart = Chart(
            "latency" if not place else f"latency-{place + 1}",
            _title(title, (model, task, question), groups),
            "Left: time to first token, prefill and index construction, means over the examples. Right: a decoding "
            "step of the probed examples' undisturbed generation, split by the latency probe; other is the rest of the "
            "step: the model's own layers. The tick is the median step of all examples.",
            rows, words + ".", commands=_commands(ordered),
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
            chart.remedy = _commands_with(lack, ("latency",))
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
    _legend(figure, (first, step))


# -- recall over the decoding steps ------------------------------------------------------------------------------------


def _steps(found: Collection) -> list[Chart]:
    title = "Recall over the decoding steps"
    curves = {id(run): curve for run in found.runs if (curve := _curve(run))}
    have = [run for run in found.runs if id(run) in curves]
    lack = [run for run in found.runs if id(run) not in curves and run.policy != BASELINE]
    if not have:
        return [_nothing("recall-steps", title, found, NO_RECALL, lack, probes=())]  # fmt: skip
    groups = found.settings(have)
    result = []
    for suffix, settings in _parts(groups):
        shown = {setting: groups[setting] for setting in settings}
        rows, words = [], []
        for setting, runs in shown.items():
            names = labels(runs)
            for run in runs:
                rows += [{**_base(run, names[id(run)]), "step": step, "recall_at_k": value, "examples": count}
                         for step, value, count in curves[id(run)]]  # fmt: skip
            words.append(f"{setting_text(setting, found)}: " + "; ".join(
                f"{names[id(run)]} {_percent(curves[id(run)][0][1])} at the first step, "
                f"{_percent(curves[id(run)][-1][1])} at step {curves[id(run)][-1][0]}"
                for run in runs) + ".")  # fmt: skip
        chart = Chart(
            f"recall-steps{suffix}", title,
            "Recall@k at each decoding step, averaged over layers, heads and the probed examples that came so far."
            + (f" Beyond {MOST_STEPS} steps, means of as many windows." if any(len(curves[id(run)]) > MOST_STEPS
               for runs in shown.values() for run in runs) else ""),
            rows, " ".join(words), commands=_commands(run for part in shown.values() for run in part),
            paint=partial(_paint_steps, groups=shown, curves=curves, found=found),
            size=(WIDTH, 0.7 + 2.1 * len(settings)),
        )  # fmt: skip
        if lack:
            chart.missing = f"{len(lack)} of {len(found.runs)} runs have no trace of recall and are left out."
            chart.remedy = _commands_with(lack, ())
        result.append(chart)
    return result


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

    styles = _styles(found.runs)
    grid = figure.subplots(len(groups), 1, squeeze=False)
    for axis, (setting, runs) in zip(grid.flat, groups.items(), strict=True):
        names = labels(runs)
        several = len({run.policy for run in runs}) < len(runs)
        for place, run in enumerate(runs):
            points = np.array([(step, 100 * value) for step, value, _ in curves[id(run)]])
            if len(points) > MOST_STEPS:
                points = np.array([part.mean(0) for part in np.array_split(points, MOST_STEPS)])
            look = figures.style(place) if several else styles[run.policy]
            axis.plot(
                points[:, 0], points[:, 1], color=look.color, linestyle=look.dashes, marker=look.marker, markersize=4,
                markevery=max(1, len(points) // 12), label=names[id(run)],
            )  # fmt: skip
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(-4, 104)
        axis.set_ylabel("recall@k (%)")
        axis.set_title(setting_text(setting, found), loc="left")
        if several:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    grid.flat[-1].set_xlabel("decoding step (tokens after the prompt)")
    if not any(axis.get_legend() for axis in grid.flat):
        _legend(figure, grid.flat)


# -- Mahalanobis distances ---------------------------------------------------------------------------------------------

_OOD = {
    "keys_median": "keys, held out", "queries_median": "the prompt's queries",
    "decode_to_keys_median": "decoding queries",
}  # fmt: skip


def _ood(found: Collection) -> list[Chart]:
    title = "How far queries lie from keys"
    analyses = [one for one in found.analyses if one.name == "ood" and any(not row.get("missing") for row in one.rows)]
    if not analyses:
        model = found.runs[0].config["model"] if found.runs else "MODEL"
        return [Chart(
            "ood", title, "", missing="No folder here holds Mahalanobis distances.",
            remedy=[f"kvbench capture --model {model} --output capture",
                    "kvbench analyze ood --capture capture --output ood"],
        )]  # fmt: skip
    result = []
    for place, one in enumerate(analyses):
        rows = [row for row in one.rows if not row.get("missing")]
        left_out = len(one.rows) - len(rows)
        middle = {key: median(row[key] for row in rows) for key in _OOD}
        source = one.title
        result.append(Chart(
            "ood" if not place else f"ood-{place + 1}", title if len(analyses) == 1 else f"{title}: {source}",
            f"{source}. Mahalanobis distances from the prompt's keys, medians over the vectors of a head; line: median "
            "of the heads, band: their range. Keys from the same distribution lie at about √d.",
            one.rows, "Medians over layers and heads: " + ", ".join(
                f"{name} {middle[key]:.1f}" for key, name in _OOD.items()) + ".",
            missing=f"Partial: {left_out} of {len(one.rows)} heads have no covariance." if left_out else "",
            commands=[analyze_command("ood", one.source, one.options, one.path)],
            paint=partial(_paint_ood, rows=rows),
        ))  # fmt: skip
    return result


def _paint_ood(figure: FigureBase, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - slow

    axis = figure.subplots()
    layers = sorted({row["layer"] for row in rows})
    for place, (key, name) in enumerate(_OOD.items()):
        groups = [[row[key] for row in rows if row["layer"] == layer] for layer in layers]
        look = figures.style(place)
        axis.plot(layers, [median(group) for group in groups], color=look.color, marker=look.marker,
                  linestyle=look.dashes, label=name)  # fmt: skip
        axis.fill_between(layers, [min(group) for group in groups], [max(group) for group in groups],
                          color=look.color, alpha=0.15, linewidth=0)  # fmt: skip
    axis.axhline(rows[0]["dimension"] ** 0.5, color=figures.REFERENCE, linewidth=0.8, linestyle=(0, (1, 1)), label="√d")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer")
    axis.set_ylabel("Mahalanobis distance (σ)")
    _legend(figure, [axis])


# -- other analyses ----------------------------------------------------------------------------------------------------


def _analyses(found: Collection) -> list[Chart]:
    """The figures that `kvbench analyze` drew, as they are."""
    result: list[Chart] = []
    for one in found.analyses:
        picture = one.path / f"{one.name}.png"
        if one.name == "ood" or not (picture.is_file() and picture.with_suffix(".svg").is_file()):
            continue
        shown = [{key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
                 for row in one.summary[:40]]  # fmt: skip
        words = "; ".join(", ".join(f"{key} {value}" for key, value in row.items()) for row in shown).replace("_", " ")
        result.append(Chart(
            f"analysis-{len(result) + 1}", f"Analysis {one.name}: {one.title}",
            f"As `kvbench analyze {one.name}` drew it, from {len(one.rows)} rows.", one.rows,
            f"{words or f'{len(one.rows)} rows of numbers, in the CSV'}.",
            missing=f"Partial: {'; '.join(one.partial)}." if one.partial else "",
            commands=[analyze_command(one.name, one.source, one.options, one.path)],
            paint=partial(_paint_picture, file=picture), picture=picture, size=(WIDTH, WIDTH * _ratio(picture)),
        ))  # fmt: skip
    return result


def _ratio(picture: Path) -> float:
    """Height over width, from the PNG's header."""
    header = picture.read_bytes()[16:24]
    return int.from_bytes(header[4:], "big") / max(int.from_bytes(header[:4], "big"), 1)


def _paint_picture(figure: FigureBase, file: Path) -> None:
    from matplotlib.image import imread  # noqa: PLC0415 - slow

    axis = figure.subplots()
    axis.imshow(imread(file))
    axis.set_axis_off()


# -- what is missing ---------------------------------------------------------------------------------------------------


def _not_baseline(found: Collection) -> ReportRun | None:
    return next((run for run in found.runs if run.policy != BASELINE), found.runs[0] if found.runs else None)


def _commands_with(runs: Sequence[ReportRun], probes: Sequence[str]) -> list[str]:
    configs = [{**run.config, "probe_examples": max(1, run.config["probe_examples"])} for run in runs]
    return list(dict.fromkeys(
        run_command(config, run.path.parent, probes=probes) for config, run in zip(configs, runs, strict=True)
    ))  # fmt: skip


def _nothing(
    name: str, title: str, found: Collection, what: str = "", lack: Sequence[ReportRun] = (),
    probes: Sequence[str] = (),
) -> Chart:  # fmt: skip
    if not found.runs:
        return Chart(name, title, "", missing="There is no run here.", remedy=["kvbench run --policy retrieval"])
    return Chart(name, title, "", missing=f"None of the runs here {what}.", remedy=_commands_with(lack, probes))
