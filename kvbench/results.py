"""Run folders: the configuration that names them, examples appended as they finish, and the metrics made of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import filelock
from pydantic import BaseModel, ConfigDict, ValidationError

from kvbench.budget import Budget
from kvbench.errors import KVBenchError
from kvbench.statistics import confidence_interval, percentiles

SCHEMA = 1
"""Version of `run.json` and of the `--json` document."""

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

    @property
    def hash(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of the configuration and the schema version."""
        canonical = json.dumps({"schema": SCHEMA, **self.model_dump(mode="json")}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return f"{self.policy}-{self.task}-{self.context_length}-{self.hash}"


class Run:
    """A run's folder: `run.json` (configuration, environment, status, metrics) and `examples.jsonl`."""

    def __init__(self, path: Path, config: RunConfig, environment: dict[str, Any]) -> None:
        """Open or make the folder below `path`; what is already there must belong to this configuration."""
        self.config, self.environment = config, environment
        self.path = path / config.folder
        self.status = "running"
        self.metrics: dict[str, Any] = {}
        with _disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.rows = self._read_rows()
        if (self.path / "run.json").exists():
            found = read(self.path)
            if found["config"] != config.model_dump(mode="json"):
                raise KVBenchError(
                    f"{self.path} holds another configuration's results: move it away, or use another --output."
                )
            self.status, self.metrics = found["status"], found["metrics"]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder against a second writer, and note in `run.json` how the stretch ended."""
        lock = filelock.FileLock(self.path / ".lock")
        try:
            with _disk(self.path):
                lock.acquire(timeout=0)
        except filelock.Timeout:
            raise KVBenchError(
                f"Another kvbench is writing to {self.path}: wait for it, or use another --output."
            ) from None
        try:
            self.rows = self._read_rows()
            self._write("running")
            try:
                yield
            except KeyboardInterrupt:
                self._write("interrupted")
                raise
            except BaseException:
                self._write("failed")
                raise
            self.metrics = summarise(self.rows)
            self._write("complete")
        finally:
            lock.release()

    def append(self, row: dict[str, Any]) -> None:
        """Add a finished example and force it to the disk."""
        with _disk(self.path), (self.path / "examples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    def document(self) -> dict[str, Any]:
        """The run as one element of the `--json` document's `runs`."""
        config = self.config.model_dump(mode="json")
        return {
            "policy": config["policy"], "budget": config["budget"], "config": config, "environment": self.environment,
            "status": self.status, "metrics": self.metrics, "folder": str(self.path),
        }  # fmt: skip

    def _write(self, status: str) -> None:
        self.status = status
        content = {
            "schema": SCHEMA,
            **{k: v for k, v in self.document().items() if k not in ("policy", "budget", "folder")},
        }
        with _disk(self.path):
            temporary = self.path / f".run.json.{os.getpid()}"
            temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            temporary.replace(self.path / "run.json")

    def _read_rows(self) -> list[dict[str, Any]]:
        """Read finished examples; a last line that a killed writer left unfinished is cut off."""
        file = self.path / "examples.jsonl"
        if not file.exists():
            return []
        rows, end = [], 0
        content = file.read_bytes()
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("unfinished line")
                row = json.loads(line)
                if not isinstance(row, dict) or not {"id", "score"} <= row.keys():
                    raise ValueError("not an example")
                rows.append(row)
            except ValueError as error:
                if end + len(line) < len(content):
                    raise KVBenchError(
                        f"{file} line {number} is corrupt ({error}): move the folder away to run again from the start."
                    ) from None
                with _disk(self.path), file.open("rb+") as writable:
                    writable.truncate(end)
                break
            end += len(line)
        return rows


def read(path: Path) -> dict[str, Any]:
    """Read a `run.json`; refuse what is no run, or a schema version that this kvbench does not know."""
    file = path / "run.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KVBenchError(
            f"{file} is no readable run: {error}. Move the folder away, or use another --output."
        ) from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise KVBenchError(
            f"{file} has schema version {found!r}; this kvbench reads version {SCHEMA}: use a matching kvbench."
        )
    try:
        RunConfig.model_validate(content["config"])
        return {key: content[key] for key in ("config", "environment", "status", "metrics")}
    except (KeyError, ValidationError) as error:
        raise KVBenchError(
            f"{file} is no complete run ({type(error).__name__}): move the folder away, or use another --output."
        ) from None


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


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of a run from its examples; None where nothing was measured."""
    scores = [row["score"] for row in rows]
    low, high = confidence_interval(scores)
    steps = [step for row in rows for step in row["step_s"]]
    p50, p95 = percentiles(steps, 50, 95)
    prefill, index = _mean([row["prefill_s"] for row in rows]), _mean([row["index_s"] for row in rows])
    probed = [row["probes"] for row in rows if row.get("probes")]
    names = sorted({name for probes in probed for name in probes})
    measured = {name: _mean([p[name] for p in probed if p.get(name) is not None]) for name in names}
    return {
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
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in rows), default=None),
        "context_tokens": _mean([row["prompt_tokens"] for row in rows]),
        "generated_tokens": _mean([row["generated_tokens"] for row in rows]),
        "probed_examples": len(probed),
        **measured,
    }


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
