"""Holds a finished run to its files: every score is computed again from its answer, every metric from the examples."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import read_json
from kvbench.contract.task import Example, ForcedTask
from kvbench.plugins import registry
from kvbench.runs.config import RunConfig
from kvbench.runs.contents import UNHASHED, contents, hashes
from kvbench.runs.redraw import Drawer
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


def verify(root: Path, *, redraw: bool = False, closed: bool = False) -> list[Verification]:
    """Verify all runs at or below a folder; raises KVBenchError where there is none.

    With `redraw` their tasks make the examples again, and the references and prompts' lengths must be the same. A
    `closed` folder holds nothing but runs and files README.md: whatever else is there comes first, as a fault of the
    folder itself.
    """
    drawer = Drawer() if redraw else None
    folders = find_runs(root)
    found = [_verify(path, drawer) for path in folders]
    if closed and (strangers := _strangers(root, folders)):
        found.insert(0, Verification(root, 0, 0, strangers))
    return found


def _strangers(root: Path, folders: Sequence[Path]) -> list[str]:
    inside = [folder.relative_to(root).as_posix() for folder in folders]
    return [
        f"{name} belongs to no run"
        for name in contents(root)
        if (Path(name).name != "README.md" or (root / name).is_symlink())
        and not any(place == "." or name.startswith(f"{place}/") for place in inside)
    ]


def _verify(path: Path, drawer: Drawer | None) -> Verification:
    of_files, notes = _files(path)
    faults: list[str] = []
    try:
        found, rows = read(path), finished_rows(path)
        config = RunConfig.model_validate(found["config"])
        scores = _scores(config, rows)
        if drawer is not None:
            faults += _redrawn(config, rows, drawer)
    except KVBenchError as error:
        return Verification(path, 0, 0, [str(error), *of_files], notes)
    if path.resolve().name != config.folder:
        faults.append(f"the configuration belongs to a folder {config.folder}: it was changed, or the folder renamed")
    if found["status"] != "complete":
        faults.append(f"the run is {found['status']}, not complete")
    if len(rows) != config.examples:
        faults.append(f"it holds {len(rows)} examples and was asked for {config.examples}")
    if isinstance(scores, str):
        notes, count = [*notes, f"scores were not computed again: {scores}"], 0
    else:
        count = len(scores)
        for row, values in zip(rows, scores, strict=True):
            stated = {**row.get("scores", {}), "score": row["score"]}
            faults += [
                f"example {row['id']} states a {name} of {_told(value)}, and its answer has {_told(values.get(name))}"
                for name, value in stated.items() if name not in values or not _close(value, values[name])
            ]  # fmt: skip
        notes += _other_code(config)
    again = json.loads(json.dumps(summarise(rows))) if rows else {}
    faults += [
        f"{name} is {_told(stated)} in run.json, and {_told(value)} by the examples"
        for name, stated, value in _differing(found["metrics"], again)
    ]
    return Verification(path, len(rows), count, faults + of_files, notes)


def _files(path: Path) -> tuple[list[str], list[str]]:
    """Faults and notes of a folder's files, by the hashes that `run.json` records."""
    there = [name for name in contents(path) if name not in UNHASHED]
    faults = [f"{name} is a link" for name in there if (path / name).is_symlink()]
    try:
        recorded = read_json(path / "run.json").get("files")
        now = hashes(path)
    except (OSError, ValueError, AttributeError, KVBenchError):
        return faults, []  # whoever reads the run tells it
    if not isinstance(recorded, dict):
        known = ("examples.jsonl", "timings.jsonl")
        foreign = [
            name for name in now if name not in known and not re.fullmatch(r"traces/[0-9]{6}\.safetensors", name)
        ]
        notes = [
            "an older kvbench made it, which recorded no hashes: a changed answer of the same score is not noticed"
        ]
        return faults + [f"{name} is no file of a run" for name in foreign], notes
    faults += [f"{name} is missing" for name in recorded if name not in now]
    faults += [f"{name} is no file of this run" for name in now if name not in recorded]
    changed = [name for name in now if name in recorded and recorded[name] != now[name]]
    return faults + [f"{name} was changed after the run: its hash is another" for name in changed], []


def _redrawn(config: RunConfig, rows: list[dict[str, Any]], drawer: Drawer) -> Iterator[str]:
    """What a run's examples have that those its task makes have not."""
    drawn = {one.id: one for one in drawer.draw(config)}
    for row in rows:
        one = drawn.get(row["id"])
        if one is None:
            yield f"example {row['id']} is none of task '{config.task}' with seed {config.seed}"
        elif one.references is not None and list(one.references) != row["references"]:
            yield f"example {row['id']} states the references {row['references']}, and its task {list(one.references)}"
        elif one.prompt_tokens != row["prompt_tokens"]:
            yield f"example {row['id']} states {row['prompt_tokens']} prompt tokens, and its task {one.prompt_tokens}"


def _other_code(config: RunConfig) -> list[str]:
    """A note where the task that computed the scores again is not the code that made the run."""
    before = config.plugins.get("task")
    here = registry().identity("task", config.task)
    return [] if before in (None, here) else [f"scores are those of the task here, {here}; the run's was {before}"]


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
