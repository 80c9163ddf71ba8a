"""`kvbench sweep`: a resumable grid of runs from a YAML file."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.api.results import label_of
from kvbench.api.sweep import execute
from kvbench.cli.common import Json, app, err, interruptible, out, share
from kvbench.cli.plan import duration
from kvbench.cli.tracking import Tracking, Trackio, WandB

if TYPE_CHECKING:
    from kvbench.runs.sweep import Outcome, Planned


@app.command()
@interruptible
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file: policies, budgets, tasks, context_lengths, seeds, models.")],
    engine: Annotated[str, typer.Option(help="local: one run after another; ray: on a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="With --engine ray: the cluster to join. [default: start one on this machine]")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="With --engine ray: runs at once. [default: one for each GPU, else for each node]"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the run folders.")] = Path("kvbench-runs"),
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Run the I-th of N parts; the others are for other processes or machines (job arrays)."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute every run anew; earlier results are moved to OUTPUT/.replaced.")
    ] = False,
    wandb: WandB = None,
    trackio: Trackio = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate, list the runs with estimated time and memory, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run every combination in a file; the same command continues a sweep that was stopped.

    Runs that fail leave the others alone, are listed at the end, and make the exit code 2.
    """
    tracking = Tracking(wandb, trackio)
    listing = functools.partial(_list, as_json=as_json, elsewhere=address is not None) if dry_run else None
    found = execute(
        file, _Progress(tracking), engine=engine, address=address, workers=workers, output=output, shard=shard,
        fresh=fresh, dry_run=listing,
    )  # fmt: skip
    if dry_run:
        return
    if as_json:
        print(json.dumps(found.document(), indent=2))
    elif found.runs:
        out.print(found.table())
    for label, reason in found.failures.items():
        err.print(f"Failed: {label}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    found.require()
    tracking.end()


def _list(plans: Sequence[Planned], as_json: bool, *, elsewhere: bool) -> None:
    """List the runs, with what they are estimated to take where they would run on this machine."""
    from kvbench.cli.plan import print_estimates  # noqa: PLC0415

    documents = [plan.config.model_dump(mode="json") for plan in plans]
    if elsewhere:
        if as_json:
            print(json.dumps({"schema": 1, "planned": documents}, indent=2))
            return
        for plan in plans:
            out.print(_label(plan), highlight=False, soft_wrap=True)
        out.print(
            f"{len(plans)} runs of {plans[0].config.examples} examples; nothing was run, and nothing estimated, since "
            "they run on another machine.", style="dim",
        )  # fmt: skip
        return
    from kvbench.runs.estimate import estimate  # noqa: PLC0415

    groups: dict[tuple[str, str], list[Planned]] = {}
    for plan in plans:
        groups.setdefault((plan.model.model_dump_json(), plan.config.model_fingerprint), []).append(plan)
    found, device = [], None
    with err.status("Loading") as status:
        for together in groups.values():
            name = Path(together[0].model.name).name
            status.update(f"Loading {name}")
            loaded = together[0].load()
            device = loaded.device
            found += estimate(
                [plan.config for plan in together], loaded,
                lambda what, name=name: status.update(f"Measuring {name}: {what}"),  # type: ignore[misc]
            )  # fmt: skip
            del loaded
    assert device is not None
    order = {plan.config.hash: number for number, plan in enumerate(plans)}
    found.sort(key=lambda one: order[one.config.hash])
    print_estimates(found, {plan.config.hash: _label(plan) for plan in plans}, device, as_json, planned=documents)


class _Progress:
    """A line on stderr for each finished run, and a live bar on a terminal, both with an estimate of the time left.

    The estimate takes the time of an example to be proportional to its context.
    """

    def __init__(self, tracking: Tracking) -> None:
        from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

        self._bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[left]}"), console=err
        )
        self._ended = 0
        self._tracking = tracking
        self._done: dict[str, int] = {}
        self._skipped: dict[str, int] = {}
        self._began: float | None = None

    def begin(self, plans: Sequence[Planned]) -> None:
        self._bar = self._bars.add_task("", total=sum(map(_work, plans)), left="")
        self._runs = len(plans)
        self._work = {plan.config.hash: _work(plan) for plan in plans}

    def __enter__(self) -> _Progress:
        if err.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def examples(self, planned: Planned, done: int) -> None:
        key, work = planned.config.hash, done * planned.config.context_length
        if self._began is None:
            self._began = time.monotonic()
        self._skipped.setdefault(key, work)  # what an earlier command did
        self._done[key] = work
        self._show(_label(planned))

    def finished(self, outcome: Outcome) -> None:
        self._ended += 1
        key = outcome.planned.config.hash
        if outcome.error is not None or key not in self._done:
            self._skipped[key] = self._work[key] - self._done.get(key, 0) + self._skipped.get(key, 0)
        self._done[key] = self._work[key]
        accuracy = share(outcome.document["metrics"]["accuracy"]["mean"]) if outcome.document else ""
        ended = f"accuracy {accuracy}" if outcome.document else f"failed: {outcome.error}"
        if outcome.document is not None:
            self._tracking.tell(outcome.document)
        self._print(f"[{self._ended}/{self._runs}] {_label(outcome.planned)}: {ended}{self._left()}")
        self._show("")

    def warn(self, message: str) -> None:
        self._print(f"Warning: {message}", "yellow")

    def say(self, message: str) -> None:
        self._print(message)

    def _print(self, text: str, style: str = "") -> None:
        self._bars.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _show(self, label: str) -> None:
        self._bars.update(
            self._bar, completed=sum(self._done.values()), description=label, left=self._left().lstrip("; ")
        )

    def _left(self) -> str:
        worked = sum(self._done.values()) - sum(self._skipped.values())
        left = sum(self._work.values()) - sum(self._done.values())
        if not worked or not left or self._began is None:
            return ""
        return f"; about {duration(left * (time.monotonic() - self._began) / worked)} left"


def _label(planned: Planned) -> str:
    return label_of(planned.config.model_dump(mode="json"))


def _work(planned: Planned) -> int:
    return planned.config.examples * planned.config.context_length
