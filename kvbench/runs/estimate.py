"""What planned runs will take: time and memory, extrapolated from a few short prompts and steps on this machine."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from scipy.optimize import nnls

from kvbench.contract.budget import Budget
from kvbench.contract.errors import out_of_memory, sentence
from kvbench.contract.task import Example, TokenExample
from kvbench.engine.generation import generate_batch
from kvbench.engine.survey import token_bytes
from kvbench.models import LoadedModel
from kvbench.plugins import registry
from kvbench.runs.config import RunConfig
from kvbench.runs.examples import examples_of, stop_tokens
from kvbench.runs.memory import quick_release, release
from kvbench.runs.runner import WARM_UP_TOKENS, alike
from kvbench.runs.sharing import probe_passes, prompt_of, session_of
from kvbench.runs.sizing import Sizing, chunk_bytes

SHORTEST, LONG_ENOUGH = 128, 512
ENOUGH_S = 1.0
"""Longer prompts are tried until one of `LONG_ENOUGH` tokens or more takes so many seconds."""
STEPS = 6
BATCH = 4
PROBED = 1.5
"""What probes are taken to make of a step's time: they are not measured here."""


@dataclass(frozen=True)
class Estimate:
    """What a run is estimated to take: `seconds` in all, `prompt_s` for each example, `step_s` for each token.

    `tokens` are those of an answer, `batch` the examples at once, `bytes` the memory at the peak, weights included.
    `unmeasured` says why a policy could not be tried on short prompts; its own work is then not in the figures.
    """

    config: RunConfig
    seconds: float
    prompt_s: float
    step_s: float
    tokens: float
    batch: int
    bytes: int
    measured_tokens: int
    """The longest prompt that was measured."""
    unmeasured: str | None = None

    def document(self) -> dict[str, Any]:
        """As an element of a `--json` document."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "config"}
        return {"folder": self.config.folder, **fields}


@dataclass(frozen=True)
class _Policy:
    """What a policy took on two prompts: seconds and bytes as functions of a prompt's tokens."""

    index_s: Callable[[float], float]
    step_s: Callable[[float], float]
    bytes: Callable[[float], float]
    unmeasured: str | None = None


def estimate(configs: Sequence[RunConfig], loaded: LoadedModel, tell: Callable[[str], None]) -> list[Estimate]:
    """Estimate runs of one model; `tell` is told what is being measured. Conformance checks are not in the figures."""
    with quick_release():
        release()
        return _Estimator(loaded, tell).of(configs)


class _Estimator:
    def __init__(self, loaded: LoadedModel, tell: Callable[[str], None]) -> None:
        self._loaded, self._tell = loaded, tell
        self._policies: dict[str, _Policy] = {}
        self._examples: dict[str, tuple[list[int], int]] = {}
        self._answers: dict[str, float] = {}
        weights = sum(one.numel() * one.element_size() for one in loaded.model.parameters())
        on_gpu = loaded.device.type == "cuda"
        self._base = weights if on_gpu else int(psutil.Process().memory_info().rss)  # with Python and the libraries

    def of(self, configs: Sequence[RunConfig]) -> list[Estimate]:
        """Estimate each configuration."""
        if not configs:
            return []
        longest = max(configs, key=lambda config: config.context_length)
        text = self._example(longest)[0]
        self._tell("prompts")
        exact = longest.model_copy(update={"policy": "full", "policy_options": {}, "budget": None, "dense_layers": 0})
        points = self._prompts(exact, text)
        prefill = _fit(points)
        self._lengths = points[-2][0] if len(points) > 1 else points[0][0], points[-1][0]
        self._together = self._rows_factor(exact, text)
        groups: dict[str, int] = {}
        for config in configs:
            groups[alike(config)] = groups.get(alike(config), 0) + 1
        return [self._run(config, prefill, text, groups[alike(config)]) for config in configs]

    def _run(self, config: RunConfig, prefill: Callable[[float], float], text: list[int], sharing: int) -> Estimate:
        policy = self._policy(config, text)
        prompt, limit = self._example(config)
        tokens, count = self._answer(config, limit), config.examples
        batch = self._batch(config, len(prompt))
        alone = min(config.probe_examples, count) if config.in_batches else 0
        step = policy.step_s(len(prompt))
        batches = math.ceil((count - alone) / batch)
        rounds = alone + batches * (1 + (batch - 1) * self._together)
        steps = tokens * step * rounds
        shared = sharing if config.share_prefill else 1
        passes = len(probe_passes(config)) * min(config.probe_examples, count)
        read = count / shared + (0 if config.share_prefill else passes)
        own = count + passes
        probed = tokens if config.probe_tokens == "all" else min(tokens, config.probe_tokens)
        warm_up = prefill(256) + policy.index_s(256) + WARM_UP_TOKENS * policy.step_s(256)
        seconds = (
            read * prefill(len(prompt)) + own * policy.index_s(len(prompt)) + steps + PROBED * passes * probed * step
            + warm_up
        )  # fmt: skip
        weights = self._base
        cache = len(prompt) * token_bytes(self._loaded.model)
        chunk = Sizing(config, self._loaded).chunk(batch, len(prompt)) or len(prompt)
        held = max(cache * (2 if config.share_prefill else 1), policy.bytes(len(prompt)))
        needed = weights + int(batch * (held + chunk_bytes(self._loaded.model, chunk, len(prompt))))
        return Estimate(
            config, seconds, prefill(len(prompt)) + policy.index_s(len(prompt)), step, tokens, batch, needed,
            self._lengths[-1], policy.unmeasured,
        )  # fmt: skip

    def _batch(self, config: RunConfig, prompt: int) -> int:
        if not registry().find("policy", config.policy).batched:
            return 1
        return min(Sizing(config, self._loaded).rows(prompt), config.examples)

    def _example(self, config: RunConfig) -> tuple[list[int], int]:
        """The first prompt of a cell, and the most tokens of its answer."""
        key = json.dumps([config.task, config.task_options, config.context_length, config.seed, config.examples])
        if key not in self._examples:
            self._tell(f"{config.task} at {config.context_length} tokens")
            task = registry().make("task", config.task, config.task_options)
            example = next(iter(examples_of(task, config.model_copy(update={"examples": 1}), self._loaded)))
            if isinstance(example, TokenExample):
                forced = len(example.input_ids) - example.prompt_tokens - 1
                self._examples[key] = list(example.input_ids[: example.prompt_tokens]), forced
            else:
                self._examples[key] = prompt_of(self._loaded, example).input_ids, example.max_new_tokens
        return self._examples[key]

    def _answer(self, config: RunConfig, limit: int) -> float:
        """Tokens of an answer: those of exact attention to a short example of the task; else as many as may be."""
        key = json.dumps([config.task, config.task_options])
        if key not in self._answers:
            self._tell(f"an answer to {config.task}")
            self._answers[key] = limit
            task = registry().make("task", config.task, config.task_options)
            for length in {min(max(self._lengths[1], 512), config.context_length), config.context_length}:
                part = config.model_copy(update={"examples": 1, "context_length": length, "policy": "full",
                                                 "policy_options": {}, "budget": None})  # fmt: skip
                try:
                    example = next(iter(examples_of(task, part, self._loaded)))
                except Exception:  # noqa: S112 - a task that has no example so short
                    continue
                if isinstance(example, Example):
                    ids = prompt_of(self._loaded, example).input_ids
                    made = self._generate(part, [ids], limit, stop_tokens(self._loaded))
                    self._answers[key] = len(made.step_s) + 1
                break
        return self._answers[key]

    def _prompts(self, exact: RunConfig, text: list[int]) -> list[tuple[int, float]]:
        """Tokens and seconds of ever longer prompts, until one takes long enough or all of the text is read."""
        points: list[tuple[int, float]] = []
        size = min(SHORTEST, len(text))
        while True:
            times = [self._generate(exact, [text[:size]], 1).prefill_s]  # the first compiles and loads
            if times[0] < ENOUGH_S:
                times += [self._generate(exact, [text[:size]], 1).prefill_s for _ in range(2)]
            took = min(times)
            points.append((size, took))
            if (took > ENOUGH_S and size >= LONG_ENOUGH) or size == len(text):
                return points[-4:]
            size = min(2 * size, len(text))

    def _rows_factor(self, exact: RunConfig, text: list[int]) -> float:
        """What each further row of a batch adds to a step, as a share of the step of one row; 1 where rows cost alike.

        The exact prompts' and steps' of a short text.
        """
        size = self._lengths[0]
        try:
            one, many = (_step(self._generate(exact, [text[:size]] * rows, STEPS).step_s) for rows in (1, BATCH))
        except Exception as error:  # a short machine
            if not out_of_memory(error):
                raise
            return 1.0
        return min(max((many / one - 1) / (BATCH - 1), 0.0), 1.0)

    def _policy(self, config: RunConfig, text: list[int]) -> _Policy:
        budget = config.budget and config.budget.model_dump(mode="json")
        key = json.dumps([config.policy, config.policy_options, budget, config.dense_layers, config.decoding])
        if key not in self._policies:
            self._tell(f"{config.policy} on short prompts")
            try:
                self._policies[key] = self._measure(config, text)
            except Exception as error:  # a budget that needs longer prompts, a plugin that fails
                reason = sentence(error)
                self._policies[key] = _Policy(lambda n: 0.0, lambda n: 0.0, lambda n: 0.0, reason)
        return self._policies[key]

    def _measure(self, config: RunConfig, text: list[int]) -> _Policy:
        found = []
        for size in self._lengths:
            short = config.model_copy(update={"budget": self._budget(config, size)})
            self._generate(short, [text[:size]], 2)  # what a first use compiles
            made = self._generate(short, [text[:size]], STEPS)
            found.append((size, made.index_s + made.capture_s, _step(made.step_s), sum(made.bytes.values())))
        sizes, index, step, held = zip(*found, strict=True)
        return _Policy(_grows(sizes, index), _line(sizes, step), _line(sizes, held))

    def _budget(self, config: RunConfig, size: int) -> Budget | None:
        """The budget, or half of what a short prompt has beside the static set, where this prompt is too short for it.

        A number of tokens is kept; a share of the context is made that of the prompt asked for.
        """
        if config.budget is None:
            return None
        static = registry().make("policy", config.policy, config.policy_options).static_tokens(size)
        every = token_bytes(self._loaded.model)
        wanted = config.budget.size(config.context_length, every)
        least = sum(static)
        tokens = wanted if least < wanted < size else (least + size) // 2
        return config.budget.model_copy(update={"tokens": tokens, "ratio": None, "bytes": None})

    def _generate(self, config: RunConfig, prompts: list[list[int]], tokens: int, stop: set[int] | None = None) -> Any:
        torch.manual_seed(config.seed)
        with session_of(config, self._loaded) as session:
            chunk = Sizing(config, self._loaded).chunk(len(prompts), len(prompts[0]))
            return generate_batch(
                session, prompts, max_new_tokens=[tokens] * len(prompts), stop=stop or set(), prefill_chunk=chunk,
                decoding=config.decoding,
            )[0]  # fmt: skip


def _step(seconds: Sequence[float]) -> float:
    return statistics.median(seconds[1:] or seconds) if seconds else 0.0


def _fit(points: Sequence[tuple[int, float]]) -> Callable[[float], float]:
    """a + b n + c n² with no negative coefficient, nearest to the points by relative error."""
    scale = points[-1][0]
    matrix = np.array([[1.0, n / scale, (n / scale) ** 2] for n, _ in points])
    seconds = np.array([max(took, 1e-9) for _, took in points])
    found, _ = nnls(matrix / seconds[:, None], np.ones(len(points)))
    return lambda n: float(found @ np.array([1.0, n / scale, (n / scale) ** 2]))


def _line(sizes: Sequence[int], values: Sequence[float]) -> Callable[[float], float]:
    """A straight line through the last two points that never falls."""
    slope = max((values[-1] - values[0]) / (sizes[-1] - sizes[0]), 0.0) if sizes[-1] > sizes[0] else 0.0
    return lambda n: max(values[-1] + slope * (n - sizes[-1]), 0.0)


def _grows(sizes: Sequence[int], values: Sequence[float]) -> Callable[[float], float]:
    """A power of n through the last two points, from constant to quadratic."""
    power = 1.0
    if sizes[-1] > sizes[0] and min(values) > 0:
        power = min(max(math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0]), 0.0), 2.0)
    return lambda n: values[-1] * (n / sizes[-1]) ** power


def total_memory(estimates: Sequence[Estimate], there: int) -> str | None:
    """Say which runs are estimated to need more memory than there is; None where none is."""
    over = [one for one in estimates if one.bytes > there]
    if not over:
        return None
    worst = max(over, key=lambda one: one.bytes)
    return (
        f"{len(over)} of {len(estimates)} runs are estimated to need more than the {there / 2**30:.1f} GiB there are, "
        f"{worst.config.policy} at {worst.config.context_length} tokens {worst.bytes / 2**30:.1f} GiB: a smaller batch "
        "or --batch-size auto, or --prefill-chunk auto."
    )
