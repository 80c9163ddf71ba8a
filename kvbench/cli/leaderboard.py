"""`kvbench leaderboard`: all runs below a folder, filtered, sorted and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kvbench.cli.common import Json, app, err, listed, out


@app.command()
def leaderboard(
    folder: Annotated[Path, typer.Argument(help="Folder with runs, at any depth.")],
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Condition, again for more: column=value, also != < <= > >= and ~ for a pattern with * and ?."
        ),
    ] = None,
    sort: Annotated[
        list[str] | None,
        typer.Option(
            help="Column, descending after a minus; several by commas, or the option again. [default: -accuracy]"
        ),
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option(help="Column to show, or all; several by commas, or the option again.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows at most.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write a .csv, .parquet or .md file.")] = None,
    as_json: Json = False,
) -> None:
    """List all runs below a folder, best first."""
    from kvbench.compare import leaderboard as board  # noqa: PLC0415  imports scipy and duckdb

    shown = list(board.COLUMNS) if columns == ["all"] else listed(columns)
    found, skipped = board.query(
        folder, where=where or (), sort=listed(sort or "-accuracy"), columns=shown, limit=limit
    )
    for sentence in skipped:
        err.print(f"Warning: {sentence}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    rows = found.fetchall()
    if export is not None:
        board.export(found, export)
    if as_json:
        print(json.dumps({"schema": 1, "rows": [dict(zip(found.columns, row, strict=True)) for row in rows]}, indent=2))
        return
    filled = [index for index, _ in enumerate(found.columns) if any(row[index] is not None for row in rows)]
    table = Table(title=f"{len(rows)} runs", title_justify="left")
    for index in filled:
        number = board.COLUMNS[found.columns[index]][0] != "VARCHAR"
        table.add_column(found.columns[index].replace("_", " "), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_cell(row[index]) for index in filled))
    out.print(table)
    if export is not None:
        out.print(str(export), style="dim", highlight=False, soft_wrap=True)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
