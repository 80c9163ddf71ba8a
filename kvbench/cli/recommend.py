"""`kvbench recommend`: the smallest budget of each policy that stays near exact attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kvbench.cli.common import Json, app, byte_size, err, listed, load_registry, out, share

if TYPE_CHECKING:
    from kvbench.compare.candidates import Candidate, Scope


@app.command()
def recommend(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, at any depth.", metavar="DIR...")],
    max_drop: Annotated[
        float | None,
        typer.Option(help="Points of accuracy below exact attention at most. [default: 1, without --max-kl]"),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Divergence from exact attention at most, nats per token (task fidelity).")
    ] = None,
    size: Annotated[str | None, typer.Option("--bytes", help="Bytes of all tiers and the index at most: 2GiB.")] = None,
    device_size: Annotated[
        str | None, typer.Option("--device-bytes", help="Bytes on the model's device at most.")
    ] = None,
    context_length: Annotated[int | None, typer.Option(min=1, help="Of the runs of this length alone.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="This task alone; several by commas, or the option again.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Judge the runs that meet a condition: column=value, as in `kvbench leaderboard`."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every budget, not one of each policy.")] = False,
    as_json: Json = False,
) -> None:
    """Say which policy and budget to use: within a limit of exact attention, with interval, bytes and latency."""
    load_registry()
    from kvbench.compare.recommend import BASELINE  # noqa: PLC0415
    from kvbench.compare.recommend import recommend as decide  # noqa: PLC0415  scipy takes seconds to import

    if where:
        from kvbench.compare.leaderboard import select  # noqa: PLC0415

        folders = [run for root in folders for run in select(root, where, beside=BASELINE)]
    found = decide(
        folders, max_drop=max_drop, max_kl=max_kl, bytes=byte_size("--bytes", size),
        device_bytes=byte_size("--device-bytes", device_size), context_length=context_length, task=listed(task),
    )  # fmt: skip
    for sentence in found.left_out:
        err.print(f"Warning: {sentence}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(found.document(), indent=2))
        return
    for scope in found.scopes:
        out.print(_table(scope, scope.candidates if everything else scope.choices))
        for sentence in scope.sentences:
            out.print(f"- {sentence}", highlight=False, soft_wrap=True)
        out.print()


_VERDICTS = {"within": "within", "beyond": "beyond", "unknown": "cannot tell"}


def _table(scope: Scope, shown: tuple[Candidate, ...]) -> Table:
    from kvbench.compare.wording import bytes_text, count, points, seconds_text  # noqa: PLC0415

    names = [*scope.tasks, *scope.kl_tasks]
    over = f" (means over {count(len(names), 'task')})" if len(names) > 1 else ""
    title = f"{scope.title}\n{', '.join(names)}{over}"
    exact = [] if scope.accuracy is None else [share(scope.accuracy)]
    exact += [bytes_text(sum(scope.bytes.values())), f"TTFT {seconds_text(scope.ttft_s)}",
              f"TPOT {seconds_text(scope.tpot_s)}"]  # fmt: skip
    table = Table(title=f"{title}; exact attention: {', '.join(exact)}", title_justify="left")
    table.add_column("policy")
    table.add_column("budget")
    table.add_column("limit")
    for column in ("difference", "95% interval", "examples", "KL", "bytes", "on device", "TTFT", "TPOT"):
        if column != "KL" or scope.kl_tasks:
            table.add_column(column, justify="right")
    for one in shown:
        found = one.difference
        cells = ["–", "–"] if found is None else [
            f"{points(found.difference)}", f"{points(found.ci95[0])} to {points(found.ci95[1])}"
        ]  # fmt: skip
        kl = "–"
        if one.kl is not None and one.kl_ci95 is not None:
            kl = f"{one.kl:.3g} ({one.kl_ci95[0]:.2g} to {one.kl_ci95[1]:.2g})"
        verdict = _VERDICTS[one.verdict] + ("" if one.fits else ", too large") + (" (over budget)" * one.over_budget)
        table.add_row(
            one.policy, one.budget, verdict, *cells, str(one.examples), *([kl] if scope.kl_tasks else []),
            bytes_text(one.total_bytes), bytes_text(one.bytes["resident"]), seconds_text(one.ttft_s),
            seconds_text(one.tpot_s),
        )  # fmt: skip
    return table
