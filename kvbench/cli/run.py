"""`kvbench run`: policies on a task, side by side with exact attention."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbench.cli.common import (
    DeviceMap,
    Json,
    RopeScaling,
    allocation,
    app,
    byte_size,
    err,
    interruptible,
    listed,
    load_registry,
    mib,
    out,
    pairs,
    whole_or_auto,
)
from kvbench.cli.table import MOST_COLUMNS, results_table
from kvbench.contract.errors import KVBenchError, check_output, sentence
from kvbench.contract.extension import option_names

if TYPE_CHECKING:
    from kvbench.plugins import Registry
    from kvbench.runs.results import RunConfig

DECODINGS = ("auto", "graph", "fixed", "eager")


@app.command()
@interruptible
def run(
    policy: Annotated[
        list[str], typer.Option(help="Policy, several separated by commas, or `all`; `kvbench policies` lists them.")
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
    context_length: Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer together.")] = 2048,
    examples: Annotated[int, typer.Option(min=1, help="Number of examples.")] = 3,
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
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Last tokens of the context that come after the cached prefix.")
    ] = 0,
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
        int, typer.Option(min=0, help="First layers that attend to everything, beyond the budget, in every policy.")
    ] = 0,
    compress_every: Annotated[
        int | None,
        typer.Option(
            help="Let an evicting policy keep so many generated tokens, then score prompt and answer together and keep "
            "the budget's best, again and again; --tokens may then exceed the prompt."
        ),
    ] = None,
    recall_k: Annotated[int, typer.Option(min=1, help="k of recall@k.")] = 100,
    probe_examples: Annotated[
        int, typer.Option(min=0, help="Examples that are run once more with probes, for recall, mass and density.")
    ] = 1,
    probe: Annotated[
        list[str] | None,
        typer.Option(help="Probe beyond the standard ones, several separated by commas; `kvbench probes` lists them."),
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
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, estimate time and memory from a few short steps, and stop."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run policies on a task, beside exact attention, and print accuracy, recall, bytes and latency.

    A policy that fails leaves the others alone, is told at the end, and makes the exit code 2.
    """
    allocator, size = allocation(budget)
    if len(size) + sum(given is not None for given in (tokens, ratio, size_bytes)) > 1:
        raise KVBenchError("A budget has one size: give one of --tokens, --ratio, --bytes and --budget NAME:SIZE.")
    if tokens is not None and tokens < 1:
        raise KVBenchError(f"--tokens {tokens} is not a positive number of tokens.")
    if compress_every is not None and compress_every < 1:
        raise KVBenchError(f"--compress-every {compress_every} is not a positive number of tokens.")
    if ratio is not None and not 0 < ratio <= 1:
        raise KVBenchError(f"--ratio {ratio} is not between 0 and 1.")
    if question not in ("aware", "agnostic"):
        raise KVBenchError(f"--question {question} is neither 'aware' nor 'agnostic'.")
    if prefix not in ("none", "cached"):
        raise KVBenchError(f"--prefix {prefix} is neither 'none' nor 'cached'.")
    if decoding not in DECODINGS:
        raise KVBenchError(f"--decoding {decoding} is none of {', '.join(DECODINGS)}.")
    chunk, batch = whole_or_auto("--prefill-chunk", prefill_chunk), whole_or_auto("--batch-size", batch_size)
    place: dict[str, Any] = {"device": device, "dtype": dtype, "rope_scaling": rope_scaling, "device_map": device_map}
    found = load_registry()
    names, probes = listed(policy), listed(probe)
    if not names:
        raise KVBenchError(
            f"--policy '{','.join(policy)}' names no policy: `kvbench policies` lists them; `full` is a policy, too."
        )
    check_output(output)
    every = names == ["all"]
    if every:
        names = [name for name, cls in found.classes["policy"].items() if cls.cached]
    task_class = found.find("task", task)
    found.find("budget", allocator)
    for extra in probes:
        found.find("probe", extra)
    options = {name: policy_options(found, name, names, pairs(option)) for name in names}
    baseline_added = baseline and "full" not in names
    if baseline_added:
        names.append("full")
        options["full"] = {}

    from kvbench.contract.budget import Budget  # noqa: PLC0415  torch takes seconds to import, so names are checked before
    from kvbench.models import load_model  # noqa: PLC0415
    from kvbench.models.quantised import check_quantised  # noqa: PLC0415
    from kvbench.runs.planning import load_to_plan  # noqa: PLC0415
    from kvbench.runs.results import over_budget_text, replace  # noqa: PLC0415
    from kvbench.runs.runner import Request, execute, plan  # noqa: PLC0415

    asked_for = {"tokens": tokens, "ratio": ratio, "bytes": byte_size("--bytes", size_bytes)}
    given = {name: value for name, value in asked_for.items() if value is not None} | size or {"ratio": 0.1}
    shared = Budget(allocator=allocator, options=pairs(budget_option), compress_every=compress_every, **given)
    requests = [
        Request(
            policy=name, policy_options=options[name], budget=shared, task=task, task_options=pairs(task_option),
            context_length=context_length, examples=examples, seed=seed, question=question,  # type: ignore[arg-type]
            prefill_chunk=chunk, recall_k=recall_k, probe_examples=probe_examples, probes=tuple(probes),
            batch_size=batch, share_prefill=share_prefill, dense_layers=dense_layers,
            decoding=decoding, prefix=prefix, new_tokens=new_tokens,  # type: ignore[arg-type]
        )
        for name in names
    ]  # fmt: skip
    asked = set(names) - ({"full"} if baseline_added else set())
    failures: dict[str, str] = {}
    configs = []
    light = load_to_plan(model, context_length=context_length, **place)
    check_quantised(model, light.model.config, light.device)
    for request in requests:
        try:
            configs.append(plan(request, light))
        except KVBenchError as error:
            if request.policy == "full":
                raise
            failures[request.policy] = str(error)
    if not any(config.policy in asked for config in configs):
        raise KVBenchError(next(iter(failures.values())))  # nothing but the baseline could run
    left_out = dict(failures) if every else {}
    loaded = light
    if light.model.device.type == "meta":
        loaded = load_model(model, context_length=context_length, **place)
    if dry_run:
        from kvbench.cli.plan import print_estimates  # noqa: PLC0415
        from kvbench.runs.estimate import estimate  # noqa: PLC0415

        with err.status("Measuring") as status:
            found_s = estimate(configs, loaded, lambda what: status.update(f"Measuring {what}"))
        print_estimates(found_s, {config.hash: config.policy for config in configs}, loaded.device, as_json)
        return
    moved = [replace(output, config) for config in configs] if fresh else []
    for folder in filter(None, moved):
        err.print(f"Earlier results are in {folder} now.", style="dim", highlight=False, markup=False, soft_wrap=True)

    def failed(config: RunConfig, error: Exception) -> None:
        failures[config.policy] = sentence(error)

    with _Progress(configs) as progress:
        tell = failed if len(configs) > 1 else None
        runs = execute(configs, loaded, output, progress, tell, check_anew=fresh)
    for name, reason in left_out.items():
        err.print(f"Left out {name}: {reason}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    for note in dict.fromkeys(note for done in runs for note in done.notes):
        err.print(f"Warning: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    for done in runs:
        if over := over_budget_text(done.metrics):
            err.print(f"Warning: {done.config.policy} is {over}.", style="yellow", highlight=False, markup=False)
    documents = [done.document() for done in runs]
    told = [{"policy": name, "error": reason} for name, reason in failures.items()]
    failures = {name: reason for name, reason in failures.items() if name not in left_out}
    if as_json and (runs or not failures):
        print(json.dumps({"schema": 1, "runs": documents, "failures": told}, indent=2))
    elif runs:
        _print_runs(documents, task_class, f"{loaded.name}, {task}, {context_length} tokens")
    if len(failures) == 1 and not runs:
        raise KVBenchError(next(iter(failures.values())))
    for name, reason in failures.items():
        err.print(f"Failed: {name}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    if failures:
        raise KVBenchError(
            f"{len(failures)} of {len(requests)} policies failed; the others are kept, and the same command tries "
            "these again."
        )


def _print_runs(documents: list[dict[str, Any]], task: type[Any], setting: str) -> None:
    title = f"{setting}, {_budget(documents)}"
    out.print(results_table(documents, title, getattr(task, "metrics", {}), getattr(task, "main", None)))
    for document in documents:
        if reason := document["metrics"].get("mode_reason"):
            out.print(
                f"{document['policy']} decoded hook by hook: {reason}", style="dim", highlight=False, markup=False
            )
        if aware := document["metrics"].get("query_aware"):
            out.print(
                f"{document['policy']} {aware}: its prefix was compressed without the question.", style="dim",
                highlight=False, markup=False,
            )  # fmt: skip
    out.print(_provenance(documents), style="dim", highlight=False)
    for document in documents:
        out.print(f"{document['policy']}: {document['folder']}", style="dim", highlight=False, soft_wrap=True)


def policy_options(found: Registry, name: str, names: list[str], pairs: dict[str, str]) -> dict[str, str]:
    """The options given with -o that are this policy's; with several policies each takes those it knows."""
    known = set(option_names(found.find("policy", name)))
    mine = pairs if len(names) == 1 else {key: value for key, value in pairs.items() if key in known}
    everyone = {field for other in names for field in option_names(found.find("policy", other))}
    for key, value in pairs.items():
        if len(names) > 1 and key not in everyone:
            raise KVBenchError(f"Option {key}={value} is an option of none of {', '.join(names)}.")
    found.options("policy", name, mine)
    return mine


class _Progress:
    """A live bar per policy on stderr."""

    def __init__(self, configs: Sequence[RunConfig]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

        self._bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False), console=err,
        )  # fmt: skip
        self._tasks = {
            config.hash: self._bars.add_task(config.policy, total=config.examples, note="", start=False)
            for config in configs
        }

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, config: RunConfig, done: int, of: int, note: str) -> None:
        task = self._tasks[config.hash]
        self._bars.start_task(task)
        self._bars.update(task, completed=done, total=of, note=note)


def _budget(documents: list[dict[str, Any]]) -> str:
    budgets = [document["budget"] for document in documents if document["budget"]]
    if not budgets:
        return "no budget"
    first = budgets[0]
    size = f"{first['tokens']} tokens" if first["tokens"] is not None else f"ratio {first['ratio']}"
    if first["bytes"] is not None:
        size = f"{mib(first['bytes'])} MiB"
    every = f", compressed every {first['compress_every']} tokens" if first.get("compress_every") else ""
    return f"budget {size}, {first['allocator']}{every}"


def _provenance(documents: list[dict[str, Any]]) -> str:
    document = documents[0]
    config, environment, metrics = document["config"], document["environment"], document["metrics"]
    cut, unled = metrics.get("truncated_examples"), metrics.get("prefix_left_out_examples")
    return (
        f"{metrics['accuracy']['n']} examples"
        + (f" ({cut} with the middle of the context cut out)" if cut else "")
        + (f" ({unled} without the answer prefix, since the chat template opens a thinking block)" if unled else "")
        + f", seed {config['seed']}, question {config['question']}, "
        f"k = {config['recall_k']}, {metrics['probed_examples']} probed; {config['dtype']} on "
        f"{environment['device_name']}, {environment['threads']} threads{_stretched(document)}; "
        f"{_own_prompts(documents)}times, bytes and answers are of undisturbed generations{_overhead(documents)}"
    )


def _stretched(document: dict[str, Any]) -> str:
    """What the run states of its model and of sizes that memory decided."""
    config, environment, metrics = document["config"], document["environment"], document["metrics"]
    found = []
    if config["rope_scaling"]:
        found.append(f"rope scaling {config['rope_scaling']}")
    if config["weights"]:
        found.append(f"weights: {environment.get('weights') or config['weights']}")
    if spread := environment.get("device_map"):
        found.append("layers on " + ", ".join(f"{place}: {module}" for module, place in spread.items()))
    for name, text in (("batch", "batches of {}"), ("prefill_chunk", "prompts in chunks of {} tokens")):
        if config["batch_size" if name == "batch" else name] == "auto" and (sizes := metrics.get(name)):
            low, high = sizes["smallest"], sizes["largest"]
            found.append(text.format(low if low == high else f"{low} to {high}"))
    if short := metrics.get("out_of_memory"):
        found.append(f"memory ran out {short} time{'s' * (short > 1)} and less was tried")
    return "".join(f"; {text}" for text in found)


def _own_prompts(documents: list[dict[str, Any]]) -> str:
    own = [d["policy"] for d in documents if d["config"]["prompt_attention"] == "policy"]
    return f"the prompt's attention of {', '.join(own)} is the policy's own; " if own else ""


def _overhead(documents: list[dict[str, Any]]) -> str:
    shares = {d["policy"]: d["metrics"].get("probe_overhead") for d in documents}
    found = [f"{100 * share:+.0f}% ({policy})" for policy, share in shares.items() if share is not None]
    if len(found) > MOST_COLUMNS:
        known = [share for share in shares.values() if share is not None]
        found = [f"{100 * min(known):+.0f}% to {100 * max(known):+.0f}%"]
    return f"; probes change a step's time by {', '.join(found)}" if found else ""
