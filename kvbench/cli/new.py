"""`kvbench new`: the package of a new plugin."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.common import Json, app, load_catalogue, out


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help="policy, index, budget, task, probe or analysis.")],
    name: Annotated[str, typer.Argument(help="Its name, by which users choose it: letters, digits and underscores.")],
    output: Annotated[Path, typer.Option(help="Folder in which the package's own folder is made.")] = Path(),
    as_json: Json = False,
) -> None:
    """Write a package with a plugin that works, its tests and a regression gate, to change into your own."""
    known = load_catalogue()
    from kvbench.scaffold import create  # noqa: PLC0415  --help stays quick

    folder = create(kind, name, output, known)
    written = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    if as_json:
        print(json.dumps({"schema": 1, "folder": str(folder), "files": written}, indent=2))
        return
    out.print(f"{folder}: {', '.join(written)}", highlight=False, soft_wrap=True)
    out.print("Its tests pass as they are:", highlight=False)
    out.print(f"  cd {shlex.quote(str(folder))} && pip install -e '.[test]' && pytest", highlight=False, soft_wrap=True)
