"""`kvbench history`: the same cells of two commits, and what changed beyond noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvbench.cli.common import Json, app, err, load_registry, out


@app.command()
def history(
    before: Annotated[Path, typer.Argument(help="Folder with the runs of one commit, whole or packed.")],
    after: Annotated[Path, typer.Argument(help="Folder with the runs of another.")],
    everything: Annotated[bool, typer.Option("--all", help="Show figures that changed within noise, too.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the same cells of two commits on the same examples: accuracy, TTFT, TPOT and bytes beyond noise."""
    load_registry()
    from kvbench.compare.history import history as compare_commits  # noqa: PLC0415  scipy takes seconds to import

    found = compare_commits(before, after)
    for sentence in found.skipped:
        err.print(f"Warning: {sentence}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    sure = [change for change in found.changes if change.beyond_noise]
    if as_json:
        print(json.dumps({
            "schema": 1, "before": found.before, "after": found.after,
            "changes": [change.document() for change in found.changes],
        }, indent=2))  # fmt: skip
        return
    shown = found.changes if everything else sure
    if shown:
        table = Table(title=f"{', '.join(found.before)} to {', '.join(found.after)}", title_justify="left")
        table.add_column("run", overflow="fold")
        table.add_column("figure")
        for column in ("before", "after", "change", "95% interval", "examples"):
            table.add_column(column, justify="right")
        for change in shown:
            low, high = change.ci95
            table.add_row(
                change.cell + (f" ({change.note})" if change.note else ""), change.figure, f"{change.before:.4g}",
                f"{change.after:.4g}", f"{100 * change.change:+.1f}%", f"{100 * low:+.1f} to {100 * high:+.1f}%",
                str(change.n),
            )  # fmt: skip
        out.print(table)
    cells = len({change.cell for change in found.changes})
    out.print(
        f"{len(sure)} of {len(found.changes)} figures of {cells} cells changed beyond noise. Accuracy: difference on "
        "the same examples, p corrected by Holm's method; times and bytes: ratio less 1, by the 95% interval of the "
        "mean logarithm, and by at least 5%.", style="dim", highlight=False,
    )  # fmt: skip
