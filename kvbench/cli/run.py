"""`kvbench run`: policies on a task, side by side with exact attention."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbench.api.run import execute
from kvbench.cli.common import DeviceMap, Json, RopeScaling, app, err, interruptible, out, pairs
from kvbench.cli.tracking import Tracking, Trackio, WandB
from kvbench.runs.defaults import PROBE_TOKENS

if TYPE_CHECKING:
    from rich.progress import TaskID

    from kvbench.models import LoadedModel
    from kvbench.runs.results import RunConfig


@app.command()
@interruptible
def run(
    policy: Annotated[
        list[str],
        typer.Option(help="Policy, or `all`; several by commas, or the option again; `kvbench policies` lists them."),
    ],
    budget: Annotated[
        str, typer.Option(help="Allocator that shares the budget over the layers; with its size, too: pyramid:512.")
    ] = "uniform",
    tokens: Annotated[int | None, typer.Option(help="Tokens attended at a step, static set included.")] = None,
    ratio: Annotated[float | None, typer.Option(help="The same as a share of the context. [default: 0.1]")] = None,
    size_bytes: Annotated[
        str | None, typer.Option("--bytes", help="The same as key/value bytes over all layers, such as 64MiB.")
    ] = None,
    model: Annotated[str, typer.Option(help="Known name, Hugging Face id or local folder.")] = "smollm2-135m",
    task: Annotated[str, typer.Option(help="Task; `kvbench tasks` lists them.")] = "niah_single_1",
    context_length: Annotated[int, typer.Option(help="Tokens of prompt and answer together.")] = 2048,
    examples: Annotated[int, typer.Option(help="Number of examples.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the examples.")] = 42,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Option of the policy, name=value.")
    ] = None,
    budget_option: Annotated[list[str] | None, typer.Option(help="Option of the budget, name=value.")] = None,
    task_option: Annotated[list[str] | None, typer.Option(help="Option of the task, name=value.")] = None,
    question: Annotated[
        str,
        typer.Option(help="aware: the question is part of the prompt; agnostic: it goes through the policy after it."),
    ] = "aware",
    prefix: Annotated[
        str,
        typer.Option(
            help="cached: read and save each context once, and go on from it with every question about it; times to "
            "first token with this hit and without, and what the saved context costs. none: as usual."
        ),
    ] = "none",
    new_tokens: Annotated[int, typer.Option(help="Last tokens of the context that come after the cached prefix.")] = 0,
    prefill_chunk: Annotated[
        str | None,
        typer.Option(help="Compute the prompt this many tokens at a time; auto: as many as free memory has room for."),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            "--batch-size",
            "--batch",
            help="Generate so many examples at once, auto: as many as free memory has room for; the probed ones run "
            "alone. Where memory runs out, half as many are tried.",
        ),
    ] = "1",
    share_prefill: Annotated[
        bool | None,
        typer.Option(help="Compute each prompt once for all policies and probes. [default: yes, but not in batches]"),
    ] = None,
    decoding: Annotated[
        str,
        typer.Option(
            help="auto: one CUDA graph a step on a GPU where policy and model allow it; graph, fixed (the same steps, "
            "uncaptured) and eager (hook by hook) insist."
        ),
    ] = "auto",
    dense_layers: Annotated[
        int, typer.Option(help="First layers that attend to everything, beyond the budget, in every policy.")
    ] = 0,
    compress_every: Annotated[
        int | None,
        typer.Option(
            help="Let an evicting policy keep so many generated tokens, then score prompt and answer together and keep "
            "the budget's best, again and again; --tokens may then exceed the prompt."
        ),
    ] = None,
    recall_k: Annotated[int, typer.Option(help="k of recall@k.")] = 100,
    probe_examples: Annotated[
        int, typer.Option(help="Examples that are run once more with probes, for recall, mass and density.")
    ] = 1,
    probe_tokens: Annotated[
        str, typer.Option(help="First tokens of their answers that are generated with probes; all: the whole answer.")
    ] = str(PROBE_TOKENS),
    probe: Annotated[
        list[str] | None,
        typer.Option(
            help="Probe beyond the standard ones; several by commas, or the option again; `kvbench probes` lists them."
        ),
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Run `full` on the same examples.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: cuda where there is one]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. [default: float32 on the CPU]")] = None,
    rope_scaling: RopeScaling = None,
    device_map: DeviceMap = None,
    output: Annotated[Path, typer.Option(help="Folder for the run folders.")] = Path("kvbench-runs"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute everything anew; earlier results are moved to OUTPUT/.replaced.")
    ] = False,
    wandb: WandB = None,
    trackio: Trackio = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, estimate time and memory from a few short steps, and stop."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run policies on a task, beside exact attention, and print accuracy, recall, bytes and latency.

    A policy that fails leaves the others alone, is told at the end, and makes the exit code 2.
    """
    tracking = Tracking(wandb, trackio)
    estimates = functools.partial(_estimates, as_json=as_json) if dry_run else None
    given: dict[str, Any] = {"options": pairs(option), "budget_options": pairs(budget_option)}
    found = execute(
        policy, _Progress(), budget=budget, tokens=tokens, ratio=ratio, size_bytes=size_bytes, model=model, task=task,
        context_length=context_length, examples=examples, seed=seed, task_options=pairs(task_option), **given,
        question=question, prefix=prefix, new_tokens=new_tokens, prefill_chunk=prefill_chunk, batch_size=batch_size,
        share_prefill=share_prefill, decoding=decoding, dense_layers=dense_layers, compress_every=compress_every,
        recall_k=recall_k, probe_examples=probe_examples, probe_tokens=probe_tokens, probes=probe, baseline=baseline,
        device=device, dtype=dtype, rope_scaling=rope_scaling, device_map=device_map, output=output,
        fresh=fresh, dry_run=estimates,
    )  # fmt: skip
    if dry_run:
        return
    for name, reason in found.left_out.items():
        err.print(f"Left out {name}: {reason}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    for warning in found.warnings:
        err.print(f"Warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if as_json and (found.runs or not found.failures):
        print(json.dumps(found.document(), indent=2))
    elif found.runs:
        out.print(found.table())
        for note in found.notes():
            out.print(note, style="dim", highlight=False, markup=False)
        for folder in found.folders():
            out.print(folder, style="dim", highlight=False, markup=False, soft_wrap=True)
    for done in found.runs:
        tracking.tell(done.document())
    if found.runs or len(found.failures) > 1:
        for name, reason in found.failures.items():
            err.print(f"Failed: {name}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    found.require()
    tracking.end()


def _estimates(configs: Sequence[RunConfig], loaded: LoadedModel, *, as_json: bool) -> None:
    from kvbench.cli.plan import print_estimates  # noqa: PLC0415
    from kvbench.runs.estimate import estimate  # noqa: PLC0415

    with err.status("Measuring") as status:
        found = estimate(configs, loaded, lambda what: status.update(f"Measuring {what}"))
    print_estimates(found, {config.hash: config.policy for config in configs}, loaded.device, as_json)


class _Progress:
    """A live bar per policy on stderr."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

        self._bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False), console=err,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def begin(self, configs: Sequence[RunConfig]) -> None:
        self._tasks = {
            config.hash: self._bars.add_task(config.policy, total=config.examples, note="", start=False)
            for config in configs
        }

    def say(self, message: str) -> None:
        err.print(message, style="dim", highlight=False, markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        err.print(f"Warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, config: RunConfig, done: int, of: int, note: str) -> None:
        task = self._tasks[config.hash]
        self._bars.start_task(task)
        self._bars.update(task, completed=done, total=of, note=note)
