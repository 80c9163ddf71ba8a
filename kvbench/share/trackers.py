"""Finished runs in an experiment tracker, each through its own library: Weights & Biases, Trackio.

A run there is named as its folder, whose end is the configuration's hash. Told again, it is the same run in Weights &
Biases, and left as it is in Trackio. Each example is a step; the metrics stand as `metrics.*`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from statistics import median
from sys import stderr
from typing import Any, Protocol

from kvbench.contract.errors import KVBenchError, one_line
from kvbench.contract.extras import need
from kvbench.runs.results import finished_rows

_CHARACTERS = 2000
"""Of an answer or reference in a table."""


class Tracker(Protocol):
    """Is told of finished runs."""

    def tell(self, document: Mapping[str, Any]) -> None:
        """Tell of a run as it stands in `--json` documents; raises KVBenchError where the tracker does not take it."""


def trackers(wandb: str | None, trackio: str | None) -> list[Tracker]:
    """The trackers asked for, by the name of the project there; raises KVBenchError where a library is missing."""
    for name, project in (("wandb", wandb), ("trackio", trackio)):
        if project is not None and not project.strip():
            raise KVBenchError(f"--{name} names no project: give the project's name.")
    found: list[Tracker] = []
    if wandb is not None:
        found.append(_WandB(need("wandb", "--wandb"), wandb))
    if trackio is not None:
        found.append(_Trackio(need("trackio", "--trackio"), trackio))
    return found


class _WandB:
    def __init__(self, library: Any, project: str) -> None:
        self._library, self._project = library, project

    def tell(self, document: Mapping[str, Any]) -> None:
        folder, config = Path(document["folder"]), document["config"]
        with _told("wandb", folder), redirect_stdout(stderr):  # stdout is for the results
            run = self._library.init(
                project=self._project, name=folder.name, id=folder.name.rpartition("-")[2], resume="allow",
                group=f"{config['task']}-{config['context_length']}", tags=[config["policy"], config["task"]],
                config={**config, "environment": document["environment"]}, reinit="finish_previous",
                settings={"console": "off", "silent": True},
            )  # fmt: skip
            rows = finished_rows(folder)
            for step, row in enumerate(rows):
                run.log(_step(row), step=step)
            columns = ["id", "score", "prediction", "references"]
            table = self._library.Table(
                columns=columns, data=[[_cell(row.get(name)) for name in columns] for row in rows]
            )
            run.log({"examples": table}, step=len(rows))
            run.summary.update({f"metrics.{name}": value for name, value in _numbers(document["metrics"]).items()})
            run.finish()


class _Trackio:
    def __init__(self, library: Any, project: str) -> None:
        self._library, self._project = library, project

    def tell(self, document: Mapping[str, Any]) -> None:
        folder, config = Path(document["folder"]), document["config"]
        with _told("trackio", folder), redirect_stdout(stderr):
            if any(run.name == folder.name for run in self._library.Api().runs(self._project)):
                return
            run = self._library.init(
                project=self._project, name=folder.name, group=f"{config['task']}-{config['context_length']}",
                resume="never", config={**config, "environment": document["environment"]}, embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
            rows = finished_rows(folder)
            for step, row in enumerate(rows):
                run.log(_step(row), step=step)
            run.log({f"metrics.{name}": value for name, value in _numbers(document["metrics"]).items()}, step=len(rows))
            self._library.finish()


@contextmanager
def _told(name: str, folder: Path) -> Iterator[None]:
    """Say which tracker did not take which run, whatever its library raises; the run is kept."""
    try:
        yield
    except (KVBenchError, MemoryError):
        raise
    except Exception as error:
        reason = one_line(error)
        raise KVBenchError(
            f"{name} did not take {folder} ({type(error).__name__}: {reason}); the run is kept, and the same command "
            "tells it again."
        ) from error


def _step(row: Mapping[str, Any]) -> dict[str, float]:
    """An example's numbers."""
    steps = row.get("step_s") or []
    found = {"score": row["score"], "prompt_tokens": row.get("prompt_tokens"), **(row.get("scores") or {})}
    found |= {"ttft_s": row.get("prefill_s", 0) + row.get("index_s", 0), "tpot_s": median(steps) if steps else None}
    return {f"example.{name}": value for name, value in found.items() if value is not None}


def _numbers(content: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The numbers in nested metrics by dotted names."""
    found: dict[str, float] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{before}{key}.")
        elif isinstance(value, list):
            found |= _numbers({str(place): one for place, one in enumerate(value)}, f"{before}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{before}{key}"] = value
    return found


def _cell(value: Any) -> Any:
    text = "\n".join(value) if isinstance(value, list) else value
    return text[:_CHARACTERS] if isinstance(text, str) else text
