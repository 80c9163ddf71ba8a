"""Proves on the very model of a run that what kvbench gives is what transformers gives, and what a policy promises.

The model: policy `full`, and a selection and an eviction that cover everything, against plain transformers. A policy:
its attended tokens stay within its budget, are set aside and named once, two runs are equal, and a budget that covers
everything is exact. Everything runs on a batch of two rows with left padding, where the model takes padding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.probe import Probe
from kvbench.engine.conformance.covering import Covering
from kvbench.engine.conformance.report import Check, Report
from kvbench.engine.conformance.watch import ConformanceError, Watch, distance, first_difference
from kvbench.engine.prefill import forward, prefill
from kvbench.engine.prompt import Prefill
from kvbench.engine.session import Session
from kvbench.engine.survey import survey
from kvbench.plugins import registry

PROMPT, CHUNK, PADDING, STEPS = 10, 8, 3, 9
"""Tokens of the prompt that proves a model, of its first chunk, of padding in its second row, and steps after it.

Calls of 2, 16 or 20 rows of numbers are the cheapest on a CPU, where matrix products of odd sizes take longer.
"""
WHOLE, CHUNKS, AFTER = (0, 1, STEPS), (0, 1), (1, STEPS)
"""Where forward calls end, in tokens after the prompt: one step comes alone, the others in one call.

With `CHUNKS` the prompt itself comes in two calls. A policy sees every token as a step of its own. In a call of one
token a model reads all its weights, which on a CPU takes as long as a call of ten.
"""
CONTEXT, BESIDE = 112, 44
"""Tokens of the prompt that policies are checked on, longer where their static set leaves less beside it.

A window of 64 with four sinks, the widest default, still leaves a choice.
"""
_SPECIAL = ("pad", "bos", "eos")
Ends = tuple[int, ...]
NOISE = 8
"""How many times the model's own rounding a difference may be."""


class Memory(Protocol):
    """What was found in other processes, by policy (None: of the model), and with fixed steps or without."""

    def find(self, policy: KVCachePolicy | None, fixed: bool) -> Report | None:
        """What was found; None where it must be found now."""

    def keep(self, policy: KVCachePolicy | None, fixed: bool, report: Report) -> None:
        """Keep what was found."""


class Conformance:
    """Checks one model, and policies on it; what was found before in this process is not computed again."""

    def __init__(
        self, model: Any, name: str | None = None, tokenizer: Any = None, *, fixed: bool | None = None,
        memory: Memory | None = None,
    ) -> None:  # fmt: skip
        """Name a model; `fixed` checks steps of fixed shapes, too, by default on a GPU, where runs take them.

        `memory` has what was found in other processes.
        """
        self.model, self.name, self.tokenizer = model, name or type(model).__name__, tokenizer
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.fixed = self.device.type == "cuda" if fixed is None else fixed
        how = str(self.device), str(self.dtype), str(model.config._attn_implementation), str(self.fixed)
        self._known = _KNOWN.setdefault(model, {}).setdefault(how, _Known())
        self._memory = memory
        self._prompts: dict[int, _Prompt] = {}

    # -- the model ---------------------------------------------------------------------------------------------------

    def check_model(self) -> Report:
        """Prove that `full`, and a selection and an eviction that cover everything, equal plain transformers."""
        known = self._known
        if known.model is None:
            known.model = self._recall(None)
            if known.model is not None:
                known.padding, known.tolerance = known.model.padding, known.model.tolerance
        if known.model is None:
            start = time.perf_counter()
            with _seeded(self.device):
                checks = tuple(self._model_checks())
            took = time.perf_counter() - start
            known.model = Report(self.name, None, checks, took, known.padding, known.tolerance)
            self._keep(None, known.model)
        return replace(known.model, model=self.name)

    def _recall(self, policy: KVCachePolicy | None) -> Report | None:
        return None if self._memory is None else self._memory.find(policy, self.fixed)

    def _keep(self, policy: KVCachePolicy | None, report: Report) -> None:
        if self._memory is not None:
            self._memory.keep(policy, self.fixed, report)

    def _model_checks(self) -> Iterator[Check]:
        ids, mask = self._tokens(PROMPT)
        plain: dict[Ends, Tensor] = {}
        try:
            plain[WHOLE] = self._logits(ids, mask, WHOLE)
        except Exception as error:
            _one_line(error)
            mask = None  # a model that takes no padding
        self._known.padding = mask is not None
        try:
            if mask is None:
                plain[WHOLE] = self._logits(ids, mask, WHOLE)
            plain[CHUNKS] = self._logits(ids, mask, CHUNKS)
        except Exception as error:
            if not plain:
                yield Check("transformers", "failed", f"plain transformers cannot run it ({_one_line(error)})")
                return
            yield Check("transformers in chunks", "skipped", f"it takes no prompt in chunks ({_one_line(error)})")
        if not all(bool(torch.isfinite(logits).all()) for logits in plain.values()):
            yield Check("transformers", "failed", f"plain transformers gives logits that are NaN or infinite in "
                        f"{_short(self.dtype)}; load it in another dtype")  # fmt: skip
            return
        self._known.tolerance = self._tolerance(plain)
        sound = True
        for ends, logits in plain.items():
            check = self._full(ids, mask, ends, logits)
            sound = sound and check.status == "passed"
            yield check
        for ends, logits in plain.items() if sound else ():
            yield self._covering(ids, mask, ends, logits)

    def _tolerance(self, plain: dict[Ends, Tensor]) -> float:
        """Eight times what rounding alone does, at least 2^-14 and sixteen units of the dtype's rounding.

        The prompt in one call and in two gives plain transformers the same sums in another order: that difference is
        what rounding does on this model, device and dtype. A policy's attention merges parts in float32 where plain
        attention rounds weights and outputs to the dtype, so it may be further off. Where the difference is larger than
        the root of the unit it is no rounding: a model that forgets between chunks.
        """
        unit = torch.finfo(self.dtype).eps
        least = max(16 * unit, 2.0**-14)
        noise = 0.0
        if CHUNKS in plain:
            noise = distance(_centred(plain[CHUNKS]), _centred(plain[WHOLE][:2]))
        return max(NOISE * noise, least) if noise < unit**0.5 else least

    def _full(self, ids: Tensor, mask: Tensor | None, ends: Ends, plain: Tensor) -> Check:
        name = "full" + _in_chunks(ends)
        try:
            with self._session(_full()):
                logits = self._logits(ids, mask, ends)
        except Exception as error:
            return Check(name, "failed", _one_line(error))
        exact = self.device.type == "cpu" and self.dtype == torch.float32
        check = self._compare(name, logits, plain, ends, 0.0 if exact else self._known.tolerance)
        if check.status == "passed":
            return check
        return replace(check, detail=f"policy 'full': {check.detail}{self._differing_layer(ids, mask, ends)}")

    def _differing_layer(self, ids: Tensor, mask: Tensor | None, ends: Ends) -> str:
        """The first layer whose output under `full` is not plain transformers', in words."""
        plain: list[tuple[Tensor, ...]] = []
        ours: list[tuple[Tensor, ...]] = []
        self._logits(ids, mask, ends, hidden=plain)
        with self._session(_full()):
            self._logits(ids, mask, ends, hidden=ours)
        for mine, theirs in zip(ours, plain, strict=True):
            for number, (one, other) in enumerate(zip(mine[1:], theirs[1:], strict=True)):
                if not torch.equal(one[:, -1], other[:, -1]):
                    error = distance(one[:, -1], other[:, -1])
                    return f"; first in the output of layer {number}, by {error:.2g} of it"
        return "; the layers' outputs are equal"

    def _covering(self, ids: Tensor, mask: Tensor | None, ends: Ends, plain: Tensor) -> Check:
        name = "covering selection and eviction" + _in_chunks(ends)
        if (refusal := survey(self.model).refusal) is not None:
            return Check(name, "skipped", f"only policy 'full' runs on it: {refusal}")
        policy = Covering(evicting=0 if ends == WHOLE else 1)
        watch = Watch(policy, covering=True)
        try:
            with self._session(policy, watch):
                logits = self._logits(ids, mask, ends)
        except ConformanceError as fault:
            return Check(name, "failed", str(fault))
        except KVBenchError as error:
            return Check(name, "skipped", f"only policy 'full' runs on it: {_one_line(error)}")
        except Exception as error:
            return Check(name, "failed", _one_line(error))
        check = self._compare(name, logits, plain, ends, self._known.tolerance)
        if check.status == "passed":
            return check
        full = _full()
        exact = Watch(full, covering=False)
        with self._session(full, exact):
            self._logits(ids, mask, ends)
        where = first_difference(watch, exact, self._known.tolerance)
        return replace(check, detail=f"{check.detail}; {where}" if where else check.detail)

    def _compare(
        self, name: str, logits: Tensor, plain: Tensor, ends: Ends, tolerance: float, where: str = ""
    ) -> Check:
        """Compare logits [calls, B, V]."""
        if torch.equal(logits, plain):
            return Check(name, "passed", "equal bit for bit", 0.0, tolerance)
        errors = [distance(_centred(mine), _centred(theirs)) for mine, theirs in zip(logits, plain, strict=True)]
        largest = max(errors)
        if largest <= tolerance and tolerance > 0:
            return Check(name, "passed", f"within {largest:.2g}; rounding allows {tolerance:.2g}", largest, tolerance)
        call = next(call for call, error in enumerate(errors) if not error <= tolerance)
        place = f"step {ends[call]}" if ends[call] else "the end of the prompt"
        allowed = f"rounding allows {tolerance:.2g}" if tolerance else "expected equality bit for bit"
        detail = f"logits differ from plain transformers' first at {place}, by {errors[call]:.2g} of them{where}"
        return Check(name, "failed", f"{detail} ({allowed})", largest, tolerance)

    # -- a policy ----------------------------------------------------------------------------------------------------

    def check_policy(self, policy: KVCachePolicy) -> Report:
        """Prove what a policy promises, on this model and with its options."""
        key = type(policy), policy.name, policy.given.model_dump_json()
        known = self._known.policies
        if key not in known and (found := self._recall(policy)) is not None:
            known[key] = found
        if key not in known:
            model = self.check_model()
            start = time.perf_counter()
            with _seeded(self.device):
                checks = tuple(self._uncached(policy) if not policy.cached else self._policy_checks(policy))
            took = time.perf_counter() - start
            known[key] = Report(self.name, policy.name, checks, took, model.padding, model.tolerance)
            self._keep(policy, known[key])
        return replace(known[key], model=self.name)

    def check(self, policy: KVCachePolicy) -> list[Report]:
        """Check the model, and where it is sound the policy on it; `full` is the model's check alone."""
        reports = [self.check_model()]
        if reports[0].failure is None and (self.fixed or type(policy) is not type(_full())):
            reports.append(self.check_policy(policy))
        return reports

    def prove(self, policy: KVCachePolicy) -> tuple[Report, ...]:
        """Check the model and a policy on it, and raise KVBenchError where one of them fails."""
        reports = self.check(policy)
        for report in reports:
            report.require()
        return tuple(reports)

    def _uncached(self, policy: KVCachePolicy) -> Iterator[Check]:
        ids, mask = self._tokens(PROMPT)
        mask = mask if self._known.padding else None
        ends = (0, 1, 2)
        try:
            with self._session(policy):
                logits = self._logits(ids, mask, ends, cached=False)
        except Exception as error:
            yield Check("runs", "failed", _one_line(error))
            return
        yield self._compare("exact", logits, self._logits(ids, mask, ends), ends, self._known.tolerance)

    def _policy_checks(self, policy: KVCachePolicy) -> Iterator[Check]:
        try:
            survey(self.model).require(policy)
            prompt = self._prompt(policy)
            static = sum(policy.static_tokens(prompt.tokens))
            size = static + max((prompt.tokens - PADDING - static) // 2, 1)
            budget = Budget(tokens=size) if policy.takes_budget else None
            covers = budget is None and not policy.never_exact
            first, logits = self._run(policy, budget, prompt, covering=covers)
            yield Check("selection", "passed", "static set and selection are disjoint, in range, without repeats")
            if budget is not None and not policy.exact:
                yield Check("budget", "passed", first.told(size))
            again, logits_again = self._run(policy, budget, prompt, covering=covers)
            yield self._equal(first, again, logits, logits_again)
            if policy.never_exact:
                yield Check("exact when covering", "skipped", f"never exact: {policy.never_exact}")
            else:
                budget = None if budget is None else Budget(ratio=1.0)
                if budget is not None:
                    first, logits = self._run(policy, budget, prompt, covering=True)
                yield self._exact(first, logits, prompt)
            if self.fixed:
                yield self._in_fixed_steps(policy, budget, prompt, logits)
        except ConformanceError as fault:
            yield Check(fault.check, "failed", str(fault))
        except Exception as error:
            yield Check("runs", "failed", _one_line(error))

    def _equal(self, first: Watch, again: Watch, logits: Tensor, logits_again: Tensor) -> Check:
        """Compare two runs: the tokens attended, and the logits."""
        name = "two runs are equal"
        for place, mine in first.attended.items():
            theirs = again.attended[place]
            if not torch.equal(mine, theirs):
                step, number, _ = place
                count = int((mine != theirs).sum())
                detail = f"they attend to other tokens ({count} differ), first at layer {number}, step {step}"
                return Check(name, "failed", detail)
        tolerance = 0.0 if self.device.type == "cpu" else self._known.tolerance
        where = first_difference(again, first, tolerance)
        if where is not None:
            return Check(name, "failed", f"they attend to the same tokens and differ {where}")
        error = distance(_centred(logits_again), _centred(logits))
        if error > tolerance:
            return Check(name, "failed", f"their logits differ by {error:.2g}", error, tolerance)
        return Check(name, "passed", "equal bit for bit" if error == 0 else f"within {error:.2g}", error, tolerance)

    def _exact(self, watch: Watch, logits: Tensor, prompt: _Prompt) -> Check:
        if prompt.exact is None:
            prompt.exact = self._run(_full(), None, prompt, covering=False)
        reference, exact_logits = prompt.exact
        tolerance = self._known.tolerance
        if bool(torch.isfinite(logits).all()) and distance(_centred(logits), _centred(exact_logits)) <= tolerance:
            where = ""
        else:
            found = first_difference(watch, reference, tolerance)
            where = f", {found}" if found else ""
        return self._compare("exact when covering", logits, exact_logits, AFTER, tolerance, where)

    def _run(
        self, policy: KVCachePolicy, budget: Budget | None, prompt: _Prompt, *, covering: bool
    ) -> tuple[Watch, Tensor]:
        """Take over the prompt and decode; what was attended to, and logits [steps, B, V]."""
        watch = Watch(policy, covering=covering)
        session = Session(self.model, policy, budget, [watch], tokenizer=self.tokenizer)
        torch.manual_seed(0)
        with session:
            self._begin(session, prompt.prefill)
            return watch, self._logits(prompt.prefill.ids, prompt.prefill.mask, AFTER, past=session.cache)

    def _in_fixed_steps(self, policy: KVCachePolicy, budget: Budget | None, prompt: _Prompt, logits: Tensor) -> Check:
        """Compare steps of fixed shapes, in a CUDA graph where there is a GPU, with steps hook by hook."""
        name = "fixed steps"
        session = Session(self.model, policy, budget, tokenizer=self.tokenizer)
        torch.manual_seed(0)
        with session, torch.no_grad():
            self._begin(session, prompt.prefill)
            decoder = session.fixed(self._answer[:, 0], STEPS, graph=self.device.type == "cuda")
            if isinstance(decoder, str):
                return Check(name, "skipped", f"none: {decoder}")
            found = []
            for step in range(STEPS):
                decoder.tokens.copy_(self._answer[:, step : step + 1])
                decoder.step()
                found.append(decoder.logits.float().clone())
            taken = torch.stack([found[end - 1] for end in AFTER])
        error = distance(_centred(taken), _centred(logits))
        tolerance = 2 * self._known.tolerance  # both sides round
        if error <= tolerance:
            detail = f"{decoder.mode}, within {error:.2g}; rounding allows {tolerance:.2g}"
            return Check(name, "passed", detail, error, tolerance)
        detail = f"their logits are {error:.2g} off those of steps hook by hook (rounding allows {tolerance:.2g})"
        return Check(name, "failed", detail, error, tolerance)

    def _begin(self, session: Session, prompt: Prefill) -> None:
        """Let a policy take over the prompt, or read it where it computes the prompt's attention itself."""
        if session.own_prompt:
            with torch.no_grad():
                forward(session, prompt.ids, prompt.mask, 0)
        else:
            session.resume(prompt)

    def _prompt(self, policy: KVCachePolicy) -> _Prompt:
        """The exact pass over a prompt that is long enough for the policy's static set."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        longest, tokens = (limit or 2**20) - STEPS - 1, CONTEXT
        while tokens < longest and sum(policy.static_tokens(tokens)) > tokens - BESIDE:
            tokens += BESIDE
        tokens = min(tokens, longest)
        if tokens not in self._prompts:
            ids, _ = self._tokens(tokens)
            padding = PADDING if self._known.padding else 0
            made = prefill(self.model, [ids[0].tolist(), ids[1, padding:].tolist()])
            self._prompts[tokens] = _Prompt(tokens, made)
        return self._prompts[tokens]

    # -- running -----------------------------------------------------------------------------------------------------

    def _session(self, policy: KVCachePolicy, *probes: Probe) -> Session:
        return Session(self.model, policy, None, probes)

    def _tokens(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Token ids [2, count] and their mask, the second row padded on its left."""
        ids = self._draw(count, seed=1)
        mask = torch.ones_like(ids)
        mask[1, :PADDING] = 0
        return ids, mask

    @cached_property
    def _singly(self) -> bool:
        """Whether tokens after the prompt must come one by one: where layers share keys."""
        try:
            return survey(self.model).shares
        except KVBenchError:
            return False

    @cached_property
    def _answer(self) -> Tensor:
        return self._draw(STEPS, seed=2)

    def _draw(self, count: int, seed: int) -> Tensor:
        """Token ids [2, count] of ordinary tokens: special ones lie at either end of a vocabulary, or are named."""
        config, generation = self.model.config.get_text_config(decoder=True), self.model.generation_config
        named = [getattr(part, f"{name}_token_id", None) for part in (config, generation) for name in _SPECIAL]
        special = {id for value in named for id in (value if isinstance(value, list) else [value])}
        words = self.model.get_input_embeddings().num_embeddings
        usable = [id for id in range(3, max(words // 2, 16)) if id not in special]
        places = torch.randint(len(usable), (2, count), generator=torch.Generator().manual_seed(seed))
        return torch.tensor(usable)[places].to(self.device)

    @torch.no_grad()
    def _logits(
        self, ids: Tensor, mask: Tensor | None, ends: Ends, *, past: Any = None, cached: bool = True,
        hidden: list[tuple[Tensor, ...]] | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [calls, B, V] after the last token of each call, along given tokens.

        Every call is transformers' own `generate` of one token, so that each architecture prepares its own inputs.
        Hidden states, the embeddings' and every layer's, are added to `hidden`.
        """
        whole = torch.cat([ids, self._answer], dim=1)
        kept = torch.cat([torch.ones_like(ids) if mask is None else mask, torch.ones_like(self._answer)], dim=1)
        found = []
        for end in range(ends[0], ends[-1] + 1) if self._singly else ends:
            stop = ids.shape[1] + end
            made = self.model.generate(
                whole[:, :stop], attention_mask=kept[:, :stop], past_key_values=past, use_cache=cached,
                max_new_tokens=1, do_sample=False, num_beams=1, output_logits=True, return_dict_in_generate=True,
                pad_token_id=int(whole[0, 0]), output_hidden_states=hidden is not None,
                prefill_chunk_size=CHUNK if ends == CHUNKS and end == 0 else None,
            )  # fmt: skip
            if end in ends:
                found.append(made.logits[0].float())
            if hidden is not None:
                hidden.append(made.hidden_states[0])
            past = made.past_key_values if cached else None
        return torch.stack(found)


@dataclass
class _Known:
    """What was found in this process."""

    model: Report | None = None
    padding: bool = True
    tolerance: float = 0.0
    policies: dict[tuple[type[KVCachePolicy], str, str], Report] = field(default_factory=dict)


_KNOWN: WeakKeyDictionary[Any, dict[tuple[str, ...], _Known]] = WeakKeyDictionary()
"""By model, and by its device, dtype and attention."""


@dataclass
class _Prompt:
    """A prompt's exact pass."""

    tokens: int
    prefill: Prefill
    exact: tuple[Watch, Tensor] | None = None
    """What policy `full`, which was proven to be plain transformers, makes of the answer after it."""


def _full() -> KVCachePolicy:
    full: KVCachePolicy = registry().make("policy", "full")
    return full


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Leave PyTorch's random numbers as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _centred(logits: Tensor) -> Tensor:
    return logits.double() - logits.double().mean(-1, keepdim=True)


def _in_chunks(ends: Ends) -> str:
    return ", prompt in two chunks" if ends == CHUNKS else ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_line(error: Exception) -> str:
    """An error as a clause; a lack of memory says nothing of the model and is raised."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        raise error
    text = " ".join(str(error).split())[:500].rstrip(".")
    return text if isinstance(error, KVBenchError) else f"{type(error).__name__}: {text}"
