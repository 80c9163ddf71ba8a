"""Run folders: the configuration that names them, examples appended as they finish, and the metrics made of them.

A folder holds `run.json`; `examples.jsonl`, all that the configuration determines: the same bytes however often the run
was stopped and continued; and `timings.jsonl`, the measurements that differ from one execution to the next. A line in
`examples.jsonl` makes an example finished: its timings were forced to the disk before.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
from pydantic import BaseModel, ConfigDict, ValidationError

from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.statistics import confidence_interval, mean_interval, percentiles

SCHEMA = 2
"""Version of a run's folder. Version 1 kept the times in `examples.jsonl`; it is read, and never written to."""
READABLE = (1, 2)

PACKAGES = ("kvbench", "torch", "transformers", "faiss-cpu", "numba", "numpy", "pluggy", "pydantic", "scipy")


class RunConfig(BaseModel):
    """Everything that a run's numbers depend on; its hash names the run's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    model_fingerprint: str
    device: str
    dtype: str
    policy: str
    policy_options: dict[str, Any]
    budget: Budget | None
    task: str
    task_options: dict[str, Any]
    task_data: dict[str, str]
    context_length: int
    examples: int
    seed: int
    question: Literal["aware", "agnostic"]
    prefill_chunk: int | None
    recall_k: int
    probe_examples: int
    probes: tuple[str, ...] = ()
    """Probes beyond the standard ones."""
    batch_size: int = 1
    share_prefill: bool = False

    @property
    def hash(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of the configuration and the schema version."""
        canonical = json.dumps({"schema": SCHEMA, **self.model_dump(mode="json")}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return f"{self.policy}-{self.task}-{self.context_length}-{self.hash}"


class _Line(NamedTuple):
    row: dict[str, Any]
    size: int
    """In bytes."""


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
        with _disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.rows = read_rows(self.path)
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

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder against a second writer, and note in `run.json` how the stretch ended."""
        lock = filelock.FileLock(self.path / ".lock")
        with _disk(self.path):
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                raise KVBenchError(
                    f"Another kvbench is writing to {self.path}: wait for it, or use another --output."
                ) from None
        try:
            self.rows = read_rows(self.path)
            self._repair()
            self._write("running")
            try:
                yield
            except BaseException as error:
                # A disk that is full for examples is full for this too, and must not hide the first error.
                with suppress(KVBenchError):
                    self._write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
                raise
            self.metrics = summarise(self.rows)
            self._write("complete")
        finally:
            lock.release()

    def append(self, row: dict[str, Any]) -> None:
        """Add a finished example and force it to the disk, its timings first."""
        if any(row["id"] == other["id"] for other in self.rows):
            raise KVBenchError(
                f"Task '{self.config.task}' gave two examples the id {row['id']}: report it to the task's author."
            )
        lasting, timed = split(row)
        with _disk(self.path):
            _append(self.path / "timings.jsonl", {"id": row["id"], **timed})
            _append(self.path / "examples.jsonl", lasting)
        self.rows.append(row)

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
        for name, lines in zip(("timings.jsonl", "examples.jsonl"), _finished_lines(self.path), strict=True):
            file = self.path / name
            size, end = file.stat().st_size if file.exists() else 0, sum(line.size for line in lines)
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
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KVBenchError(
            f"{file} is no readable run: {error}. Move the folder away, or use another --output."
        ) from None
    if not isinstance(content, dict) or content.get("schema") not in READABLE:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise KVBenchError(
            f"{file} has schema version {found!r}; this kvbench reads versions {', '.join(map(str, READABLE))}: "
            "use a matching kvbench."
        )
    try:
        config = RunConfig.model_validate(content["config"]).model_dump(mode="json")
        conformance = content.get("conformance", [])  # absent in runs of kvbench before 0.2
        kept = {key: content[key] for key in ("environment", "status", "metrics")}
        return {"config": config, **kept, "conformance": conformance}
    except (KeyError, ValidationError) as error:
        raise KVBenchError(
            f"{file} is no complete run ({type(error).__name__}): move the folder away, or use another --output."
        ) from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the finished examples of a run's folder, timings included; what a killed writer left unfinished is skipped.

    Raises KVBenchError for a file that is corrupt before its end.
    """
    timings, examples = _finished_lines(path)
    times = {line.row["id"]: line.row for line in timings}
    return [{**line.row, **times.get(line.row["id"], {})} for line in examples]


def find_runs(root: Path) -> list[Path]:
    """Folders of runs at or below `root`, sorted; raises KVBenchError where there is none."""
    found = sorted(file.parent for file in root.rglob("run.json")) if root.is_dir() else []
    if not found:
        raise KVBenchError(f"There is no run in {root}: give a folder that `kvbench run --output` wrote to.")
    return found


def split(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part an example's row into what its configuration determines, and what was timed.

    Timed are the peak memory, the tokens whose prefill was another example's and all names that end in `_s`, those of
    probes too.
    """
    timed = {key: row[key] for key in row if _is_timed(key)}
    lasting = {key: row[key] for key in row if key not in timed}
    probes = row.get("probes") or {}
    if any(map(_is_timed, probes)):
        timed["probes"] = probes
        lasting["probes"] = {key: probes[key] for key in probes if not _is_timed(key)}
    return lasting, timed


def _is_timed(name: str) -> bool:
    return name.endswith("_s") or name in ("peak_memory_bytes", "reused_tokens")


def _finished_lines(path: Path) -> tuple[list[_Line], list[_Line]]:
    """The complete lines of `timings.jsonl` and `examples.jsonl`, as many of the one as of the other."""
    examples = _lines(path / "examples.jsonl", {"id", "score"})  # first, since a writer adds to it last
    file = path / "timings.jsonl"
    if not file.exists() and (not examples or any(map(_is_timed, examples[0].row))):
        return [], examples  # nothing yet, or version 1
    timings = _lines(file, {"id"})
    for number, example in enumerate(examples, start=1):
        if number > len(timings) or timings[number - 1].row["id"] != example.row["id"]:
            raise KVBenchError(
                f"{file} has no line {number} for example {example.row['id']}: move the folder away to run again from "
                "the start."
            )
    return timings[: len(examples)], examples


def _lines(file: Path, required: set[str]) -> list[_Line]:
    parts = file.read_bytes().split(b"\n") if file.exists() else [b""]
    seen, found = set(), []
    for number, part in enumerate(parts[:-1], start=1):  # the last is empty, or was never finished
        try:
            row = json.loads(part)
            if not isinstance(row, dict) or not required <= row.keys():
                raise ValueError("not an example")
        except ValueError as error:
            if number == len(parts) - 1 and not parts[-1]:
                break  # a power cut can leave the last line without its content
            raise KVBenchError(
                f"{file} line {number} is corrupt ({error}): move the folder away to run again from the start."
            ) from None
        if row["id"] in seen:
            raise KVBenchError(f"{file} line {number} repeats example {row['id']}: move the folder away to run again.")
        seen.add(row["id"])
        found.append(_Line(row, len(part) + 1))
    return found


def _append(file: Path, row: dict[str, Any]) -> None:
    """Append a line and force it to the disk; a line that did not fit is taken back."""
    rest = memoryview((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())
    with file.open("ab", buffering=0) as target:
        size = target.tell()
        try:
            while rest:
                rest = rest[target.write(rest) :]
            os.fsync(target.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(file, size)
            raise


def _sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, where the system can."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def environment(device: str, device_name: str, threads: int, memory_method: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version(package) for package in PACKAGES},
        "device": device,
        "device_name": device_name,
        "threads": threads,
        "peak_memory_method": memory_method,
    }


def processor() -> str:
    """This machine's processor, by name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of a run from its examples; None where nothing was measured."""
    scores = [row["score"] for row in rows]
    low, high = confidence_interval(scores)
    steps = [step for row in rows for step in row["step_s"]]
    p50, p95 = percentiles(steps, 50, 95)
    fresh = [row for row in rows if not row.get("reused_tokens")]
    prefill, index = _mean([row["prefill_s"] for row in fresh]), _mean([row["index_s"] for row in fresh])
    peaks = [row["peak_memory_bytes"] for row in rows if row["peak_memory_bytes"] is not None]
    probed = [row["probes"] for row in rows if row.get("probes")]
    names = sorted({name for probes in probed for name in probes})
    measured = {name: _mean([p[name] for p in probed if p.get(name) is not None]) for name in names}
    named = sorted({name for row in rows for name in row.get("scores", {})})
    values = {name: [row["scores"][name] for row in rows if name in row.get("scores", {})] for name in named}
    return {
        **{name: _summary(found) for name, found in values.items()},
        "accuracy": {"mean": _mean(scores), "ci95": [_number(low), _number(high)], "n": len(scores)},
        "recall_at_k": measured.pop("recall_at_k", None),
        "recovered_mass": measured.pop("recovered_mass", None),
        "density": measured.pop("density", None),
        "bytes": {tier: _mean([row["bytes"][tier] for row in rows]) for tier in ("resident", "offloaded", "index")},
        "ttft_s": {
            "prefill": prefill,
            "index": index,
            "total": None if prefill is None or index is None else prefill + index,
        },
        "tpot_s": {"p50": _number(p50), "p95": _number(p95)},
        "peak_memory_bytes": max(peaks, default=None),
        "context_tokens": _mean([row["prompt_tokens"] for row in rows]),
        "generated_tokens": _mean([row["generated_tokens"] for row in rows]),
        "probed_examples": len(probed),
        "truncated_examples": sum("truncated_tokens" in row.get("info", {}) for row in rows),
        "prefix_left_out_examples": sum("prefix_left_out" in row.get("info", {}) for row in rows),
        "probe_overhead": _probe_overhead(rows),
        "budget_tokens": _mean([row["budget_tokens"] for row in rows if row.get("budget_tokens")]),
        "attended_bytes": _product(measured.get("attended_tokens"), _mean([row.get("token_bytes", 0) for row in rows])),
        **measured,
    }


def _probe_overhead(rows: list[dict[str, Any]]) -> float | None:
    """What the probes add to a decoding step, as a share of the undisturbed step of the same examples (medians)."""
    both = [row for row in rows if row["step_s"] and row.get("probed_step_s")]
    if not both:
        return None
    (plain,) = percentiles([step for row in both for step in row["step_s"]], 50)
    (probed,) = percentiles([step for row in both for step in row["probed_step_s"]], 50)
    return probed / plain - 1


def _summary(values: list[float]) -> dict[str, Any]:
    low, high = mean_interval(values)
    return {"mean": _mean(values), "ci95": [_number(low), _number(high)], "n": len(values)}


def _product(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KVBenchError(
            f"Cannot write to {path}: {error.strerror or error}. Free some space or choose another --output; the "
            "examples finished so far are kept, and the same command continues after them."
        ) from None
