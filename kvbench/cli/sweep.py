"""`kvbench sweep`: a resumable grid of runs from a YAML file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvbench.cli.common import Json, app, err, interruptible, load_registry, out, seconds, share
from kvbench.cli.plan import duration
from kvbench.contract.errors import KVBenchError, check_output

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
        typer.Option(min=1, help="With --engine ray: runs at once. [default: one for each GPU, else for each node]"),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the run folders.")] = Path("kvbench-runs"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute every run anew; earlier results are moved to OUTPUT/.replaced.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate, list the runs with estimated time and memory, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run every combination in a file; the same command continues a sweep that was stopped.

    Runs that fail leave the others alone, are listed at the end, and make the exit code 2.
    """
    if engine not in ("local", "ray"):
        raise KVBenchError(f"--engine {engine} is neither 'local' nor 'ray'.")
    if engine == "local" and (address is not None or workers is not None):
        raise KVBenchError("--address and --workers need --engine ray.")
    check_output(output)
    load_registry()
    from kvbench.runs.results import replace  # noqa: PLC0415
    from kvbench.runs.sweep import plan_sweep, run_local  # noqa: PLC0415  torch takes seconds to import
    from kvbench.runs.sweep_file import load  # noqa: PLC0415

    load(file)  # a malformed file is told before a cluster starts
    if engine == "ray":
        from kvbench.runs.ray import cluster  # noqa: PLC0415

        joining: Any = cluster(address, workers)
    else:
        joining = nullcontext()
    with joining as joined:
        if joined is None:
            plans = plan_sweep(file)
        else:
            plans = plan_sweep(file, here=0 if address else joined.workers(joined.device)[0], device=joined.device)
        outcomes: list[Outcome] = []
        if not dry_run:
            with _Progress(plans) as progress:
                moved = [replace(output, plan.config) for plan in plans] if fresh else []
                for folder in filter(None, moved):
                    progress.warn(f"earlier results are in {folder} now.")
                outcomes = (joined.run if joined is not None else run_local)(plans, output, progress)
    if dry_run:
        _list(plans, as_json, elsewhere=address is not None)
        return
    _report(sorted(outcomes, key=lambda outcome: plans.index(outcome.planned)), as_json)


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


def _report(outcomes: Sequence[Outcome], as_json: bool) -> None:
    failures = [outcome for outcome in outcomes if outcome.error is not None]
    done = [outcome for outcome in outcomes if outcome.document is not None]
    if as_json:
        failed = [
            {"config": o.planned.config.model_dump(mode="json"), "folder": str(o.folder), "error": o.error}
            for o in failures
        ]
        print(json.dumps({"schema": 1, "runs": [o.document for o in done], "failures": failed}, indent=2))
    elif done:
        out.print(_table(done))
    for outcome in failures:
        err.print(
            f"Failed: {_label(outcome.planned)}: {outcome.error}", style="red", highlight=False, markup=False,
            soft_wrap=True,
        )  # fmt: skip
    if failures:
        raise KVBenchError(
            f"{len(failures)} of {len(outcomes)} runs failed; the others are kept, and the same command tries these "
            "again."
        )


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title=f"{len(outcomes)} runs", title_justify="left")
    for column in ("model", "task", "tokens", "seed", "policy"):
        table.add_column(column)
    for column in ("accuracy", "95% interval", "recall@k", "density", "TTFT, s", "TPOT p50, ms"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        assert outcome.document is not None
        config, m = outcome.document["config"], outcome.document["metrics"]
        table.add_row(
            Path(config["model"]).name, config["task"], str(config["context_length"]), str(config["seed"]),
            _policy(outcome.planned) + (" (over budget)" if m.get("over_budget") else ""), share(m["accuracy"]["mean"]),
            " to ".join(share(end) for end in m["accuracy"]["ci95"]), share(m["recall_at_k"]), share(m["density"]),
            seconds(m["ttft_s"]["total"]), seconds(m["tpot_s"]["p50"], 1000),
        )  # fmt: skip
    return table


def _policy(planned: Planned) -> str:
    from kvbench.compare.comparison import describe  # noqa: PLC0415

    return describe(planned.config.model_dump(mode="json"))


def _label(planned: Planned) -> str:
    config = planned.config
    model = Path(config.model).name
    return f"{_policy(planned)} on {model}, {config.task}, {config.context_length} tokens, seed {config.seed}"


class _Progress:
    """A line on stderr for each finished run, and a live bar on a terminal, both with an estimate of the time left.

    The estimate takes the time of an example to be proportional to its context.
    """

    def __init__(self, plans: Sequence[Planned]) -> None:
        from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

        self._bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[left]}"), console=err
        )
        self._bar = self._bars.add_task("", total=sum(map(_work, plans)), left="")
        self._runs, self._ended = len(plans), 0
        self._done: dict[str, int] = {}
        self._skipped: dict[str, int] = {}
        self._work = {plan.config.hash: _work(plan) for plan in plans}
        self._began: float | None = None

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
        self._print(f"[{self._ended}/{self._runs}] {_label(outcome.planned)}: {ended}{self._left()}")
        self._show("")

    def warn(self, message: str) -> None:
        self._print(f"Warning: {message}", "yellow")

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


def _work(planned: Planned) -> int:
    return planned.config.examples * planned.config.context_length
