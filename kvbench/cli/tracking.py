"""`--wandb` and `--trackio` of the commands that run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbench.contract.errors import KVBenchError

if TYPE_CHECKING:
    from kvbench.share.trackers import Tracker

WandB = Annotated[
    str | None, typer.Option(metavar="PROJECT", help="Tell Weights & Biases of each finished run, in this project.")
]
Trackio = Annotated[
    str | None, typer.Option(metavar="PROJECT", help="Tell Trackio of each finished run, in this project.")
]


class Tracking:
    """Tells the trackers that were asked for of each finished run; what they did not take is told at the end."""

    def __init__(self, wandb: str | None, trackio: str | None) -> None:
        """Raises KVBenchError where a tracker's library is missing."""
        self._trackers: list[Tracker] = []
        self._failures: list[str] = []
        if wandb is not None or trackio is not None:
            from kvbench.share.trackers import trackers  # noqa: PLC0415  imports torch

            self._trackers = trackers(wandb, trackio)

    def tell(self, document: Mapping[str, Any]) -> None:
        """Tell of a run as it stands in `--json` documents."""
        for tracker in self._trackers:
            try:
                tracker.tell(document)
            except KVBenchError as error:
                self._failures.append(str(error))

    def end(self) -> None:
        """Raise KVBenchError where a run was not taken."""
        if self._failures:
            more = f" ({len(self._failures)} such.)" if len(self._failures) > 1 else ""
            raise KVBenchError(self._failures[0] + more)
