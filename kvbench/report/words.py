"""How the report words numbers, runs and devices."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.report.collect import Collection, ReportRun

ALPHA = 0.05
"""Adjusted p-values below it tell policies apart."""


def count(number: object, one: str, more: str = "") -> str:
    """A number of things."""
    return f"1 {one}" if number == 1 else f"{number} {more or one + 's'}"


def some(texts: Sequence[str], between: str = ", ", most: int = 12) -> str:
    """Texts in a row; of many the first ones, and how many more."""
    return between.join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def points(value: float) -> str:
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


def unmarked(name: str, run: ReportRun) -> str:
    """A run's name without its marks, which stand beside it."""
    return name.removesuffix("".join(f" ({mark})" for mark in run.marks))


def anchor(run: ReportRun, found: Collection) -> str:
    """The run's place in the page."""
    return anchor_of(found.runs.index(run))


def anchor_of(place: int) -> str:
    """The place in the page of the run at a place of the collection."""
    return f"run-{place + 1}"


def device_text(run: ReportRun) -> str:
    """What a run was measured on."""
    found = run.environment
    threads = found.get("threads", "?")
    return f"{found.get('device_name', 'unknown device')}, {count(threads, 'thread')}, {run.config['dtype']}"
