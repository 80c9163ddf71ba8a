"""Builds a report: collects, draws, writes the page in the formats asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.compare.candidates import Limits
from kvbench.contract.errors import KVBenchError, check_output, unwritable
from kvbench.report import charts as charting
from kvbench.report import page
from kvbench.report.collect import Collection, collect

FORMATS = ("html", "md", "pdf")
PRINTED = "backslashreplace"
"""How names of folders that are no text are written."""


@dataclass(frozen=True)
class Report:
    """What was written where."""

    folder: Path
    files: list[Path]
    charts: list[charting.Chart]
    found: Collection

    def document(self) -> dict[str, Any]:
        """The report as the `--json` document."""
        return {
            "schema": 1,
            "folder": str(self.folder),
            "files": [str(file) for file in self.files],
            "runs": [
                {"folder": str(run.path), "policy": run.policy, "status": run.status, "examples": len(run.rows),
                 "baseline": str(run.baseline.path) if run.baseline else None,
                 "over_budget": run.metrics.get("over_budget")} for run in self.found.runs
            ],
            "figures": [
                {"name": chart.name, "drawn": chart.paint is not None, "missing": chart.missing or None,
                 "record_with": chart.remedy} for chart in self.charts
            ],
            "problems": self.found.problems,
        }  # fmt: skip


def build(
    folders: Sequence[Path], output: Path, formats: Sequence[str] = ("html",), *, command: str = "",
    limits: Limits | None = None,
) -> Report:  # fmt: skip
    """Write the report of everything at or below the folders into `output`.

    `report.html`, `report.md` or `report.pdf` as asked, and `figures/` with each figure as SVG and PNG and its data as
    CSV. `limits` are those of the recommendation: 1 point where there are none. Raises KVBenchError where the folders
    hold nothing to show, or `output` cannot be written.
    """
    if not formats:
        raise KVBenchError(f"--format names no format: choose from {', '.join(FORMATS)}.")
    for name in formats:
        if name not in FORMATS:
            raise KVBenchError(f"--format {name} is not known: choose from {', '.join(FORMATS)}.")
    check_output(output)
    found = collect(folders)
    drawn = charting.charts(found)
    content = page.compose(found, drawn, command, limits)
    figures = output / "figures"
    written: list[Path] = []
    try:
        figures.mkdir(parents=True, exist_ok=True)
        if found.runs:
            written.append(figures / "leaderboard.csv")
            written[-1].write_text(page.table(page.board_rows(found)), "utf-8", PRINTED)
        for chart in drawn:
            written += charting.write(chart, figures)
        for name in dict.fromkeys(formats):
            target = output / f"report.{name}"
            if name == "html":
                target.write_text(page.html(content, figures), "utf-8", PRINTED)
            elif name == "md":
                target.write_text(page.markdown(content), "utf-8", PRINTED)
            else:
                from kvbench.report.pdf import write_pdf  # noqa: PLC0415 - matplotlib is slow to import

                write_pdf(content, target)
            written.insert(0, target)
    except OSError as error:
        raise KVBenchError(unwritable(output, error)) from None
    return Report(output, written, drawn, found)
