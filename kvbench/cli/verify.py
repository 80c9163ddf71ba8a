"""`kvbench verify`: do a run's numbers follow from its examples?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.common import Json, app, err, load_registry, out
from kvbench.contract.errors import KVBenchError


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder, or one that holds runs.")],
    redraw: Annotated[
        bool,
        typer.Option("--redraw", help="Make the examples again, too, and compare references and prompts' lengths."),
    ] = False,
    closed: Annotated[
        bool, typer.Option("--closed", help="Refuse any file below DIR that is neither part of a run nor a README.md.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compute every score and metric of runs again from their examples, and tell what does not hold.

    Also told: files that were changed after the run, that are missing, and that are no part of it.
    """
    load_registry()
    from kvbench.runs.verify import verify as verify_runs  # noqa: PLC0415  scipy takes seconds to import

    found = verify_runs(folder, redraw=redraw, closed=closed)
    wrong = [run for run in found if run.faults]
    if as_json:
        print(json.dumps({"schema": 1, "runs": [run.document() for run in found]}, indent=2))
    else:
        for run in found:
            what = f"{run.examples} examples, {run.scores} scores computed again"
            out.print(f"{run.path}: {'does not hold' if run.faults else 'holds'} ({what})", highlight=False)
            for fault in run.faults:
                err.print(f"  {fault}", style="red", highlight=False, soft_wrap=True)
            for note in run.notes:
                out.print(f"  {note}", style="dim", highlight=False, soft_wrap=True)
    if wrong:
        what = "folders" if closed else "runs"
        raise KVBenchError(f"{len(wrong)} of {len(found)} {what} do not hold: run them again, or leave them out.")
