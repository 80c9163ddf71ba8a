"""One exact pass over each prompt for all that take it over: policies, their baseline, and generations with probes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from kvbench.contract.probe import Probe
from kvbench.contract.task import Example, Prompt, TokenExample
from kvbench.engine.attach import attach
from kvbench.engine.prefill import PromptRecorder, can_record, prefill, reusable
from kvbench.engine.prompt import Prefill
from kvbench.engine.session import Session
from kvbench.engine.spool import spool_room
from kvbench.engine.survey import token_bytes
from kvbench.models import LoadedModel
from kvbench.plugins import registry
from kvbench.runs.results import Run, RunConfig
from kvbench.tasks.prompts import encode

STANDARD_PROBES = ("recall", "recovery", "density", "output_error")
LONGER = 1.05
"""A prompt longer than this times those that a policy computed itself may raise its peak memory noticeably."""


_PROMPTS: OrderedDict[tuple[int, int], tuple[Any, Example, Prompt]] = OrderedDict()
"""The latest prompts by their tokenizer's and their example's identity, both held so that no other takes its place."""
_REMEMBERED = 256


def prompt_of(loaded: LoadedModel, example: Example | TokenExample) -> Prompt:
    """Give an example's prompt as token ids; encoded once for all runs that go over it together."""
    if isinstance(example, TokenExample):
        return Prompt(list(example.input_ids[: example.prompt_tokens]), example.prompt_tokens)
    key = id(loaded.tokenizer), id(example)
    if key not in _PROMPTS:
        _PROMPTS[key] = loaded.tokenizer, example, encode(loaded.tokenizer, example)
        while len(_PROMPTS) > _REMEMBERED:
            _PROMPTS.popitem(last=False)
    return _PROMPTS[key][2]


def prompt_tokens(config: RunConfig, prompt: Prompt) -> int:
    """How many of its tokens the policy takes over at once."""
    if config.prefix == "cached":
        return max(prompt.context_tokens - config.new_tokens, 1)
    return len(prompt.input_ids) if config.question == "aware" else prompt.context_tokens


def session_of(config: RunConfig, loaded: LoadedModel, probes: Sequence[Probe] = ()) -> Session:
    """The model with a configuration's policy attached."""
    return attach(
        loaded.model, policy=config.policy, options=config.policy_options, budget=config.budget, probes=probes,
        tokenizer=loaded.tokenizer, dense_layers=config.dense_layers,
    )  # fmt: skip


def probe_passes(config: RunConfig) -> list[list[Probe]]:
    """New probes, those together that one generation can have."""
    probes: list[Probe] = [
        registry().make("probe", name, {"k": config.recall_k} if name == "recall" else {})
        for name in (*STANDARD_PROBES, *config.probes)
    ]
    return [[probe for probe in probes if not probe.alone], *([probe] for probe in probes if probe.alone)]


def is_probed(run: Run) -> bool:
    """Whether a run's next example is generated with probes, too."""
    return sum("probes" in row for row in run.rows) < run.config.probe_examples


class SharedPrompt:
    """A batch's prompts, computed once and handed to each run that lacks their examples.

    A run's first pass over a prompt of its own length is its own, undisturbed, so that its peak memory is measured;
    what that pass made of the prompt is recorded for the others where that takes no memory (`can_record`). Runs take
    turns at it, and so no pass is added while there are as many examples as runs.
    """

    def __init__(
        self, batch: Sequence[Example | TokenExample], runs: Sequence[Run], loaded: LoadedModel, before: Prefill | None
    ) -> None:
        """`runs` lack the batch's examples; `before` is an earlier example's prompt, whose context may be the same."""
        config = runs[0].config
        self._loaded, self._config, self._before = loaded, config, before
        self._chunk = runs[0].working.chunk
        self._prompts = [prompt_of(loaded, example) for example in batch]
        self._ids = [prompt.input_ids[: prompt_tokens(config, prompt)] for prompt in self._prompts]
        self._made: Prefill | None = None
        probed = [run for run in runs if is_probed(run)]
        sessions = [session_of(run.config, loaded) for run in runs]
        passes = [(run, group) for run in probed for group in probe_passes(run.config)]
        windows = _windows([*sessions, *(session_of(run.config, loaded, group) for run, group in passes)], loaded)
        self._window = None if None in windows else max((window for window in windows if window is not None), default=0)
        single = len(batch) == 1
        self.border = self._prompts[0].context_tokens if single else None
        self._reused = single and before is not None and reusable(before, self._ids[0], self.border, self._window)
        batches = config.in_batches  # whose peak memory is not that of their probed examples, which run alone
        fits = self._fits()
        self._shared = fits and (len(runs) + len(passes) > 1 or self._reused or batches)
        self._recording = {
            run.config.hash: single and fits and self._records(run.config, session)
            for run, session in zip(runs, sessions, strict=True)
        }
        self._own = {run.config.hash for run in runs if self._is_own(run, batches)}
        turn = None if batches else next((run for run in runs if self._can_begin(run)), None)
        if turn is not None:
            self._own.add(turn.config.hash)
        self.order = sorted(runs, key=lambda run: (run is not turn, run.config.hash not in self._own))
        """The runs, those first that compute the prompt themselves."""

    def is_own(self, config: RunConfig) -> bool:
        """Whether a run computes the prompt itself."""
        return config.hash in self._own

    def recorder(self, config: RunConfig) -> PromptRecorder | None:
        """What a run that computes the prompt itself records it with, if it can and it is still needed."""
        for held in (self._before, self._made):
            if held is not None and held.others:  # they would be in the run's peak memory
                self._before = self._made = None
        if self._made is not None or not self._recording[config.hash]:
            return None
        return PromptRecorder(self._window)

    def take(self, recorder: PromptRecorder) -> None:
        """Keep what a run recorded."""
        self._made = recorder.prompt

    def probed(self, config: RunConfig) -> Prefill | None:
        """The prompt for a generation with probes; None where it computes the prompt itself.

        That is where everyone does, and for exact attention of a question that comes after its prompt: it would see all
        of the question's tokens in one call, and probes want them one by one.
        """
        exact = registry().find("policy", config.policy).exact
        return None if exact and len(self._ids[0]) < len(self._prompts[0].input_ids) else self.prefill()

    def prefill(self) -> Prefill | None:
        """The prompt, computed now if it was not before; None where everyone computes it."""
        if self._made is None and self._shared:
            self._made = prefill(
                self._loaded.model, self._ids, query_window=self._window, chunk=self._chunk,
                context=self.border, before=self._before,
            )  # fmt: skip
        return self._made

    @property
    def latest(self) -> Prefill | None:
        """The latest prompt computed, for a next one with the same context."""
        return self._made or self._before

    def _is_own(self, run: Run, batches: bool) -> bool:
        if not self._shared or batches:
            return not self._shared
        longest = _longest_own(run)
        if longest:
            return len(self._prompts[0].input_ids) > LONGER * longest
        return len(run.rows) == run.config.examples - 1

    def _can_begin(self, run: Run) -> bool:
        return not self._reused and not _longest_own(run) and self._recording[run.config.hash]

    def _records(self, config: RunConfig, session: Session) -> bool:
        whole = config.question == "aware" or len(self._ids[0]) == len(self._prompts[0].input_ids)
        return (whole or not session.policy.exact) and can_record(session, self._window, self._chunk)

    def _fits(self) -> bool:
        """Whether there is room for the prompt's vectors."""
        text = self._loaded.model.config.get_text_config(decoder=True)
        groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        longest = max(map(len, self._ids))
        queries = longest if self._window is None else min(self._window, longest)
        token = token_bytes(self._loaded.model) * len(self._ids)
        return bool(token * longest + token * queries * text.num_attention_heads // (2 * groups) <= spool_room())


def _windows(sessions: Iterable[Session], loaded: LoadedModel) -> list[int | None]:
    layers = range(loaded.model.config.get_text_config(decoder=True).num_hidden_layers)
    return [session.query_window(number) for session in sessions for number in layers]


def _longest_own(run: Run) -> int:
    """Tokens of the longest prompt whose peak memory was measured; 0 for none."""
    return max((row["prompt_tokens"] for row in run.rows if row["peak_memory_bytes"] is not None), default=0)
