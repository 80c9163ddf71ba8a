"""The report's figures: each draws what the runs hold, or says what is missing and which command records it."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from kvbench import figures, spreadsheet
from kvbench.report.charts.accuracy import accuracy_charts, accuracy_latency_charts
from kvbench.report.charts.analyses import analysis_charts, ood_charts
from kvbench.report.charts.answers import answer_charts
from kvbench.report.charts.chart import MIB, Chart, Row, model_text, percent, setting_text
from kvbench.report.charts.latency import latency_charts
from kvbench.report.charts.needles import needle_charts
from kvbench.report.charts.prefixes import prefix_charts
from kvbench.report.charts.recall import recall_charts, step_charts
from kvbench.report.collect import Collection

__all__ = ["MIB", "Chart", "Row", "charts", "model_text", "percent", "setting_text", "write"]


def charts(found: Collection) -> list[Chart]:
    """Every figure of the report, in its order, not yet drawn; those of one title are numbered."""
    drawn = [
        *accuracy_charts(found), *accuracy_latency_charts(found), *recall_charts(found),
        *needle_charts(found), *latency_charts(found), *prefix_charts(found), *step_charts(found),
        *answer_charts(found), *ood_charts(found), *analysis_charts(found),
    ]  # fmt: skip
    count, seen = Counter(chart.title for chart in drawn), Counter[str]()
    for chart in drawn:
        if count[title := chart.title] > 1:
            seen[title] += 1
            chart.title = f"{title} ({seen[title]} of {count[title]})"
    return drawn


def write(chart: Chart, folder: Path) -> list[Path]:
    """Write a chart's figure (SVG and PNG) and CSV into the folder; nothing where it has no data."""
    if chart.paint is None:
        return []
    if chart.picture is not None:
        for ending in (".svg", ".png"):
            shutil.copyfile(chart.picture.with_suffix(ending), folder / f"{chart.name}{ending}")
    else:
        with figures.drawing(folder, chart.name, chart.size) as figure:
            chart.paint(figure)
    with (folder / f"{chart.name}.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        spreadsheet.write_table(file, chart.rows)
    return [folder / f"{chart.name}.{ending}" for ending in ("svg", "png", "csv")]
