"""`kvbench.sweep`: a resumable grid of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kvbench.api.given import one_of
from kvbench.api.progress import Reporter, Told
from kvbench.api.results import RunResult, SweepResults, label_of
from kvbench.api.run import plugins
from kvbench.contract.errors import KVBenchError, check_output
from kvbench.runs.shard import shard_named

if TYPE_CHECKING:
    from kvbench.runs.sweep import Outcome, Planned


class SweepReporter(Reporter, Protocol):
    """Is told how far a sweep is; a context, entered while it works."""

    def begin(self, plans: Sequence[Planned]) -> None:
        """These runs are planned."""

    def examples(self, planned: Planned, done: int) -> None:
        """`done` examples of a run are finished."""

    def finished(self, outcome: Outcome) -> None:
        """A run has ended."""

    def __enter__(self) -> Any:
        """Start to show it."""

    def __exit__(self, *error: object) -> None:
        """Stop to show it."""


class _Shown:
    """The line that Python's callers see, if any."""

    def __init__(self, told: Told) -> None:
        self._told, self._of, self._ended = told, 0, 0
        self.warn, self.say = told.warn, told.say

    def begin(self, plans: Sequence[Planned]) -> None:
        self._of = len(plans)

    def examples(self, planned: Planned, done: int) -> None:
        label = label_of(planned.config.model_dump(mode="json"))
        self._told.show(f"[{self._ended + 1}/{self._of}] {label}: {done} of {planned.config.examples} examples")

    def finished(self, outcome: Outcome) -> None:
        self._ended += 1

    def __enter__(self) -> None:
        self._told.__enter__()

    def __exit__(self, *error: object) -> None:
        self._told.__exit__(None, None, None)


def sweep(
    file: str | Path | Mapping[str, Any],
    *,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    workers: int | None = None,
    output: str | Path = "kvbench-runs",
    shard: str | None = None,
    fresh: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
) -> SweepResults:
    """Run every combination of a sweep, as the command `kvbench sweep` does with the same options.

    `file` is the YAML file, or what it would hold as a mapping: policies, budgets, tasks, context_lengths, seeds,
    models. `shard="3/16"` runs the third of sixteen parts; the others are for other processes or machines, and all may
    write to one folder. Runs that fail are in the result's `failures`, with a warning; KVBenchError where none could
    run, and for a sweep that cannot be, with everything that is wrong with it.
    """
    told = Told(progress)
    found = execute(
        file, _Shown(told), engine=engine, address=address, workers=workers, output=output, shard=shard,
        fresh=fresh, dry_run=(lambda _: None) if dry_run else None,
    )  # fmt: skip
    for label, reason in found.failures.items():
        told.warn(f"Failed: {label}: {reason}")
    if not found.runs and not dry_run:
        found.require()
    return found


def execute(
    file: str | Path | Mapping[str, Any], reporter: SweepReporter, *, engine: str, address: str | None,
    workers: int | None, output: str | Path, shard: str | None, fresh: bool,
    dry_run: Callable[[Sequence[Planned]], None] | None,
) -> SweepResults:  # fmt: skip
    """What `sweep` and the command share; runs that fail are in the result, whatever became of the others.

    `dry_run` is given what would run, in place of running it.
    """
    one_of("--engine", engine, ("local", "ray"))
    if engine == "local" and (address is not None or workers is not None):
        raise KVBenchError("--address and --workers need --engine ray.")
    part = shard_named(shard)
    folder = Path(output)
    check_output(folder)
    plugins(reporter)
    from kvbench.runs.results import replace  # noqa: PLC0415
    from kvbench.runs.sweep import plan_sweep, run_local  # noqa: PLC0415  torch takes seconds to import
    from kvbench.runs.sweep_file import load  # noqa: PLC0415

    source = file if isinstance(file, Mapping) else Path(file)
    load(source)  # a malformed file is told before a cluster starts
    if engine == "ray":
        from kvbench.runs.ray import cluster  # noqa: PLC0415

        joining: Any = cluster(address, workers)
    else:
        joining = nullcontext()
    with joining as joined:
        if joined is None:
            plans = plan_sweep(source)
        else:
            here = 0 if address else joined.workers(joined.device)[0]
            plans = plan_sweep(source, here=here, device=joined.device)
        if not any(plan.config.policy == "full" for plan in plans) and not any(folder.glob("full-*/run.json")):
            reporter.say(
                "No run of `full`, exact attention, is among these; `kvbench recommend`, `compare` and `report` set "
                "the others against it. Add full to the file's policies."
            )
        plans = part.of_runs(plans)
        outcomes: list[Outcome] = []
        if dry_run is None:
            reporter.begin(plans)
            with reporter:
                moved = [replace(folder, plan.config) for plan in plans] if fresh else []
                for place in filter(None, moved):
                    reporter.warn(f"earlier results are in {place} now.")
                outcomes = (joined.run if joined is not None else run_local)(plans, folder, reporter)
    if dry_run is not None:
        dry_run(plans)
    outcomes.sort(key=lambda outcome: plans.index(outcome.planned))
    configs = {id(outcome): outcome.planned.config.model_dump(mode="json") for outcome in outcomes}
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    reasons: dict[str, str] = {}
    for outcome in failed:
        label = label_of(configs[id(outcome)])
        reasons[f"{label} ({outcome.folder.name})" if label in reasons else label] = str(outcome.error)
    return SweepResults(
        tuple(RunResult.of(outcome.document) for outcome in outcomes if outcome.document is not None),
        failures=reasons,
        failed=[
            {"config": configs[id(outcome)], "folder": str(outcome.folder), "error": outcome.error}
            for outcome in failed
        ],
        planned=[plan.config.model_dump(mode="json") for plan in plans], dry=dry_run is not None,
    )  # fmt: skip
