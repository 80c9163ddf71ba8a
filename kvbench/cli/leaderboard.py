"""`kvbench leaderboard`: all runs below a folder, ranked by task and length, filtered and exported."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvbench.cli.common import Json, app, err, listed, out, share

if TYPE_CHECKING:
    from kvbench.compare.averages import Average

SHARES = ("accuracy", "recall_at_k", "recovered_mass", "output_error", "scanned_fraction", "density", "hot_hit_rate",
          "ratio")  # fmt: skip


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
    limit: Annotated[int | None, typer.Option(min=1, help="Rows at most, of each task and length.")] = None,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Rank runs of different tasks and lengths in one list.")
    ] = False,
    export: Annotated[Path | None, typer.Option(help="Write a .csv, .parquet or .md file.")] = None,
    as_json: Json = False,
) -> None:
    """List all runs below a folder, best first within each task and length, with averages over task families."""
    from kvbench.compare import leaderboard as board  # noqa: PLC0415  imports scipy and duckdb
    from kvbench.compare.averages import NEEDED, averages, policy_names  # noqa: PLC0415

    given = list(board.COLUMNS) if columns == ["all"] else listed(columns)
    order = listed(sort or "-accuracy")
    wanted = given or list(board.SHOWN)
    every = list(dict.fromkeys([*wanted, *board.VIEW, *board.GROUP, *NEEDED]))
    found, skipped = board.query(folder, where=where or (), sort=order, columns=every, limit=limit, mixed=mixed)
    for sentence in skipped:
        err.print(f"Warning: {sentence}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    rows = [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]
    names = policy_names([(row["policy"], row["policy_options"]) for row in rows])
    if export is not None:
        board.export(found.project(", ".join(f'"{name}"' for name in wanted)), export)
    means = [] if limit is not None else averages(rows)  # a part of the rows gives no average
    if as_json:
        document = {"schema": 1, "rows": [{name: row[name] for name in wanted} for row in rows],
                    "averages": [dataclasses.asdict(one) for one in means]}  # fmt: skip
        print(json.dumps(document, indent=2))
        return
    for _, family in groupby(means, key=lambda one: one.title):
        out.print(_means(list(family), names))
    view = [name for name in board.VIEW if name not in ("seed", "mode") or len({row[name] for row in rows}) > 1]
    if not given:
        rows = [{**row, "policy": names[row["policy"], row["policy_options"]]} for row in rows]
    # What a group has in common is its title: columns of nothing else are a list.
    grouped = board.is_grouped(order, mixed=mixed) and not set(given or view) <= set(board.GROUP)

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in board.GROUP)

    settings = len(set(map(place, rows)))
    if grouped:
        shown = given or view
        for (model, task, length, question), part in groupby(rows, key=place):
            title = f"{model}, {task}, {length} tokens, question {question}"
            inside = [name for name in shown if name not in board.GROUP]
            out.print(title, style="italic", markup=False, emoji=False, highlight=False, soft_wrap=True)
            out.print(_table("", list(part), inside, board.COLUMNS))
        out.print(f"{len(rows)} runs, ranked within each of {settings} tasks and lengths." if settings > 1
                  else f"{len(rows)} runs.", style="dim", highlight=False)  # fmt: skip
    else:
        title = f"{len(rows)} runs" + (f" of {settings} tasks and lengths in one list" if settings > 1 else "")
        several = [name for name in board.GROUP if len({row[name] for row in rows}) > 1]
        out.print(_table(title, rows, given or [*several, *view], board.COLUMNS))
    if export is not None:
        out.print(str(export), style="dim", highlight=False, soft_wrap=True)


def _table(
    title: str, rows: Sequence[dict[str, Any]], names: Sequence[str], kinds: dict[str, tuple[str, str]]
) -> Table:
    """A table of the columns that hold anything; an interval whose mean stands before it is one column."""
    table = Table(title=title or None, title_justify="left")
    cells: list[Callable[[dict[str, Any]], str]] = []
    for name in names:
        if all(row[name] in (None, "", "{}") for row in rows) or (name == "accuracy_high" and "accuracy_low" in names):
            continue
        if name == "accuracy_low" and "accuracy_high" in names:
            table.add_column("95% interval", justify="right")
            cells.append(lambda row: f"{share(row['accuracy_low'])} to {share(row['accuracy_high'])}")
            continue
        table.add_column(
            name.removesuffix("_s").replace("_", " "), justify="left" if kinds[name][0] == "VARCHAR" else "right"
        )
        cells.append(lambda row, name=name: readable(name, row[name]))  # type: ignore[misc]
    for row in rows:
        table.add_row(*(cell(row) for cell in cells))
    return table


def readable(name: str, value: Any) -> str:
    """A value of a column in the unit that reads best."""
    from kvbench.compare.wording import bytes_text, seconds_text  # noqa: PLC0415

    if value is None:
        return "–"
    if name in SHARES or name.startswith("accuracy"):
        return share(value)
    if name.endswith("_bytes"):
        return bytes_text(value)
    if name.endswith("_s"):
        return seconds_text(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _means(found: Sequence[Average], names: Mapping[tuple[str, str], str]) -> Table:
    table = Table(title=f"{found[0].title}\n{', '.join(found[0].tasks)}", title_justify="left")
    table.add_column("policy")
    table.add_column("budget")
    for column in ("score", "examples", "bytes", "TPOT p50"):
        table.add_column(column, justify="right")
    for one in found:
        score = share(one.score) if one.score is not None else f"– (not run: {', '.join(one.lacks)})"
        table.add_row(
            names[one.policy, one.policy_options], one.budget, score, str(one.examples),
            readable("total_bytes", one.total_bytes), readable("tpot_p50_s", one.tpot_p50_s),
        )  # fmt: skip
    return table
