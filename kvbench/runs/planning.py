"""Plans a run: what is asked for, checked before anything runs and completed to a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.reading import validating
from kvbench.contract.task import ForcedTask, Task
from kvbench.engine.generation import Decoding
from kvbench.engine.governor import check_compression, check_head_budgets, chosen_layers
from kvbench.engine.survey import UnseenError, survey, token_bytes
from kvbench.engine.validation import check_hooks, static_tokens
from kvbench.identity import Identity
from kvbench.models import LoadedModel, check_context, load_model
from kvbench.plugins import registry
from kvbench.runs.results import RunConfig
from kvbench.runs.sharing import STANDARD_PROBES
from kvbench.runs.timing import check_decoding

AnyTask = Task | ForcedTask


def load_to_plan(name: str, **given: Any) -> LoadedModel:
    """Load a model to plan runs with: without its weights, where it shows its shapes so, else with them.

    Its device is where it would run; see `kvbench.models.load_model`.
    """
    light = load_model(name, weights=False, **given)
    try:
        survey(light.model)
    except UnseenError:
        return load_model(name, **given)
    except KVBenchError:
        pass  # planning says it in its own place
    return light


@dataclass(frozen=True)
class Request:
    """What to run: everything of a run's configuration that does not follow from the model and the plugins."""

    policy: str
    policy_options: dict[str, Any]
    budget: Budget | None
    task: str
    task_options: dict[str, Any]
    context_length: int
    examples: int
    seed: int
    question: Literal["aware", "agnostic"] = "aware"
    prefill_chunk: int | Literal["auto"] | None = None
    recall_k: int = 100
    probe_examples: int = 1
    probes: tuple[str, ...] = ()
    batch_size: int | Literal["auto"] = 1
    dense_layers: int = 0
    share_prefill: bool | None = None
    """Compute each prompt once for all that take it over; None: where nothing is lost by it."""
    decoding: Decoding = "auto"
    prefix: Literal["none", "cached"] = "none"
    new_tokens: int = 0


@validating(lambda reason: f"There is no such run ({reason}): change that value.")
def plan(request: Request, loaded: LoadedModel) -> RunConfig:
    """Validate a request before anything runs, and complete it to a run's configuration."""
    found = registry()
    policy = found.find("policy", request.policy)
    for plugin in (policy, *(found.find("probe", name) for name in request.probes)):
        check_hooks(plugin)
    options = found.options("policy", request.policy, request.policy_options)
    task_options = found.options("task", request.task, request.task_options)
    budget = request.budget if policy.takes_budget else None
    task: AnyTask = found.find("task", request.task)(task_options)
    forced = isinstance(task, ForcedTask)
    batch_size = _batch_size(request, forced)
    if forced and (batch_size != 1 or request.share_prefill):
        raise KVBenchError(
            f"Task '{task.name}' takes given tokens through a policy one sequence at a time: leave --batch-size at 1 "
            "and prompts unshared."
        )
    _check_prefix(request, policy, forced, batch_size)
    wanted = batch_size == 1 and not forced if request.share_prefill is None else request.share_prefill
    own_prompt = hasattr(policy, "attend_prompt")
    reads_itself = own_prompt or policy.reads_hidden
    share_prefill = wanted and policy.cached and not reads_itself and request.prefix == "none"
    if budget is not None:
        allocator = found.make("budget", budget.allocator, budget.options)
        check_head_budgets(policy, allocator)
        share_prefill = share_prefill and not allocator.reads_hidden
        budget = budget.model_copy(update={"options": allocator.options.model_dump(mode="json")})
    own = policy(options)
    dense_layers = 0 if policy.exact or not policy.cached else request.dense_layers
    layers = chosen_layers(loaded.model, own, dense_layers) if policy.cached else []
    if budget is not None and budget.compress_every is not None:
        check_compression(own, budget.compress_every)
    if budget is not None:
        length = request.context_length - request.new_tokens
        size = budget.size(length, token_bytes(loaded.model, layers))
        _check_size(own, length, size)
    check_context(loaded, request.context_length)
    if batch_size != 1 and request.question == "agnostic":
        raise KVBenchError(
            f"A batch of {batch_size} examples needs their questions inside their prompts: use --question "
            "aware, or --batch-size 1."
        )
    check_decoding(request.decoding, loaded.device, policy, forced=forced)
    return RunConfig(
        model=loaded.name, model_fingerprint=loaded.fingerprint, device=loaded.device.type,
        dtype=str(loaded.dtype).removeprefix("torch."), policy=request.policy,
        policy_options=options.model_dump(mode="json"), budget=budget, task=request.task,
        task_options=task_options.model_dump(mode="json"), task_data=task.data(),
        context_length=request.context_length, examples=request.examples, seed=request.seed, question=request.question,
        prefill_chunk=request.prefill_chunk, recall_k=request.recall_k,
        probe_examples=min(request.probe_examples, request.examples), probes=_extra_probes(request),
        batch_size=batch_size, share_prefill=share_prefill, dense_layers=dense_layers,
        prompt_attention="policy" if own_prompt else "exact", decoding=request.decoding,
        prefix=request.prefix, new_tokens=request.new_tokens, rope_scaling=loaded.rope_scaling, weights=loaded.weights,
        device_map=loaded.device_map, plugins=_plugins(request, budget),
    )  # fmt: skip


def _batch_size(request: Request, forced: bool) -> int | Literal["auto"]:
    """The batch asked for; where examples cannot run together, `auto` is one."""
    alone = forced or request.question == "agnostic" or request.prefix == "cached"
    return 1 if alone and request.batch_size == "auto" else request.batch_size


def _check_prefix(
    request: Request, policy: type[KVCachePolicy], forced: bool, batch_size: int | Literal["auto"]
) -> None:
    """Refuse what goes with no cached prefix."""
    if request.prefix == "none":
        if request.new_tokens:
            raise KVBenchError(
                f"{request.new_tokens} new tokens come after a cached prefix: give --prefix cached, or leave them out."
            )
        return
    if request.new_tokens >= request.context_length:
        raise KVBenchError(
            f"{request.new_tokens} new tokens leave no prefix of a context of {request.context_length}: give fewer, or "
            "a longer --context-length."
        )
    if not policy.cached:
        raise KVBenchError(f"Policy '{policy.name}' keeps no cache, so no prefix of it can be: leave --prefix out.")
    if forced or batch_size != 1 or request.share_prefill:
        raise KVBenchError(
            "A cached prefix is for tasks of questions, one request at a time, each with prompts of its own: leave "
            "--batch-size at 1 and prompts unshared, and choose a task that asks something."
        )


def _check_size(policy: KVCachePolicy, context: int, size: int) -> None:
    """Refuse a budget of `size` tokens that no prompt's static set fits into; prompts fill most of the context."""
    least = min(sum(static_tokens(policy, length)) for length in (context, context // 2))
    if size < least:
        raise KVBenchError(
            f"The budget of {size} tokens per layer is smaller than the policy's static set of {least} tokens: raise "
            "--tokens or --ratio, or lower the sinks and window options."
        )


def _plugins(request: Request, budget: Budget | None) -> dict[str, Identity]:
    """The code that a run's numbers depend on."""
    found = registry()
    named = {"policy": ("policy", request.policy), "task": ("task", request.task)}
    if budget is not None:
        named["budget"] = ("budget", budget.allocator)
    if request.probe_examples:
        named |= {f"probe {name}": ("probe", name) for name in (*STANDARD_PROBES, *_extra_probes(request))}
    return {role: found.identity(*chosen) for role, chosen in sorted(named.items())}


def check_plugins(config: RunConfig) -> None:
    """Refuse to run a configuration that was planned with other code, on another machine or earlier."""
    names = {"policy": config.policy, "task": config.task}
    if config.budget is not None:
        names["budget"] = config.budget.allocator
    for role, planned in config.plugins.items():
        kind, _, probe = role.partition(" ")
        here = registry().identity(kind, probe or names[kind])
        if here != planned:
            raise KVBenchError(
                f"{role.capitalize()} {probe or names[kind]} is {here} here and was {planned} when this run was "
                "planned: install the same version wherever it runs, and plan it again."
            )


def _extra_probes(request: Request) -> tuple[str, ...]:
    """The probes asked for beyond the standard ones, checked to exist and to have examples to run on."""
    names = tuple(sorted({name for name in request.probes if name not in STANDARD_PROBES}))
    for name in names:
        registry().find("probe", name)
    if request.probes and not request.probe_examples:
        raise KVBenchError(f"Probe '{request.probes[0]}' has nothing to measure: give --probe-examples 1 or more.")
    return names
