"""`kvbench report`: finished runs as a page to read and send on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.common import Json, app, byte_size, err, listed, out


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Folders of runs and analyses, or folders that hold such."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("kvbench-report"),
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="html, md or pdf; several by commas, or the option again. [default: html]"),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Points below exact attention that the recommendation allows. [default: 1]")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="The same in nats per token, of tasks that measure it.")] = None,
    size: Annotated[str | None, typer.Option("--bytes", help="Bytes at most of what is recommended: 2GiB.")] = None,
    as_json: Json = False,
) -> None:
    """Write a report of runs: leaderboard, figures and how each was made; HTML that opens without a network."""
    from kvbench.compare.candidates import Limits  # noqa: PLC0415
    from kvbench.report import build  # noqa: PLC0415  torch takes seconds to import; --help stays quick
    from kvbench.report.page import count  # noqa: PLC0415

    names = listed(formats or "html")
    asked = [("--max-drop", max_drop), ("--max-kl", max_kl), ("--bytes", size)]
    command = shlex.join(
        ["kvbench", "report", *map(str, folders), "--format", ",".join(names), "--output", str(output),
         *(word for flag, value in asked if value is not None for word in (flag, str(value)))]
    )  # fmt: skip
    limits = Limits(1.0 if max_drop is None and max_kl is None else max_drop, max_kl, byte_size("--bytes", size))
    with err.status("Drawing the figures"):
        done = build(folders, output, names, command=command, limits=limits)
    for problem in done.found.problems:
        err.print(f"Warning: {problem}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(done.document(), indent=2))
        return
    partial = sum(run.partial for run in done.found.runs)
    out.print(
        f"{count(len(done.found.runs), 'run')}{f' ({partial} partial)' if partial else ''}, "
        f"{count(len(done.found.analyses), 'analysis', 'analyses')}, "
        f"{count(sum(chart.paint is not None for chart in done.charts), 'figure')}.",
        highlight=False,
    )
    for chart in done.charts:
        if chart.missing:
            out.print(f"{chart.title}: {chart.missing}", style="dim", highlight=False, markup=False, soft_wrap=True)
    for name in names:
        out.print(str(output / f"report.{name}"), style="dim", highlight=False, markup=False, soft_wrap=True)
