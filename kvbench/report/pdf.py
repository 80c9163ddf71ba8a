"""The report as a PDF: A4 pages of the same texts, tables and figures, drawn by matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from kvbench import figures
from kvbench.report.charts import Chart
from kvbench.report.page import Content

A4 = (8.27, 11.69)
MARGIN = 0.7
_COLUMNS = (
    "policy", "budget", "task", "context_length", "accuracy", "difference", "p", "recall_at_k", "recovered_mass",
    "scanned_fraction", "total_bytes", "bytes.resident", "ttft_s.total", "tpot_s.p50",
)  # fmt: skip
_WIDE = {"policy": 2.6, "accuracy": 2.0, "difference": 2.0, "task": 1.5, "budget": 1.3}
_ROWS = 16
MOST_SCOPES = 6
"""Decisions on paper; the page has all."""


def write_pdf(content: Content, target: Path) -> None:
    """Write the report as a PDF."""
    with figures.styled("report"), PdfPages(target, metadata={"Title": content.title}) as pdf:
        with _Text(pdf) as text:
            text.write(content.title, size=17, weight="bold", after=0.12)
            text.write(content.subtitle, color=figures.REFERENCE)
            if content.problems:
                text.write("Not everything could be shown", size=12, weight="bold", before=0.2)
                for problem in content.problems:
                    text.write(f"• {problem}")
            if content.glance:
                text.write("At a glance", size=12, weight="bold", before=0.2)
                for line, command in content.glance:
                    text.write(f"• {line}")
                    if command:
                        text.write(command, mono=True)
            for scope in content.decision.scopes[:MOST_SCOPES]:
                text.write(f"Which policy? {scope['title']}", size=12, weight="bold", before=0.2)
                text.write(scope["detail"], color=figures.REFERENCE)
                for line in scope["sentences"]:
                    text.write(f"• {line}")
        _leaderboard(content, pdf)
        for chart in content.charts:
            _chart(chart, pdf)
        with _Text(pdf) as text:
            text.write("Runs: configuration, environment and command", size=14, weight="bold", after=0.1)
            for run in content.runs:
                marks = "".join(f" ({mark})" for mark in run["marks"])
                text.write(f"{run['title']}{marks}", size=10.5, weight="bold", before=0.18)
                text.write(run["command"], mono=True)
                for table in run["tables"]:
                    text.write(
                        f"{table['title']}: " + "; ".join(f"{key} {value}" for key, value in table["rows"]), size=8
                    )
            for analysis in content.analyses:
                text.write(analysis["title"], size=10.5, weight="bold", before=0.18)
                text.write(analysis["command"], mono=True)
            text.write(f"Made by kvbench {content.version} with", before=0.3)
            text.write(content.command, mono=True)


class _Text:
    """Running text over as many pages as it takes."""

    def __init__(self, pdf: PdfPages) -> None:
        self.pdf = pdf
        self.page: Figure | None = None
        self.y = 0.0

    def __enter__(self) -> _Text:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.page is not None:
            _save(self.pdf, self.page)

    def write(
        self, text: str, *, size: float = 9, weight: str = "normal", color: str = "#000000", mono: bool = False,
        before: float = 0.0, after: float = 0.05,
    ) -> None:  # fmt: skip
        """Add a paragraph; distances in inches."""
        size = 7.5 if mono else size
        em = size / 72 * (0.605 if mono else 0.56 if weight == "normal" else 0.63)
        indent = "  " if text.startswith("• ") else ""
        lines = textwrap.wrap(text, int((A4[0] - 2 * MARGIN) / em), subsequent_indent=indent, break_on_hyphens=False)
        height = 1.4 * size / 72
        self.y -= before
        for line in lines:
            if self.page is None or self.y - height < MARGIN:
                if self.page is not None:
                    _save(self.pdf, self.page)
                self.page, self.y = Figure(figsize=A4), A4[1] - MARGIN
            self.y -= height
            self.page.text(
                MARGIN / A4[0], self.y / A4[1], line, fontsize=size, fontweight=weight, color=color,
                family="monospace" if mono else "sans-serif",
            )  # fmt: skip
        self.y -= after


def _leaderboard(content: Content, pdf: PdfPages) -> None:
    board = content.board
    chosen = [place for place, column in enumerate(board.columns) if column.key in _COLUMNS]
    for start in range(0, len(board.rows), _ROWS):
        page = Figure(figsize=A4[::-1])
        page.text(MARGIN / A4[1], 1 - MARGIN / A4[0], "Leaderboard", fontsize=14, fontweight="bold")
        page.text(MARGIN / A4[1], 1 - (MARGIN + 0.45) / A4[0], textwrap.fill(board.caption, 150),
                  fontsize=8, color=figures.REFERENCE)  # fmt: skip
        rows = board.rows[start : start + _ROWS]
        heads = [textwrap.fill(board.columns[place].title, 11) for place in chosen]
        cells = [[_cell(row, place) for place in chosen] for row in rows]
        height = 0.36 * (len(rows) + 1.4)
        bottom = A4[0] - MARGIN - 0.65 - height
        axes = page.add_axes((MARGIN / A4[1], bottom / A4[0], 1 - 2 * MARGIN / A4[1], height / A4[0]))
        axes.set_axis_off()
        widths = [_WIDE.get(board.columns[place].key, 1.0) for place in chosen]
        table = axes.table(
            cells, colLabels=heads, colWidths=[width / sum(widths) for width in widths], bbox=Bbox.unit(),
            cellLoc="right",
        )  # fmt: skip
        table.auto_set_font_size(False)
        table.set_fontsize(6.5)
        for (line, place), cell in table.get_celld().items():
            cell.set(edgecolor="#dddddd", linewidth=0.5)
            cell.PAD = 0.04
            if board.columns[chosen[place]].kind == "text":
                cell.set_text_props(ha="left")
            if line == 0:
                cell.set(facecolor="#eeeeee")
                cell.set_text_props(fontweight="bold")
        _save(pdf, page)


def _save(pdf: PdfPages, page: Figure) -> None:
    pdf.savefig(page)  # type: ignore[no-untyped-call]


def _cell(row: dict[str, Any], place: int) -> str:
    cell = row["cells"][place]
    text = getattr(cell, "text", "")
    detail = getattr(cell, "detail", "")
    if place == 0 and row["marks"]:
        detail = ", ".join(mark.split(":")[0] for mark in row["marks"])
    return f"{textwrap.fill(text, 26)}\n{detail.replace(', n', chr(10) + 'n')}" if detail else textwrap.fill(text, 26)


def _chart(chart: Chart, pdf: PdfPages) -> None:
    if chart.paint is None:
        with _Text(pdf) as text:
            text.write(chart.title, size=14, weight="bold")
            text.write(_missing(chart))
            for command in chart.remedy:
                text.write(command, mono=True)
        return
    above = textwrap.wrap(chart.caption, 112)
    below: list[tuple[str, bool]] = [(f"Data: figures/{chart.name}.csv. Made by:", False)]
    below += _commands(chart.commands)
    if chart.missing:
        below += [("", False), *((line, False) for line in textwrap.wrap(_missing(chart), 112))]
        below += _commands(chart.remedy)
    top, bottom = 0.55 + 0.17 * len(above), 0.3 + 0.16 * len(below)
    height = max(A4[1], top + chart.size[1] + bottom + 2 * MARGIN)
    page = Figure(figsize=(A4[0], height), layout="constrained")
    rest = height - MARGIN - top - chart.size[1]
    parts: Any = page.subfigures(
        3, 3, height_ratios=[MARGIN + top, chart.size[1], rest],
        width_ratios=[MARGIN - 0.2, A4[0] - 2 * MARGIN + 0.4, MARGIN - 0.2],
    )  # fmt: skip
    chart.paint(parts[1, 1])
    left, y = MARGIN / A4[0], height - MARGIN
    page.text(left, y / height, chart.title, fontsize=14, fontweight="bold")
    for line in above:
        y -= 0.17
        page.text(left, (y - 0.12) / height, line, fontsize=8.5)
    y = rest - 0.25
    for line, mono in below:
        page.text(left, y / height, line, fontsize=6.5 if mono else 8.5, family="monospace" if mono else "sans-serif")
        y -= 0.16
    _save(pdf, page)


def _missing(chart: Chart) -> str:
    return chart.missing + (" Record it with:" if chart.remedy else "")


def _commands(commands: Sequence[str], most: int = 8) -> list[tuple[str, bool]]:
    lines = [
        line for command in commands[:most]
        for line in textwrap.wrap(command, 118, subsequent_indent="    ", break_on_hyphens=False)
    ]  # fmt: skip
    if len(commands) > most:
        lines.append(f"... and {len(commands) - most} more, with the runs at the end.")
    return [(line, True) for line in lines]
