"""`kvbench analyze`: one analysis of a capture or of runs, its tables, their CSV and their figure."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench import figures, spreadsheet
from kvbench.analysis.studies import runs
from kvbench.capture.files import Capture
from kvbench.contract.analysis import Analysis, Row, Tables
from kvbench.contract.errors import KVBenchError
from kvbench.plugins import registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
"""Version of an analysis' JSON document."""
REASONS = ", since: "
"""Between what a note says is missing and why; a figure's title leaves the reasons out."""
MOST_REASONS = 3
"""Reasons that are told why heads could not be measured."""


def analyse_capture(
    name: str, capture: Capture, options: Mapping[str, Any], *, layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None, progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Run the analysis called `name` on a capture; the JSON document. `layers` and `heads` None: all captured."""
    analysis: Analysis = registry().make("analysis", name, options)
    chosen = _ids(layers, capture.layers, "layer")
    tables = analysis.measure(capture, chosen, _ids(heads, range(capture.manifest.heads), "head"), progress)
    config = capture.manifest.config
    reasons = Counter(row["missing"] for row in tables["rows"] if row.get("missing"))
    notes = [f"{reasons.total()} of {len(tables['rows'])} heads could not be measured"] if reasons else []
    if reasons:
        told = [
            reason.rstrip(".") + (f" ({count} head{'s' * (count != 1)})" if len(reasons) > 1 else "")
            for reason, count in reasons.most_common(MOST_REASONS)
        ]
        more = len(reasons) - len(told)
        notes[0] += f"{REASONS}{'; '.join(told)}{f'; and {more} other reasons, in the CSV' if more > 0 else ''}"
    return _document(
        analysis, tables, analysis.summarise(tables), notes,
        {
            "title": f"{config.model}, {capture.manifest.prompt_tokens} + {config.decode_tokens} tokens",
            "capture": config.model_dump(mode="json"), "folder": str(capture.path),
        },
    )  # fmt: skip


def analyse_runs(name: str, folders: Sequence[Path], options: Mapping[str, Any]) -> dict[str, Any]:
    """Show what the traces of finished runs hold for the analysis called `name`; the JSON document."""
    if options:
        raise KVBenchError("Options go with an analysis of vectors; with --run the run's own configuration holds.")
    cls = registry().find("analysis", name)
    tables, notes = runs.tables_of_runs(folders, cls)
    title = ", ".join(dict.fromkeys(row["run"] for row in tables["rows"]))
    return _document(
        cls(), tables, runs.summarise(tables), notes, {"title": title, "runs": [str(folder) for folder in folders]}
    )


def analyse_times(
    name: str, benchmarks: Sequence[Path], folders: Sequence[Path], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Run the analysis called `name` on the times of benchmarks' files and of finished runs; the JSON document."""
    analysis: Analysis = registry().make("analysis", name, options)
    if not analysis.reads_times:
        raise KVBenchError(f"Analysis '{name}' reads no benchmark's file: leave --benchmark out.")
    if not benchmarks and not folders:
        raise KVBenchError(
            f"Analysis '{name}' compares measured times: give a file of tests/bench/gpu/decode.py with --benchmark, or "
            "finished runs with --run."
        )
    tables, notes = analysis.read_times(benchmarks, folders)
    source = {
        "title": "; ".join(dict.fromkeys(row["where"] for row in tables["rows"])),
        "runs": [str(folder) for folder in folders], "benchmarks": [str(file) for file in benchmarks],
    }  # fmt: skip
    return _document(analysis, tables, analysis.summarise(tables), notes, source)


def _document(
    analysis: Analysis, tables: Tables, summary: list[Row], notes: list[str], source: dict[str, Any]
) -> dict[str, Any]:
    return {
        "schema": SCHEMA, "analysis": analysis.name, "options": analysis.options.model_dump(mode="json"),
        "source": source, "partial": notes, "summary": summary, **tables,
    }  # fmt: skip


def _ids(wanted: Sequence[int] | None, there: Sequence[int], what: str) -> list[int]:
    for number in wanted or ():
        if number not in there:
            raise KVBenchError(f"There is no {what} {number}: choose from {', '.join(map(str, there))}.")
    return list(there if wanted is None else wanted)


def write(document: Mapping[str, Any], folder: Path) -> None:
    """Write `NAME.json`, `NAME.csv`, a CSV for each other table, and the figure `NAME.svg` and `.png` (300 dpi)."""
    name, tables = document["analysis"], tables_of(document)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for table, rows in tables.items():
            target = folder / (f"{name}.csv" if table == "rows" else f"{name}-{table}.csv")
            with target.open("w", encoding="utf-8", newline="") as file:
                spreadsheet.write_table(file, rows)
        text = json.dumps(document, indent=1, allow_nan=False)
        (folder / f"{name}.json").write_text(text + "\n", "utf-8")
        analysis: Analysis = registry().make("analysis", name, document["options"])
        with figures.drawing(folder, name, analysis.size) as figure:
            draw(figure, document, analysis)
    except OSError as error:
        raise KVBenchError(f"Cannot write to {folder} ({error.strerror or error}): choose another --output.") from None


def tables_of(document: Mapping[str, Any]) -> Tables:
    """The tables of an analysis' document, by name."""
    fixed = ("schema", "analysis", "options", "source", "partial", "summary")
    return {name: rows for name, rows in document.items() if name not in fixed}


def draw(figure: Figure, document: Mapping[str, Any], analysis: Analysis) -> None:
    """Draw a document, with a title that says what is partial."""
    tables = tables_of(document)
    if "runs" in document["source"] and not analysis.reads_times:
        runs.draw(figure, tables, type(analysis))
    else:
        analysis.draw(figure, tables)
    title = f"{analysis.name}: {document['source']['title']}"
    if document["partial"]:
        title += "\nPARTIAL: " + "; ".join(note.partition(REASONS)[0] for note in document["partial"])
    figure.suptitle(title, fontsize=9)


def cell(value: Any) -> str:
    """A value of a table as text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
