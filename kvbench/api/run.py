"""`kvbench.run`: policies on a task, side by side with exact attention."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvbench.api.given import allocation, byte_size, listed, one_of, whole, whole_or
from kvbench.api.progress import Reporter, RunReporter, Told
from kvbench.api.results import RunResult, RunResults
from kvbench.contract.errors import KVBenchError, check_output, sentence
from kvbench.contract.extension import option_names
from kvbench.runs.defaults import PROBE_TOKENS

if TYPE_CHECKING:
    from kvbench.models import LoadedModel
    from kvbench.plugins import Registry
    from kvbench.runs.results import RunConfig

Estimates = Callable[["Sequence[RunConfig]", "LoadedModel"], None]
"""Is given what would run, in place of running it."""
DECODINGS = ("auto", "graph", "fixed", "eager")


def run(
    policy: str | Sequence[str],
    *,
    budget: str = "uniform",
    tokens: int | None = None,
    ratio: float | None = None,
    bytes: str | int | None = None,
    model: str | Path | LoadedModel = "smollm2-135m",
    task: str = "niah_single_1",
    context_length: int = 2048,
    examples: int = 3,
    seed: int = 42,
    options: Mapping[str, Any] | None = None,
    budget_options: Mapping[str, Any] | None = None,
    task_options: Mapping[str, Any] | None = None,
    question: Literal["aware", "agnostic"] = "aware",
    prefix: Literal["none", "cached"] = "none",
    new_tokens: int = 0,
    prefill_chunk: int | str | None = None,
    batch_size: int | str = 1,
    share_prefill: bool | None = None,
    decoding: Literal["auto", "graph", "fixed", "eager"] = "auto",
    dense_layers: int = 0,
    compress_every: int | None = None,
    recall_k: int = 100,
    probe_examples: int = 1,
    probe_tokens: int | str = PROBE_TOKENS,
    probes: str | Sequence[str] = (),
    baseline: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    rope_scaling: str | None = None,
    device_map: str | None = None,
    output: str | Path = "kvbench-runs",
    fresh: bool = False,
    progress: bool | None = None,
) -> RunResults:
    """Run policies on a task, beside exact attention, as the command `kvbench run` does with the same options.

    `policy` is a name, several (a list, or separated by commas) or `all`; `budget` an allocator, with its size or
    without (`pyramid:512`); `tokens`, `ratio` or `bytes` the size, 10% of the context by default. `model` may be one
    that `kvbench.models.load_model` gave. Finished runs below `output` are taken from there. `progress` says on stderr
    how far it is (None: where a terminal or a notebook shows it). Policies that fail are in the result's `failures`,
    with a warning; KVBenchError where none could run, and for input that cannot be: the command's own sentence.
    """
    told = Told(progress)
    found = execute(
        policy, told, budget=budget, tokens=tokens, ratio=ratio, size_bytes=bytes, model=model, task=task,
        context_length=context_length, examples=examples, seed=seed, options=options, budget_options=budget_options,
        task_options=task_options, question=question, prefix=prefix, new_tokens=new_tokens,
        prefill_chunk=prefill_chunk, batch_size=batch_size, share_prefill=share_prefill, decoding=decoding,
        dense_layers=dense_layers, compress_every=compress_every, recall_k=recall_k, probe_examples=probe_examples,
        probe_tokens=probe_tokens, probes=probes, baseline=baseline, device=device, dtype=dtype,
        rope_scaling=rope_scaling, device_map=device_map, output=output, fresh=fresh,
    )  # fmt: skip
    if not found.runs:
        found.require()
    for name, reason in found.failures.items():
        told.warn(f"Failed: {name}: {reason}")
    for warning in found.warnings:
        told.warn(warning)
    return found


def plugins(reporter: Reporter) -> Registry:
    """All plugins; those that failed are told."""
    from kvbench.catalogue import remember  # noqa: PLC0415
    from kvbench.plugins import registry  # noqa: PLC0415  torch takes seconds to import

    found = registry()
    remember(found)
    for failure in found.failures:
        reporter.warn(f"{failure}; its extensions are missing.")
    return found


def execute(
    policy: str | Sequence[str], reporter: RunReporter, *, budget: str, tokens: int | None, ratio: float | None,
    size_bytes: str | int | None, model: str | Path | LoadedModel, task: str, context_length: int, examples: int,
    seed: int, options: Mapping[str, Any] | None, budget_options: Mapping[str, Any] | None,
    task_options: Mapping[str, Any] | None, question: str, prefix: str, new_tokens: int,
    prefill_chunk: int | str | None, batch_size: int | str, share_prefill: bool | None, decoding: str,
    dense_layers: int, compress_every: int | None,
    recall_k: int, probe_examples: int, probe_tokens: int | str,
    probes: str | Sequence[str] | None, baseline: bool, device: str | None,
    dtype: str | None, rope_scaling: str | None, device_map: str | None, output: str | Path, fresh: bool,
    dry_run: Estimates | None = None,
) -> RunResults:  # fmt: skip
    """What `run` and the command share; policies that fail are in the result, whatever became of the others.

    `dry_run` is given what would run, in place of running it.
    """
    allocator, size = allocation(budget)
    if len(size) + sum(given is not None for given in (tokens, ratio, size_bytes)) > 1:
        raise KVBenchError("A budget has one size: give one of --tokens, --ratio, --bytes and --budget NAME:SIZE.")
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        raise KVBenchError(f"--tokens {tokens} is not a positive number of tokens.")
    if compress_every is not None and (not isinstance(compress_every, int) or compress_every < 1):
        raise KVBenchError(f"--compress-every {compress_every} is not a positive number of tokens.")
    if ratio is not None and not (isinstance(ratio, int | float) and 0 < ratio <= 1):
        raise KVBenchError(f"--ratio {ratio} is not between 0 and 1.")
    least = {"context_length": 1, "examples": 1, "recall_k": 1, "probe_examples": 0, "new_tokens": 0,
             "dense_layers": 0}  # fmt: skip
    values = {"context_length": context_length, "examples": examples, "recall_k": recall_k,
              "probe_examples": probe_examples, "new_tokens": new_tokens, "dense_layers": dense_layers}  # fmt: skip
    for name, value in values.items():
        whole("--" + name.replace("_", "-"), value, least[name])
    chunk, batch = whole_or("auto", "--prefill-chunk", prefill_chunk), whole_or("auto", "--batch-size", batch_size)
    seen = whole_or("all", "--probe-tokens", probe_tokens)
    one_of("--question", question, ("aware", "agnostic"))
    one_of("--prefix", prefix, ("none", "cached"))
    one_of("--decoding", decoding, DECODINGS)
    found = plugins(reporter)
    names, extra_probes, folder = listed(policy), listed(probes), Path(output)
    if not names:
        given = policy if isinstance(policy, str) else ",".join(policy)
        raise KVBenchError(
            f"--policy '{given}' names no policy: `kvbench policies` lists them; `full` is a policy, too."
        )
    check_output(folder)
    every = names == ["all"]
    if every:
        names = [name for name, cls in found.classes["policy"].items() if cls.cached]
    task_class = found.find("task", task)
    found.find("budget", allocator)
    for extra in extra_probes:
        found.find("probe", extra)
    own = {name: policy_options(found, name, names, dict(options or {})) for name in names}
    baseline_added = baseline and "full" not in names
    if baseline_added:
        names.append("full")
        own["full"] = {}

    from kvbench.contract.budget import Budget  # noqa: PLC0415  torch takes seconds to import, so names are checked before
    from kvbench.models import LoadedModel, load_model  # noqa: PLC0415
    from kvbench.models.quantised import check_quantised  # noqa: PLC0415
    from kvbench.runs.planning import load_to_plan  # noqa: PLC0415
    from kvbench.runs.results import over_budget_text, replace  # noqa: PLC0415
    from kvbench.runs.runner import Request, plan  # noqa: PLC0415
    from kvbench.runs.runner import execute as execute_runs  # noqa: PLC0415

    asked_for = {"tokens": tokens, "ratio": ratio, "bytes": byte_size("--bytes", size_bytes)}
    sizes = {name: value for name, value in asked_for.items() if value is not None} | size or {"ratio": 0.1}
    shared = Budget(allocator=allocator, options=dict(budget_options or {}), compress_every=compress_every, **sizes)
    requests = [
        Request(
            policy=name, policy_options=own[name], budget=shared, task=task, task_options=dict(task_options or {}),
            context_length=context_length, examples=examples, seed=seed, question=question,  # type: ignore[arg-type]
            prefill_chunk=chunk, recall_k=recall_k, probe_examples=probe_examples, probes=tuple(extra_probes),
            probe_tokens=seen,
            batch_size=batch, share_prefill=share_prefill, dense_layers=dense_layers,
            decoding=decoding, prefix=prefix, new_tokens=new_tokens,  # type: ignore[arg-type]
        )
        for name in names
    ]  # fmt: skip
    asked = set(names) - ({"full"} if baseline_added else set())
    failures: dict[str, str] = {}
    configs = []
    place: dict[str, Any] = {
        "device": device, "dtype": dtype, "context_length": context_length, "rope_scaling": rope_scaling,
        "device_map": device_map,
    }  # fmt: skip
    light = model if isinstance(model, LoadedModel) else load_to_plan(os.fspath(model), **place)
    check_quantised(light.name, light.model.config, light.device)
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
        loaded = load_model(light.name, **place)
    title = f"{loaded.name}, {task}, {context_length} tokens"
    if dry_run is not None:
        dry_run(configs, loaded)
        return RunResults((), title=title, asked=len(requests))
    for moved in filter(None, [replace(folder, config) for config in configs] if fresh else []):
        reporter.say(f"Earlier results are in {moved} now.")

    def failed(config: RunConfig, error: Exception) -> None:
        failures[config.policy] = sentence(error)

    reporter.begin(configs)
    with reporter:
        tell = failed if len(configs) > 1 else None
        runs = execute_runs(configs, loaded, folder, reporter, tell, check_anew=fresh)
    warnings = list(dict.fromkeys(note for done in runs for note in done.notes))
    for done in runs:
        if over := over_budget_text(done.metrics):
            warnings.append(f"{done.config.policy} is {over}.")
    return RunResults(
        tuple(RunResult.of(done.document()) for done in runs),
        title=title, asked=len(requests),
        failures={name: reason for name, reason in failures.items() if name not in left_out}, left_out=left_out,
        warnings=tuple(warnings), labels=getattr(task_class, "metrics", {}), main=getattr(task_class, "main", None),
    )  # fmt: skip


def policy_options(found: Registry, name: str, names: list[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options given that are this policy's; with several policies each takes those it knows."""
    known = set(option_names(found.find("policy", name)))
    mine = dict(given) if len(names) == 1 else {key: value for key, value in given.items() if key in known}
    everyone = {field for other in names for field in option_names(found.find("policy", other))}
    for key, value in given.items():
        if len(names) > 1 and key not in everyone:
            raise KVBenchError(f"Option {key}={value} is an option of none of {', '.join(names)}.")
    found.options("policy", name, mine)
    return mine
