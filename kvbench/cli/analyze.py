"""`kvbench analyze`: one analysis of a capture or a run, its table, CSV and figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvbench.cli.common import Json, app, numbers, out


@app.command()
def analyze(
    name: Annotated[str, typer.Argument(help="ood, recovery, recall, sparsity or overlap.")],
    capture: Annotated[Path | None, typer.Option(help="Folder that `kvbench capture` wrote.")] = None,
    run_folder: Annotated[Path | None, typer.Option("--run", help="Folder of a finished run, for its traces.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers separated by commas. [default: all captured]")] = None,
    heads: Annotated[str | None, typer.Option(help="Query heads separated by commas. [default: all]")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the table, the CSV and the figure.")] = Path(
        "kvbench-analysis"
    ),
    as_json: Json = False,
) -> None:
    """Analyse a capture or a run: a table, its CSV and its figure."""
    from kvbench.analysis import studies  # noqa: PLC0415
    from kvbench.capture import load_capture  # noqa: PLC0415

    source = load_capture(capture) if capture is not None else None
    rows = studies.analyse(
        name, source, run_folder, layers=numbers("--layers", layers), heads=numbers("--heads", heads)
    )
    config = source.manifest.config if source is not None else None
    title = f"{config.model}, {config.context_length} tokens" if config is not None else (run_folder or Path()).name
    studies.write(name, rows, output, {"title": title, "folder": str(capture or run_folder)})
    if as_json:
        print(json.dumps({"schema": 1, "analysis": name, "rows": rows, "folder": str(output)}, indent=1))
        return
    table = Table(title=f"{name}: {title}", title_justify="left")
    columns = [key for key in rows[0] if key != "missing"]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows[:60]:
        cells = [row.get(column) for column in columns]
        table.add_row(*("–" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells))
    out.print(table)
    if len(rows) > 60:
        out.print(f"{len(rows) - 60} more rows are in the CSV.", style="dim", highlight=False)
    out.print(str(output), style="dim", highlight=False, soft_wrap=True)
