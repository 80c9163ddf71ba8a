"""`kvbench compare`: paired differences between finished runs and a baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kvbench.cli.common import Json, app, err, load_registry, out, share

if TYPE_CHECKING:
    from kvbench.compare.comparison import Comparison


@app.command()
def compare(
    baseline: Annotated[Path, typer.Argument(help="A run's folder, or a folder with the runs of one configuration.")],
    others: Annotated[list[Path], typer.Argument(help="Folders of runs to compare with it.", metavar="DIR...")],
    skip_unfinished: Annotated[
        bool, typer.Option("--skip-unfinished", help="Leave out runs that are not finished, and name them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare runs with a baseline on the same examples: differences, intervals, tests corrected by Holm's method."""
    load_registry()
    from kvbench.compare.comparison import compare as compare_runs  # noqa: PLC0415  scipy takes seconds to import

    found, skipped = compare_runs(baseline, others, skip_unfinished=skip_unfinished)
    for sentence in skipped:
        err.print(f"Warning: {sentence}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps({"schema": 1, "comparisons": [entry.document() for entry in found]}, indent=2))
        return
    for place in dict.fromkeys((entry.model, entry.task, entry.context_length, entry.baseline) for entry in found):
        here = [e for e in found if (e.model, e.task, e.context_length, e.baseline) == place]
        out.print(_table(here))
    tests = {"mcnemar": "McNemar's exact test", "permutation": "paired permutation test"}
    used = " and ".join(tests[name] for name in dict.fromkeys(entry.result.test for entry in found))
    out.print(
        f"Differences are policy minus baseline, with 95% bootstrap intervals; p by {used}; p (Holm) is corrected for "
        f"{len(found)} comparison{'s' * (len(found) > 1)}.",
        style="dim", highlight=False,
    )  # fmt: skip


def _table(entries: list[Comparison]) -> Table:
    first = entries[0]
    table = Table(
        title=f"{first.model}, {first.task}, {first.context_length} tokens; baseline {first.baseline}, "
        f"accuracy {share(first.result.mean_a)}",
        title_justify="left",
    )
    table.add_column("policy")
    for column in ("accuracy", "difference", "95% interval", "won / lost / tied", "p", "p (Holm)", "examples", "seeds"):
        table.add_column(column, justify="right")
    for entry in entries:
        r = entry.result
        name = entry.candidate + (" (over budget)" if entry.over_budget else "")
        table.add_row(
            name, share(r.mean_b), f"{100 * r.difference:+.1f}%",
            f"{100 * r.ci95[0]:+.1f} to {100 * r.ci95[1]:+.1f}%", f"{r.wins} / {r.losses} / {r.ties}",
            f"{r.p_value:.3g}", f"{entry.p_holm:.3g}", f"{r.n}" + (f" ({r.unpaired} unpaired)" if r.unpaired else ""),
            f"{len(r.by_seed)}" + ("" if r.seed_std is None else f", sd {100 * r.seed_std:.1f}%"),
        )  # fmt: skip
    return table
