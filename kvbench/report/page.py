"""The report as texts: what the page and the Markdown document say, rendered by jinja2."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kvbench import spreadsheet
from kvbench.report.charts import MIB, Chart, Row, model_text, setting_text
from kvbench.report.collect import BASELINE, Collection, ReportRun, budget_text, labels
from kvbench.report.commands import analyze_command, run_command
from kvbench.runs.timing import mode_text

NEAR_ZERO = 0.05
"""Accuracy of exact attention below which a task cannot tell policies apart."""
ALPHA = 0.05


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


@dataclass
class Board:
    """The leaderboard: columns, rows, caption."""

    columns: list[Column]
    rows: list[dict[str, Any]]
    caption: str
    csv: str = ""


@dataclass
class Content:
    """All that any format shows."""

    title: str
    subtitle: str
    glance: list[tuple[str, str]]
    """Sentences, and the command that would mend what one names, or nothing."""
    problems: list[str]
    board: Board
    charts: list[Chart]
    runs: list[dict[str, Any]]
    analyses: list[dict[str, str]]
    command: str
    version: str = field(default_factory=lambda: version("kvbench"))


def compose(found: Collection, charts: Sequence[Chart], command: str) -> Content:
    """Put the report's texts together."""
    return Content(
        title=_heading(found), subtitle=_subtitle(found), glance=_glance(found), problems=found.problems,
        board=_board(found), charts=list(charts), runs=[_run(run, found) for run in found.runs],
        analyses=[
            {"title": f"Analysis {one.name}: {one.title}",
             "command": analyze_command(one.name, one.source, one.options, one.path)} for one in found.analyses
        ], command=command,
    )  # fmt: skip


# -- texts -------------------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """A fraction in percent."""
    return "–" if value is None else f"{100 * value:.1f}%"


def count(number: object, one: str, more: str = "") -> str:
    """A number of things."""
    return f"1 {one}" if number == 1 else f"{number} {more or one + 's'}"


def _points(value: float) -> str:
    """A difference of fractions in percentage points."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def partial_text(run: ReportRun) -> str:
    """How much of a partial run there is; empty for a complete one."""
    return f"{len(run.rows)} of {run.config['examples']} examples, {run.status}" if run.partial else ""


def mark_texts(run: ReportRun) -> list[str]:
    """What marks a run wherever it is named: that it is partial, or over its budget."""
    return [
        *([f"partial: {partial_text(run)}"] if run.partial else []),
        *([run.over_budget] if run.over_budget else []),
    ]


def _unmarked(name: str, run: ReportRun) -> str:
    """A run's name without its marks, which stand beside it."""
    return name.removesuffix("".join(f" ({mark})" for mark in run.marks))


def anchor(run: ReportRun, found: Collection) -> str:
    """The run's place in the page."""
    return f"run-{found.runs.index(run) + 1}"


def _heading(found: Collection) -> str:
    models = sorted({model_text(run.config["model"]) for run in found.runs})
    if not models:
        return "KV-cache analyses"
    return f"KV-cache policies on {', '.join(models)}"


def _subtitle(found: Collection) -> str:
    if not found.runs:
        return f"{count(len(found.analyses), 'analysis', 'analyses')}."
    partial = sum(run.partial for run in found.runs)
    tasks = sorted({run.config["task"] for run in found.runs})
    lengths = sorted({run.config["context_length"] for run in found.runs})
    text = count(len(found.runs), "run") + (f" ({partial} partial)" if partial else "")
    text += f" of {', '.join(tasks)} at {', '.join(map(str, lengths))} tokens"
    devices = sorted({_device(run) for run in found.runs})
    return f"{text}; measured on {'; '.join(devices)}."


def _device(run: ReportRun) -> str:
    found = run.environment
    threads = found.get("threads", "?")
    return f"{found.get('device_name', 'unknown device')}, {count(threads, 'thread')}, {run.config['dtype']}"


def _glance(found: Collection) -> list[tuple[str, str]]:
    """What a person should know before reading the table, in sentences, some with a command."""
    lines: list[tuple[str, str]] = []
    for setting, runs in found.settings().items():
        where = setting_text(setting, found)
        names = labels(runs)
        baselines = [run for run in runs if run.policy == BASELINE]
        compared = [run for run in runs if run.paired is not None]
        alone = [run for run in runs if run.paired is None and run.policy != BASELINE]
        if baselines:
            scores = [
                f"{names[id(run)]} scores {percent(run.accuracy)} on {count(len(run.rows), 'example')}"
                for run in baselines
            ]
            text = f"{where}: {'; '.join(scores)}."
            if min(run.accuracy for run in baselines) < NEAR_ZERO:
                text += " That is next to nothing: this task cannot tell policies apart on this model."
            worse: list[str] = []
            better: list[str] = []
            same: list[str] = []
            for run in compared:
                assert run.paired is not None
                assert run.p_adjusted is not None
                change = f"{names[id(run)]} ({_points(run.paired.difference)} points)"
                if run.p_adjusted >= ALPHA:
                    same.append(change)
                else:
                    (worse if run.paired.difference < 0 else better).append(change)
            for group, what in ((worse, "Worse"), (better, "Better"), (same, "Not told apart from it")):
                if group:
                    text += f" {what}: {', '.join(group)}."
            few = [run.paired.n for run in compared if run.paired and run.paired.test == "mcnemar"]
            if few and max(few) < 6:
                text += f" {count(max(few), 'example')} cannot tell any difference: McNemar's test needs 6 at least."
            lines.append((text, ""))
        cut = {names[id(run)]: run.metrics["truncated_examples"] for run in runs}
        if any(cut.values()):
            which = ", ".join(f"{examples} of {name}" for name, examples in cut.items() if examples)
            lines.append((f"{where}: examples whose text was cut to fit the context: {which}.", ""))
        over = [f"{_unmarked(names[id(run)], run)} ({run.over_budget})" for run in runs if run.over_budget]
        if over:
            lines.append((f"{where}: not on the same budget as the others: {', '.join(over)}.", ""))
        if any(run.metrics.get("prefix_left_out_examples") for run in runs):
            lines.append((f"{where}: no answer prefix was given, since the chat template opens a thinking block.", ""))
        if alone:
            which = ", ".join(names[id(run)] for run in alone)
            command = run_command({**alone[0].config, "policy": BASELINE, "policy_options": {}, "budget": None},
                                  alone[0].path.parent)  # fmt: skip
            lines.append((
                f"{where}: there is no {BASELINE} run on the same examples as {which}, so their differences are not "
                "known. Run it with:", command,
            ))  # fmt: skip
    overheads = [run.metrics["probe_overhead"] for run in found.runs if run.metrics.get("probe_overhead") is not None]
    if overheads:
        low, high = (f"{100 * value:+.0f}%".replace("-", "−") for value in (min(overheads), max(overheads)))
        lines.append((
            f"Probes changed the time of a decoding step by {low if low == high else f'{low} to {high}'}; the times "
            "and bytes shown are of generations without them.", "",
        ))  # fmt: skip
    devices = {f"{_device(run)}, batch {run.config['batch_size']}" for run in found.runs}
    versions = {str(sorted(run.environment.get("packages", {}).items())) for run in found.runs}
    if len(devices) > 1 or len(versions) > 1:
        what = " and ".join(
            text for many, text in ((len(devices) > 1, "devices, threads, number types or batch size"),
                                    (len(versions) > 1, "package versions")) if many
        )  # fmt: skip
        lines.append((f"The runs differ in {what}: compare times only between runs that agree in them.", ""))
    return lines


# -- leaderboard -------------------------------------------------------------------------------------------------------


def _board(found: Collection) -> Board:
    names: dict[int, str] = {}
    for runs in found.settings().values():
        names |= labels(runs, apart=("seed", "budget", "examples"))
    columns = _columns(found, names)
    rows = [
        {"cells": [column.cell(run) for column in columns], "anchor": anchor(run, found), "marks": mark_texts(run),
         "baseline": run.policy == BASELINE}
        for run in found.runs
    ]  # fmt: skip
    caption = (
        f"One row for each run. Differences are from {BASELINE} on the same examples, with 95% intervals; p-values are "
        "adjusted for all comparisons of the table (Holm)."
    )
    return Board(columns, rows, caption)


def _number(value: float | None, text: str, **more: str) -> Cell:
    return Cell("–") if value is None else Cell(text, value, **more)


def _columns(found: Collection, names: Mapping[int, str]) -> list[Column]:
    def config(key: str, title: str, help_text: str, kind: str = "text") -> Column:
        return Column(key, title, help_text, lambda run: Cell(str(run.config[key]), run.config[key]), kind, "ascending")

    def metric(key: str, title: str, help_text: str, show: Callable[[float], str], first: str) -> Column:
        def cell(run: ReportRun) -> Cell:
            value: Any = run.metrics
            for part in key.split("."):
                value = None if value is None else value.get(part)
            return Cell("–") if value is None else Cell(show(value), value)

        return Column(key, title, help_text, cell, "number", first)

    def several(key: str) -> bool:
        return len({run.config[key] for run in found.runs}) > 1

    def mib(value: float) -> str:
        return f"{value / MIB:.1f}" if value >= 10 * MIB or not value else f"{value / MIB:.3g}"

    columns = [Column("policy", "Policy", "Policy and what tells it from others of its name",
                      lambda run: Cell(_unmarked(names[id(run)], run), names[id(run)]), "text",
                      "ascending")]  # fmt: skip
    columns.append(Column(
        "budget", "Budget", "Size and allocator asked for",
        lambda run: Cell(budget_text(run.config["budget"]), budget_text(run.config["budget"])), "text", "ascending",
    ))  # fmt: skip
    if several("model"):
        columns.append(Column("model", "Model", "Model", lambda run: Cell(
            model_text(run.config["model"]), run.config["model"]), "text", "ascending"))  # fmt: skip
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
        metric("recall_at_k", "Recall@k", "Share of the exact top k attended", percent, "descending"),
        metric("recovered_mass", "Recovered mass", "Exact attention's weight on the attended tokens", percent,
               "descending"),
        metric("scanned_fraction", "Keys scanned", "Distance evaluations over indexed keys", percent, "ascending"),
        metric("density", "Density", "Attended tokens over context tokens", percent, "ascending"),
        Column("total_bytes", "Bytes, MiB", "All tiers and index", lambda run: Cell(
            mib(run.total_bytes), run.total_bytes), first="ascending"),
        metric("bytes.resident", "On device, MiB", "Bytes on the model's device", mib, "ascending"),
        metric("bytes.offloaded", "Offloaded, MiB", "Bytes in the host's memory", mib, "ascending"),
        metric("bytes.index", "Index, MiB", "Bytes of the policy's structures", mib, "ascending"),
        metric("ttft_s.total", "TTFT, s", "Time to first token: prefill and index construction", "{:.2f}".format,
               "ascending"),
        metric("ttft_s.index", "Index construction, s", "The part of TTFT in the policy", "{:.2f}".format, "ascending"),
        metric("tpot_s.p50", "TPOT p50, ms", "Median time per output token", lambda v: f"{1000 * v:.1f}", "ascending"),
        metric("tpot_s.p95", "TPOT p95, ms", "95th percentile", lambda v: f"{1000 * v:.1f}", "ascending"),
        Column("mode", "Steps", "How they ran: one CUDA graph (graph), the same code uncaptured (fixed), hook by hook "
               "(eager), and why not captured",
               lambda run: Cell(run.metrics.get("mode") or "–", mode_text(run.metrics),
                                run.metrics.get("mode_reason") or ""), "text", "ascending"),
        metric("floor_ratio", "Times the floor", "Median step over the time that the bytes it must read take",
               "{:.2f}".format, "ascending"),
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
    detail = f"{_points(low)} to {_points(high)}, n = {run.paired.n}"
    return Cell(_points(run.paired.difference), run.paired.difference, detail, mark)


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
        row |= dict(_flat(run.metrics, skip=("accuracy", "over_budget")))
        row["over_budget"] = run.over_budget
        rows.append({**row, "run": str(run.path)})
    return rows


def _flat(values: Mapping[str, Any], prefix: str = "", skip: Sequence[str] = ()) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if key in skip:
            continue
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _run(run: ReportRun, found: Collection) -> dict[str, Any]:
    names = labels(found.settings()[run.setting])
    facts = {"folder": str(run.path), "status": run.status, "examples finished": len(run.rows)}
    if run.metrics.get("probe_overhead") is not None:
        facts["probes lengthen a step by"] = percent(run.metrics["probe_overhead"])
    return {
        "title": f"{_unmarked(names[id(run)], run)}: {setting_text(run.setting, found)}",
        "anchor": anchor(run, found), "marks": mark_texts(run), "command": run_command(run.config, run.path.parent),
        "tables": [
            {"title": "Run", "rows": list(facts.items())},
            {"title": "Configuration", "rows": [(key, _value(value)) for key, value in _flat(run.config)]},
            {"title": "Environment", "rows": [(key, _value(value)) for key, value in _flat(run.environment)]},
        ],
    }  # fmt: skip


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    return "none" if value is None or value == {} else str(value)


# -- rendering ---------------------------------------------------------------------------------------------------------


def _markdown(text: object) -> str:
    """Escape what Markdown would read as markup, in text and table cells alike."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _environment(*, html: bool) -> Environment:
    found = Environment(
        loader=PackageLoader("kvbench.report"), autoescape=html,  # noqa: S701 - Markdown has escapes of its own
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters["md"] = _markdown
    return found


def html(content: Content, folder: Path) -> str:
    """The page, self-contained: style, script, figures and data are inside it. `folder` holds the drawn figures."""
    template = _environment(html=True).get_template("page.html.j2")
    parts = files("kvbench.report") / "templates"
    script = (parts / "page.js").read_text(encoding="utf-8")
    content.board.csv = _data("text/csv", _read(folder / "leaderboard.csv")) if content.board.rows else ""
    shown = [
        {
            **{name: getattr(chart, name) for name in ("name", "title", "caption", "summary", "missing", "remedy",
                                                       "commands")},
            "svg": _shown(chart, folder / f"{chart.name}.svg") if chart.paint else "",
            "csv": _data("text/csv", _read(folder / f"{chart.name}.csv")) if chart.paint else "",
        }
        for chart in content.charts
    ]  # fmt: skip
    # The script's hash is the only script that the page's policy lets run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render({
        **vars(content), "charts": shown, "script_hash": digest,
        "script": Markup(script),  # noqa: S704 - a file of this package
        "css": Markup((parts / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - a file of this package
    })  # fmt: skip


def markdown(content: Content) -> str:
    """The same as Markdown, with the figures beside it in `figures/`."""
    template = _environment(html=False).get_template("page.md.j2")
    shown = [{**vars(chart), "svg": bool(chart.paint)} for chart in content.charts]
    return re.sub(r"\n{3,}", "\n\n", template.render({**vars(content), "charts": shown})).strip() + "\n"


def table(rows: Sequence[Row]) -> str:
    """Rows as CSV."""
    target = io.StringIO()
    spreadsheet.write_table(target, rows, lineterminator="\n")
    return target.getvalue()


def _read(file: Path) -> bytes:
    return file.read_bytes()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _shown(chart: Chart, file: Path) -> Markup:
    """A figure in the page: of the page where this report drew it, else a picture, which cannot reach the page."""
    if chart.picture is None:
        return _inline(chart, file.read_text(encoding="utf-8"))
    return Markup('<img class="chart" alt="{}. {}" src="{}">').format(
        chart.title, chart.summary, _data("image/svg+xml", _read(file))
    )


_INKS = {"#000000": "currentColor", "#ffffff": "var(--paper)", "#dddddd": "var(--grid)", "#555555": "var(--muted)"}


def _inline(chart: Chart, svg: str) -> Markup:
    """A drawn SVG as part of the page: ids of its own, the page's inks, a name and a description for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{chart.name}-", body)
    body = re.sub("|".join(_INKS), lambda ink: _INKS[ink[0]], body)
    title = Markup("<title id='{0}-title'>{1}</title><desc id='{0}-desc'>{2}</desc>").format(
        chart.name, chart.title, chart.summary
    )
    return Markup(  # noqa: S704 - matplotlib escapes the texts that it writes into the SVG
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" class="chart" {box[0]} '
        f'role="img" aria-labelledby="{chart.name}-title {chart.name}-desc">{title}{body}'
    )
