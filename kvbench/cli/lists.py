"""`kvbench policies|budgets|indexes|tasks|probes|analyses|models`: what is installed, and one of each described."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from kvbench.cli.common import Json, Name, app, load_catalogue, out
from kvbench.contract.errors import KVBenchError

if TYPE_CHECKING:
    from kvbench.catalogue import Entry


def _list(kind: str, name: str | None, as_json: bool) -> None:
    found = load_catalogue()
    rows = [_row(entry) for entry in ([found.find(kind, name)] if name else found.entries[kind].values())]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif name:
        _detail(rows[0], found.find(kind, name).doc)
    else:
        _overview(rows)


def _row(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in vars(entry).items() if name != "doc"}


def _overview(rows: list[dict[str, Any]]) -> None:
    table = Table(show_header=True, box=None, pad_edge=False)
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("summary")
    for row in rows:
        table.add_row(row["name"], row["summary"])
    out.print(table)


def _detail(row: dict[str, Any], doc: str) -> None:
    out.print(f"[bold]{escape(row['name'])}[/bold]: {escape(row['summary'])}", highlight=False, markup=True)
    for paragraph in doc.split("\n\n"):
        out.print(" ".join(paragraph.split()), highlight=False, markup=False)
    if row["reference"]:
        out.print(f"Reference: {row['reference']}", highlight=False, markup=False)
    if not row["options"]:
        out.print("No options.")
        return
    table = Table(title="options", title_justify="left")
    for column in ("name", "type", "default", "description"):
        table.add_column(column)
    for option in row["options"]:
        table.add_row(option["name"], option["type"], str(option["default"]), option["description"])
    out.print(table)


@app.command()
def policies(name: Name = None, as_json: Json = False) -> None:
    """List the policies, or describe one."""
    _list("policy", name, as_json)


@app.command()
def budgets(name: Name = None, as_json: Json = False) -> None:
    """List the budget allocators, or describe one."""
    _list("budget", name, as_json)


@app.command()
def indexes(name: Name = None, as_json: Json = False) -> None:
    """List the vector indexes, or describe one."""
    _list("index", name, as_json)


@app.command()
def tasks(name: Name = None, as_json: Json = False) -> None:
    """List the tasks, or describe one."""
    _list("task", name, as_json)


@app.command()
def probes(name: Name = None, as_json: Json = False) -> None:
    """List the probes, or describe one."""
    _list("probe", name, as_json)


@app.command()
def analyses(name: Name = None, as_json: Json = False) -> None:
    """List the analyses, or describe one."""
    _list("analysis", name, as_json)


@app.command()
def models(name: Name = None, as_json: Json = False) -> None:
    """List the models known by name, or describe one; any Hugging Face id or local folder works as well."""
    import dataclasses  # noqa: PLC0415
    import difflib  # noqa: PLC0415

    from kvbench.models import MODELS  # noqa: PLC0415

    if name is not None and name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1) or sorted(MODELS)
        raise KVBenchError(
            f"Unknown model '{name}': did you mean {near[0]}? Hugging Face ids and folders are not listed."
        )
    rows = [{**dataclasses.asdict(card), "options": []} for card in MODELS.values() if name in (None, card.name)]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif name:
        for key, value in rows[0].items():
            if key != "options":
                out.print(f"{key.replace('_', ' ')}: {value}", highlight=False)
    else:
        _overview(rows)
