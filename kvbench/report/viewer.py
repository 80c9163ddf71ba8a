"""The examples behind the numbers: prompt, references, and the answer of every policy beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvbench.report.charts import setting_text
from kvbench.report.collect import BASELINE, Collection, ReportRun, labels

MOST_EXAMPLES = 40
"""Examples of a setting in the page; those that tell policies apart come first."""
MOST_CHARACTERS = 1200
"""Of an answer or a reference."""
MOST_ANSWERS = 60_000
"""Answers in the page."""


def examples_of(found: Collection) -> list[dict[str, Any]]:
    """By setting: the names of its runs and its examples, with a score and an answer of each run that has it."""
    groups = found.settings()
    room = MOST_ANSWERS // max(len(groups), 1)
    return [_setting(setting_text(setting, found), runs, room) for setting, runs in groups.items()]


def _setting(title: str, runs: Sequence[ReportRun], room: int) -> dict[str, Any]:
    names = labels(runs)
    ordered = sorted(runs, key=lambda run: (run.policy != BASELINE, names[id(run)]))
    by_example: dict[tuple[int, str], dict[int, Mapping[str, Any]]] = {}
    for place, run in enumerate(ordered):
        for row in run.rows:
            by_example.setdefault((run.config["seed"], row["id"]), {})[place] = row
    most = max(1, min(MOST_EXAMPLES, room // max(len(ordered), 1)))

    def telling(rows: Mapping[int, Mapping[str, Any]]) -> float:
        scores = [row["score"] for row in rows.values()]
        return float(max(scores) - min(scores))

    chosen = sorted(by_example.items(), key=lambda one: -telling(one[1]))[:most]
    return {
        "title": title,
        "runs": [names[id(run)] for run in ordered],
        "left_out": len(by_example) - len(chosen),
        "examples": [_example(name, rows) for (_, name), rows in chosen],
    }


def _example(name: str, rows: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    first = next(iter(rows.values()))
    prompt = next((row["prompt"] for row in rows.values() if row.get("prompt")), "")
    info = {**{"needle": (first.get("info") or {}).get("needle")}, **(first.get("info") or {})}
    return {
        "id": name,
        "prompt": prompt,
        "references": [_cut(text) for text in first.get("references", ())],
        "info": "; ".join(f"{key} {value}" for key, value in info.items() if value is not None),
        "answers": [[place, row["score"], _cut(row.get("prediction", ""))] for place, row in rows.items()],
    }


def _cut(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"{text[:MOST_CHARACTERS]} … ({more} more characters)"
