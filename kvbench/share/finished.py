"""Finished runs as those who share them need them, and their names for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvbench.compare.comparison import describe
from kvbench.contract.errors import KVBenchError
from kvbench.contract.task import ForcedTask
from kvbench.plugins import registry
from kvbench.runs.complete import complete_runs
from kvbench.runs.config import RunConfig
from kvbench.runs.results import finished_rows


@dataclass(frozen=True)
class Finished:
    """A run that is complete: its folder, its configuration, what `run.json` holds, and its examples."""

    path: Path
    config: RunConfig
    document: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def model(self) -> str:
        """The model's name; of a local folder the last part."""
        return Path(self.config.model).name if Path(self.config.model).is_absolute() else self.config.model

    @property
    def setting(self) -> str:
        """Policy, budget and options in words."""
        return describe(self.config.model_dump(mode="json"))

    @property
    def ended(self) -> datetime:
        """When `run.json` was last written."""
        return datetime.fromtimestamp((self.path / "run.json").stat().st_mtime, UTC)

    @property
    def generates(self) -> bool:
        """Whether the model wrote answers; else it was given tokens."""
        task = registry().classes["task"].get(self.config.task)  # a plugin may have gone since
        return not (task is not None and issubclass(task, ForcedTask))

    @property
    def metrics(self) -> list[str]:
        """What every example has a value of: `accuracy`, and what the task measures besides."""
        named = [set(row.get("scores", {})) for row in self.rows]
        return ["accuracy", *sorted(set.intersection(*named) if named else ())]

    def scores(self, metric: str) -> list[float]:
        """Each example's value of a metric."""
        return [row["score"] if metric == "accuracy" else row["scores"][metric] for row in self.rows]


def finished_runs(folders: Sequence[Path]) -> tuple[list[Finished], list[str]]:
    """The complete runs at or below folders, and a sentence for each that is left out.

    Raises KVBenchError where none is complete.
    """
    left_out: list[str] = []
    found = [
        Finished(run.folder, RunConfig.model_validate(run.document["config"]), run.document, run.rows)
        for run in complete_runs(folders, left_out, read_rows=finished_rows)
    ]
    if not found:
        raise KVBenchError(f"No run in {', '.join(map(str, folders))} is complete. {left_out[0]}")
    return found, left_out
