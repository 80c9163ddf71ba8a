"""The contract of an analysis: tables of numbers from captured vectors or from traces of runs, and their figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, BeforeValidator, Field

from kvbench.contract.extension import Extension

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


Row = dict[str, Any]
Tables = dict[str, list[Row]]
"""Rows by the table's name; `rows` is the main one. Plain numbers and texts; None where nothing was measured."""


def _parts(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_parts)]
"""Type of an option: names, on the command line separated by commas."""
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_parts)]
"""Type of an option: whole numbers from 1 on, on the command line separated by commas."""


class Panel(NamedTuple):
    """One plot of what a run's traces hold, over the decoding steps: its axis' label and the columns it draws."""

    label: str
    columns: tuple[str, ...]


class Analysis(Extension):
    """One analysis: it measures the chosen layers and query heads of a capture, sums up its rows and draws them.

    `size`: the figure's, in inches. `probe` and `panels`: the probe whose traces it can show for a run, and how; empty
    where a run's traces hold nothing for it.
    """

    size: ClassVar[tuple[float, float]] = (7.0, 3.6)
    probe: ClassVar[str] = ""
    panels: ClassVar[tuple[Panel, ...]] = ()
    reads_times: ClassVar[bool] = False
    """True for an analysis of the times of benchmarks and runs, by `read_times`, instead of vectors."""

    def __init__(self, options: BaseModel | None = None) -> None:
        self.options: Any = options if options is not None else self.Options()

    def measure(
        self, capture: Any, layers: Sequence[int], heads: Sequence[int], progress: Callable[[str], None]
    ) -> Tables:
        """Measure a capture (`kvbench.capture.files.Capture`); raises KVBenchError where it cannot serve."""
        raise NotImplementedError

    def read_times(self, benchmarks: Sequence[Path], runs: Sequence[Path]) -> tuple[Tables, list[str]]:
        """The tables from benchmarks' files and folders of finished runs, and what is partial, a sentence each."""
        raise NotImplementedError

    def summarise(self, tables: Tables) -> list[Row]:
        """The few rows that a person reads first."""
        raise NotImplementedError

    def draw(self, figure: Figure, tables: Tables) -> None:
        """Draw the tables into an empty figure, in the style of `kvbench.figures`."""
        raise NotImplementedError
