"""`kvbench results`: compact results for a repository, and the pages that are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.common import Json, app, load_registry, out
from kvbench.contract.errors import KVBenchError, check_output, unwritable

results = typer.Typer(help="Compact results for a repository, and the pages made of them.", no_args_is_help=True)
app.add_typer(results, name="results")


@results.command("pack")
def pack_command(
    sources: Annotated[list[Path], typer.Argument(help="Folders with finished runs, at any depth.", metavar="DIR...")],
    output: Annotated[Path, typer.Option(help="Folder for the compact ones.")],
    as_json: Json = False,
) -> None:
    """Write finished runs compactly: configuration, metrics and each example's score, without prompts and vectors."""
    check_output(output)
    from kvbench.runs.packed import pack  # noqa: PLC0415

    made = pack(sources, output)
    size = sum(file.stat().st_size for folder in made for file in folder.iterdir())
    if as_json:
        print(json.dumps({"schema": 1, "folders": [str(folder) for folder in made], "bytes": size}, indent=2))
        return
    out.print(f"{len(made)} runs, {size / 1024:.0f} KiB, in {output}", highlight=False, soft_wrap=True)


@results.command("page")
def page_command(
    folder: Annotated[Path, typer.Argument(help="Folder with runs, whole or packed.")],
    output: Annotated[Path, typer.Option(help="The Markdown file to write.")],
    published: Annotated[Path, typer.Option(help="File of published figures and claims.")],
    repository: Annotated[Path, typer.Option(help="Repository that the runs' commits are held to.")] = Path(),
) -> None:
    """Make the page of reference results: tables with intervals, rankings, and where published claims hold."""
    load_registry()
    if not folder.is_dir():
        raise KVBenchError(f"There is no folder {folder}: give one with runs.")
    from kvbench.report.reference import page  # noqa: PLC0415  scipy takes seconds to import

    _write(page(folder, published, repository), output)


@results.command("answers")
def answers_command(
    folder: Annotated[Path, typer.Argument(help="Folder with runs, whole or packed.")],
    output: Annotated[Path, typer.Option(help="The Markdown file to write.")],
    repository: Annotated[Path, typer.Option(help="Repository that the runs' commits are held to.")] = Path(),
) -> None:
    """Make the page of long answers: right lines, lengths, bytes and times of each policy, and published findings."""
    load_registry()
    if not folder.is_dir():
        raise KVBenchError(f"There is no folder {folder}: give one with runs.")
    from kvbench.report.answers_page import answers_page  # noqa: PLC0415  scipy takes seconds to import

    _write(answers_page(folder, repository), output)


def _write(text: str, output: Path) -> None:
    try:
        output.write_text(text, "utf-8")
    except OSError as error:
        raise KVBenchError(unwritable(output, error)) from None
    out.print(str(output), highlight=False, soft_wrap=True)
