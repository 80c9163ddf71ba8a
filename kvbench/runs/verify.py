"""Holds a finished run to its files: every score is computed again from its answer, every metric from the examples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench.contract.errors import KVBenchError
from kvbench.contract.task import Example, ForcedTask
from kvbench.plugins import registry
from kvbench.runs.config import RunConfig
from kvbench.runs.results import find_runs, finished_rows, read, summarise

CLOSE = 1e-9
"""Relative difference up to which two computations of a number are the same."""


@dataclass(frozen=True)
class Verification:
    """What holds of a run, and what does not, in sentences; `scores` were computed again, of `examples`."""

    path: Path
    examples: int
    scores: int
    faults: list[str]
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """As an element of the `--json` document's `runs`."""
        return {
            "folder": str(self.path), "examples": self.examples, "scores": self.scores, "faults": self.faults,
            "notes": self.notes,
        }  # fmt: skip


def verify(root: Path) -> list[Verification]:
    """Verify all runs at or below a folder; raises KVBenchError where there is none."""
    return [_verify(path) for path in find_runs(root)]


def _verify(path: Path) -> Verification:
    try:
        found, rows = read(path), finished_rows(path)
        config = RunConfig.model_validate(found["config"])
        scores = _scores(config, rows)
    except KVBenchError as error:
        return Verification(path, 0, 0, [str(error)])
    faults = []
    if path.name != config.folder:
        faults.append(f"the configuration belongs to a folder {config.folder}: it was changed, or the folder renamed")
    if found["status"] != "complete":
        faults.append(f"the run is {found['status']}, not complete")
    if len(rows) != config.examples:
        faults.append(f"it holds {len(rows)} examples and was asked for {config.examples}")
    if isinstance(scores, str):
        notes, count = [f"scores were not computed again: {scores}"], 0
    else:
        notes, count = [], len(scores)
        for row, values in zip(rows, scores, strict=True):
            stated = {**row.get("scores", {}), "score": row["score"]}
            faults += [
                f"example {row['id']} states a {name} of {_told(value)}, and its answer has {_told(values.get(name))}"
                for name, value in stated.items() if name not in values or not _close(value, values[name])
            ]  # fmt: skip
    again = json.loads(json.dumps(summarise(rows))) if rows else {}
    faults += [
        f"{name} is {_told(stated)} in run.json, and {_told(value)} by the examples"
        for name, stated, value in _differing(found["metrics"], again)
    ]
    return Verification(path, len(rows), count, faults, notes)


def _scores(config: RunConfig, rows: list[dict[str, Any]]) -> list[dict[str, float]] | str:
    """Every example's score, and what its task measures besides, from its answer and references; or why not."""
    task = registry().make("task", config.task, config.task_options)
    if isinstance(task, ForcedTask):
        return f"task '{config.task}' scores logits, which are not kept"
    found = []
    for row in rows:
        example = Example(
            row["id"], "", "", "", tuple(row["references"]), row["generated_tokens"], info=row.get("info", {})
        )
        try:
            found.append({**task.measures(row["prediction"], example), "score": task.score(row["prediction"], example)})
        except Exception as error:  # a plugin may raise anything
            raise KVBenchError(
                f"Task '{config.task}' cannot score example {row['id']} ({type(error).__name__}: {error}): install the "
                "version of the task that made the run."
            ) from error
    return found


def _differing(stated: Any, again: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Metrics of `run.json` that the examples do not give, by dotted name; those that only a newer version has pass."""
    if isinstance(stated, Mapping) and isinstance(again, Mapping):
        for key, value in stated.items():
            yield from _differing(value, again.get(key), f"{name}.{key}" if name else key)
    elif isinstance(stated, list) and isinstance(again, list) and len(stated) == len(again):
        for place, (one, other) in enumerate(zip(stated, again, strict=True)):
            yield from _differing(one, other, f"{name}[{place}]")
    elif not (stated == again or (_number(stated) and _number(again) and _close(stated, again))):
        yield name, stated, again


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=CLOSE, abs_tol=CLOSE)


def _told(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if _number(value) else str(value)
