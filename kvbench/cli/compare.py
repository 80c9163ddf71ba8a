"""`kvbench compare`: paired differences between finished runs and a baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kvbench.cli.common import Json, app, err, listed, load_registry, out, share
from kvbench.contract.errors import KVBenchError

if TYPE_CHECKING:
    from kvbench.compare.comparison import Comparison


COLUMNS = {
    "accuracy": "accuracy", "difference": "difference", "interval": "95% interval", "won": "won / lost / tied",
    "p": "p", "p_holm": "p (Holm)", "examples": "examples", "seeds": "seeds",
}  # fmt: skip
"""Names of `--columns` and their headings."""


@app.command()
def compare(
    baseline: Annotated[Path, typer.Argument(help="A run's folder, or a folder with the runs of one configuration.")],
    others: Annotated[list[Path], typer.Argument(help="Folders of runs to compare with it.", metavar="DIR...")],
    skip_unfinished: Annotated[
        bool, typer.Option("--skip-unfinished", help="Leave out runs that are not finished, and name them.")
    ] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Compare the runs that meet a condition: column=value, as in `kvbench leaderboard`."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(help=f"Column to show; several by commas, or the option again: {', '.join(COLUMNS)}."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare runs with a baseline on the same examples: differences, intervals, tests corrected by Holm's method."""
    load_registry()
    from kvbench.compare.comparison import average_families  # noqa: PLC0415  scipy takes seconds to import
    from kvbench.compare.comparison import compare as compare_runs  # noqa: PLC0415
    from kvbench.compare.leaderboard import select  # noqa: PLC0415

    shown = listed(columns) or list(COLUMNS)
    for name in shown:
        if name not in COLUMNS:
            raise KVBenchError(f"Unknown column '{name}': choose from {', '.join(COLUMNS)}.")
    folders = [folder for root in others for folder in select(root, where)] if where else others
    found, skipped = compare_runs(baseline, folders, skip_unfinished=skip_unfinished)
    means, lacking = average_families(found)
    skipped += lacking
    for sentence in skipped:
        err.print(f"Warning: {sentence}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print(
            json.dumps(
                {
                    "schema": 1,
                    "comparisons": [entry.document() for entry in found],
                    "averages": [entry.document() for entry in means],
                },
                indent=2,
            )
        )
        return
    everything = [*means, *found]
    for place in dict.fromkeys((e.model, e.task, e.context_length, e.baseline) for e in everything):
        here = [e for e in everything if (e.model, e.task, e.context_length, e.baseline) == place]
        out.print(_table(here, shown))
    tests = {"mcnemar": "McNemar's exact test", "permutation": "paired permutation test"}
    used = " and ".join(tests[name] for name in dict.fromkeys(entry.result.test for entry in found))
    out.print(
        f"Differences are policy minus baseline, with 95% bootstrap intervals; p by {used}; p (Holm) is corrected for "
        f"{len(found)} comparison{'s' * (len(found) > 1)}.",
        style="dim", highlight=False,
    )  # fmt: skip


def _table(entries: list[Comparison], shown: list[str]) -> Table:
    first = entries[0]
    table = Table(
        title=f"{first.model}, {first.task}, {first.context_length} tokens; baseline {first.baseline}, "
        f"accuracy {share(first.result.mean_a)}",
        title_justify="left",
    )
    table.add_column("policy")
    named = {heading: name for name, heading in COLUMNS.items()}
    for heading in (
        "accuracy",
        "difference",
        "95% interval",
        "won / lost / tied",
        "p",
        "p (Holm)",
        "examples",
        "seeds",
    ):
        if named[heading] in shown:
            table.add_column(heading, justify="right")
    for entry in entries:
        r = entry.result
        name = entry.candidate + (" (over budget)" if entry.over_budget else "")
        cells = {
            "accuracy": share(r.mean_b), "difference": f"{100 * r.difference:+.1f}%",
            "interval": f"{100 * r.ci95[0]:+.1f} to {100 * r.ci95[1]:+.1f}%",
            "won": f"{r.wins} / {r.losses} / {r.ties}", "p": f"{r.p_value:.3g}", "p_holm": f"{entry.p_holm:.3g}",
            "examples": f"{r.n}" + (f" ({r.unpaired} unpaired)" if r.unpaired else ""),
            "seeds": (f"{len(r.by_seed)}" if r.by_seed else "–")
            + ("" if r.seed_std is None else f", sd {100 * r.seed_std:.1f}%"),
        }  # fmt: skip
        table.add_row(name, *(cells[column] for column in COLUMNS if column in shown))
    return table
