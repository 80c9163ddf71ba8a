"""Run folders: examples appended as they finish, beside the configuration that names the folder and its metrics.

A folder holds `run.json`; `examples.jsonl`, all that the configuration determines: the same bytes however often the run
was stopped and continued; and `timings.jsonl`, the measurements that differ from one execution to the next. A line in
`examples.jsonl` makes an example finished: its timings were forced to the disk before.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import filelock

from kvbench.contract.errors import KVBenchError, unwritable
from kvbench.contract.reading import plain, read_json, reading
from kvbench.identity import differences
from kvbench.runs.config import SCHEMA, RunConfig
from kvbench.runs.contents import hashes
from kvbench.runs.rows import append, fault, finished_lines, line, read_rows, split
from kvbench.runs.stored import StoredRun
from kvbench.runs.summary import over_budget_text, summarise

__all__ = [
    "REPLACED",
    "Run",
    "RunConfig",
    "find_runs",
    "finished_rows",
    "over_budget_text",
    "read",
    "read_rows",
    "replace",
    "summarise",
]


READABLE = (1, 2)
REPLACED = ".replaced"
"""Folder, beside the runs, that holds those which --fresh replaced; nothing reads it."""


class Run:
    """A run's folder, open for writing; `notes` says what a user should know of how it was found."""

    def __init__(self, path: Path, config: RunConfig, environment: dict[str, Any]) -> None:
        """Open or make the folder below `path`; what is already there must belong to this configuration."""
        self.config, self.environment = config, environment
        self.path = path / config.folder
        self.status = "running"
        self.metrics: dict[str, Any] = {}
        self.conformance: list[dict[str, Any]] = []
        """What was proven of the model, and of the policy on it, before the run."""
        self.notes: list[str] = []
        self.chunk: int | None = None
        """Tokens of the prompt computed at a time, where the configuration leaves it to the memory."""
        self.shortages = 0
        """How often memory ran out before, in this stretch."""
        with _disk(self.path):
            new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
        if new:
            self._note_older(path)
        self._take(read_rows(self.path))
        for role, code in config.plugins.items():
            if code.source is None:
                self.notes.append(
                    f"The source of {role} cannot be read, so an edit of it will not be noticed: use --fresh after one."
                )
        if (self.path / "run.json").exists():
            found = read(self.path)
            if found["config"] != config.model_dump(mode="json"):
                raise KVBenchError(
                    f"{self.path} holds another configuration's results: move it away, or use another --output."
                )
            self.status, self.metrics = found["status"], found["metrics"]
            self.conformance = found["conformance"]
            if self.status == "complete" and len(self.rows) != self.metrics["accuracy"]["n"]:
                self.status = "interrupted"
                self.notes.append(
                    f"{self.path} had {self.metrics['accuracy']['n']} examples when it was complete and holds "
                    f"{len(self.rows)} now: the missing ones run again."
                )
            if self.rows and self.status != "complete":
                self._note_changes(found["environment"])

    @property
    def working(self) -> RunConfig:
        """The configuration with the chunk that is in use."""
        if self.config.prefill_chunk != "auto":
            return self.config
        return self.config.model_copy(update={"prefill_chunk": self.chunk})

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder against a second writer, and note in `run.json` how the stretch ended."""
        with ExitStack() as held:
            with _disk(self.path):
                held.enter_context(_locked(self.path))
            self._take(read_rows(self.path))
            self._repair()
            self._write("running")
            try:
                yield
                self.metrics = summarise(self.rows)
            except BaseException as error:
                # A disk that is full for examples is full for this too, and must not hide the first error.
                with suppress(KVBenchError):
                    self._write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
                raise
            self._write("complete")

    def append(self, row: dict[str, Any]) -> None:
        """Add a finished example and force it to the disk, its timings first."""
        if any(row["id"] == other["id"] for other in self.rows):
            raise KVBenchError(
                f"Task '{self.config.task}' gave two examples the id {row['id']}: report it to the task's author."
            )
        wrong = fault(row)
        if wrong is not None:
            raise KVBenchError(f"Example {row['id']} of task '{self.config.task}' was not kept: {wrong}.")
        lasting, timed = split(row)
        lines = {"timings.jsonl": line({"id": row["id"], **timed}), "examples.jsonl": line(lasting)}
        with _disk(self.path):
            for name, content in lines.items():
                append(self.path / name, content)
        self.rows.append(row)

    def _take(self, rows: list[dict[str, Any]]) -> None:
        """Take over finished examples, but for those that older versions wrote with values that are no results."""
        self.rows = []
        for row in rows:
            wrong = fault(row)
            if wrong is None:
                self.rows.append(row)
                continue
            note = f"{self.path} holds example {row['id']} with a value that is no result ({wrong}): it runs again."
            if note not in self.notes:
                self.notes.append(note)

    def _note_older(self, output: Path) -> None:
        """Say where this configuration ran before with other code of its plugins."""
        mine = self.config.model_dump(mode="json", exclude={"plugins"})
        start = self.config.folder.removesuffix(self.config.hash)
        for folder in sorted(output.glob(f"{glob.escape(start)}*/")):
            try:
                found = RunConfig.model_validate(read(folder)["config"])
            except KVBenchError:
                continue
            if found.model_dump(mode="json", exclude={"plugins"}) == mine:
                changed = ", ".join(differences(found.plugins, self.config.plugins)) or "fewer plugins"
                self.notes.append(f"Changed since {folder}, so this run starts anew in {self.path}: {changed}.")

    def document(self) -> dict[str, Any]:
        """The run as one element of the `--json` document's `runs`."""
        config = self.config.model_dump(mode="json")
        return {
            "policy": config["policy"], "budget": config["budget"], "config": config, "environment": self.environment,
            "status": self.status, "metrics": self.metrics, "conformance": self.conformance, "folder": str(self.path),
        }  # fmt: skip

    def _write(self, status: str) -> None:
        self.status = status
        content = {
            "schema": SCHEMA,
            **{k: v for k, v in self.document().items() if k not in ("policy", "budget", "folder")},
            **({"files": hashes(self.path)} if status == "complete" else {}),
        }
        with _disk(self.path):
            temporary = self.path / ".run.json"
            with temporary.open("w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / "run.json")
            _sync_folder(self.path)

    def _repair(self) -> None:
        """Cut what a killed writer left unfinished: half a line, or timings without their example."""
        for name, lines in zip(("timings.jsonl", "examples.jsonl"), finished_lines(self.path), strict=True):
            file = self.path / name
            size, end = file.stat().st_size if file.exists() else 0, sum(one.size for one in lines)
            if size > end:
                with _disk(self.path), file.open("rb+") as writable:
                    writable.truncate(end)
                self.notes.append(
                    f"{file} ended in {size - end} bytes of an example that was never finished; they were cut off, and "
                    "the example runs again."
                )

    def _note_changes(self, before: dict[str, Any]) -> None:
        old, new = ({**now.get("packages", {}), "device": now.get("device_name")} for now in (before, self.environment))
        changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
        if changed:
            self.notes.append(
                f"{self.path} continues {len(self.rows)} examples of another environment ({', '.join(changed)}): move "
                "it away to run all of them in this one."
            )


def read(path: Path) -> dict[str, Any]:
    """Read a `run.json`: config, environment, status, metrics and conformance.

    Refuses what is no run, or a schema version that this kvbench does not know; a configuration of an older version
    gets the defaults of fields that came later.
    """
    file = path / "run.json"
    with reading(lambda reason: f"{file} is no readable run: {reason}. Move the folder away, or use another --output."):
        content = read_json(file)
    if not isinstance(content, dict) or content.get("schema") not in READABLE:
        schema = plain(repr(content.get("schema") if isinstance(content, dict) else type(content).__name__))
        raise KVBenchError(
            f"{file} has schema version {schema}; this kvbench reads versions {', '.join(map(str, READABLE))}: "
            "use a matching kvbench."
        )
    with reading(
        lambda reason: f"{file} is no complete run ({reason}): move the folder away, or use another --output."
    ):
        config = RunConfig.model_validate(content["config"]).model_dump(mode="json")
        kept = {key: content[key] for key in ("environment", "status", "metrics")}
        kept["conformance"] = content.get("conformance", [])  # absent in older runs
        found = StoredRun.model_validate(kept)
        if content["schema"] == SCHEMA and found.status == "complete" and found.metrics.accuracy is None:
            raise ValueError("metrics lacks accuracy")
        return {"config": config, **kept}


def replace(output: Path, config: RunConfig) -> Path | None:
    """Move earlier results of a configuration out of the way, and say where they are; None where there are none.

    Raises KVBenchError while another kvbench writes to them.
    """
    folder = output / config.folder
    if not folder.is_dir():
        return None
    with _disk(folder), _locked(folder):
        place = output / REPLACED
        place.mkdir(exist_ok=True)
        target = next(path for path in (place / f"{folder.name}-{n}" for n in count(1)) if not path.exists())
        folder.rename(target)
    return target


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder against a second writer."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise KVBenchError(f"Another kvbench is writing to {folder}: wait for it, or use another --output.") from None
    try:
        yield
    finally:
        lock.release()


def finished_rows(path: Path) -> list[dict[str, Any]]:
    """As `read_rows`, for those who use an example's values; KVBenchError names an example whose values are not its."""
    rows = read_rows(path)
    for row in rows:
        if (wrong := fault(row)) is not None:
            raise KVBenchError(
                f"{path} holds example {plain(row['id'])} with a value that is no result ({plain(wrong)}): the command "
                "that made the run repairs it."
            )
    return rows


def find_runs(root: Path) -> list[Path]:
    """As `run_folders`; raises KVBenchError where there is none."""
    found = run_folders(root)
    if not found:
        raise KVBenchError(f"There is no run in {root}: give a folder that `kvbench run --output` wrote to.")
    return found


def run_folders(root: Path) -> list[Path]:
    """Folders of runs at or below `root`, sorted.

    Those that cannot be listed, and those whose `run.json` is no file, are among them: whoever reads them says what is
    wrong.
    """
    closed: list[Path] = []
    with reading(lambda reason: f"{root} cannot be searched for runs ({reason}): give a folder of runs."):
        walk = os.walk(root, onerror=lambda error: closed.append(Path(error.filename))) if root.is_dir() else ()
        folders = [Path(parent) for parent, within, files in walk if "run.json" in (*within, *files)]
        return sorted(folder for folder in [*folders, *closed] if REPLACED not in folder.relative_to(root).parts)


def _sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, where the system can."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KVBenchError(
            f"{unwritable(path, error)} The examples finished so far are kept, and the same command continues after "
            "them."
        ) from None
