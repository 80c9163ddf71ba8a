"""All that the report says, in whatever format it is rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from kvbench.compare.candidates import Limits
from kvbench.report.board import Board, flat, leaderboard
from kvbench.report.charts import Chart, model_text, percent, setting_text
from kvbench.report.collect import Collection, ReportRun, labels
from kvbench.report.commands import analyze_command, run_command
from kvbench.report.decision import Decision, decision
from kvbench.report.glance import glance
from kvbench.report.viewer import examples_of
from kvbench.report.words import anchor_of, count, device_text, mark_texts, unmarked


@dataclass
class Content:
    """All that any format shows."""

    title: str
    subtitle: str
    glance: list[tuple[str, str]]
    """Sentences, and the command that would mend what one names, or nothing."""
    problems: list[str]
    decision: Decision
    board: Board
    examples: list[dict[str, Any]]
    """By setting, for the viewer of examples."""
    charts: list[Chart]
    runs: list[dict[str, Any]]
    analyses: list[dict[str, str]]
    command: str
    version: str = field(default_factory=lambda: version("kvbench"))


def compose(found: Collection, charts: Sequence[Chart], command: str, limits: Limits | None = None) -> Content:
    """Put the report's texts together."""
    names: dict[int, str] = {}
    for runs in found.settings().values():
        names |= labels(runs)
    return Content(
        title=_heading(found), subtitle=_subtitle(found), glance=glance(found), problems=found.problems,
        decision=decision(found, limits), board=leaderboard(found), examples=examples_of(found), charts=list(charts),
        runs=[_run(run, found, names, place) for place, run in enumerate(found.runs)],
        analyses=[
            {"title": f"Analysis {one.name}: {one.title}",
             "command": analyze_command(one.name, one.source, one.options, one.path)} for one in found.analyses
        ], command=command,
    )  # fmt: skip


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
    devices = sorted({device_text(run) for run in found.runs})
    return f"{text}; measured on {'; '.join(devices)}."


def _run(run: ReportRun, found: Collection, names: Mapping[int, str], place: int) -> dict[str, Any]:
    facts = {"folder": str(run.path), "status": run.status, "examples finished": len(run.rows)}
    if run.metrics.get("probe_overhead") is not None:
        facts["probes lengthen a step by"] = percent(run.metrics["probe_overhead"])
    return {
        "title": f"{unmarked(names[id(run)], run)}: {setting_text(run.setting, found)}",
        "anchor": anchor_of(place), "marks": mark_texts(run), "command": run_command(run.config, run.path.parent),
        "tables": [
            {"title": "Run", "rows": list(facts.items())},
            {"title": "Configuration", "rows": [(key, _value(value)) for key, value in flat(run.config)]},
            {"title": "Environment", "rows": [(key, _value(value)) for key, value in flat(run.environment)]},
        ],
    }  # fmt: skip


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    return "none" if value is None or value == {} else str(value)
