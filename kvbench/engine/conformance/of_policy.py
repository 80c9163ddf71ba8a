"""Proves of a policy, on a model and with its options, what it promises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.contract.budget import Budget
from kvbench.contract.policy import KVCachePolicy
from kvbench.engine.conformance.of_model import PROMPT
from kvbench.engine.conformance.report import Check
from kvbench.engine.conformance.trial import PADDING, STEPS, Trial, centred, clause, full
from kvbench.engine.conformance.watch import ConformanceError, Watch, distance, first_difference
from kvbench.engine.prefill import forward, prefill
from kvbench.engine.prompt import Prefill
from kvbench.engine.session import Session
from kvbench.engine.survey import survey
from kvbench.engine.validation import static_tokens

CONTEXT, BESIDE = 112, 44
"""Tokens of the prompt, longer where a policy's static set leaves less beside it.

A window of 64 with four sinks, the widest default, still leaves a choice.
"""
AFTER = (1, STEPS)
"""Where forward calls end after the prompt: one step comes alone, the others in a call, which a policy sees singly."""


@dataclass
class _Prompt:
    """A prompt's exact pass."""

    tokens: int
    prefill: Prefill
    exact: tuple[Watch, Tensor] | None = None
    """What policy `full`, which was proven to be plain transformers, makes of the answer after it."""


@dataclass
class PolicyChecks:
    """Checks policies on one model, whose own checks passed, on prompts that they share.

    `fixed` checks steps of fixed shapes, too.
    """

    trial: Trial
    fixed: bool
    _prompts: dict[int, _Prompt] = field(default_factory=dict)

    def of(self, policy: KVCachePolicy) -> Iterator[Check]:
        """Check a policy, up to the first fault."""
        if not policy.cached:
            yield self._uncached(policy)
            return
        try:
            survey(self.trial.model).require(policy)
            prompt = self._prompt(policy)
            static = sum(static_tokens(policy, prompt.tokens))
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
            yield Check("runs", "failed", clause(error))

    def _uncached(self, policy: KVCachePolicy) -> Check:
        ids, mask = self.trial.tokens(PROMPT)
        kept = mask if self.trial.padding else None
        ends = (0, 1, 2)
        try:
            with self.trial.session(policy):
                logits = self.trial.logits(ids, kept, ends, cached=False)
        except Exception as error:
            return Check("runs", "failed", clause(error))
        return self.trial.compare("exact", logits, self.trial.logits(ids, kept, ends), ends)

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
        tolerance = 0.0 if self.trial.device.type == "cpu" else self.trial.tolerance
        where = first_difference(again, first, tolerance)
        if where is not None:
            return Check(name, "failed", f"they attend to the same tokens and differ {where}")
        error = distance(centred(logits_again), centred(logits))
        if error > tolerance:
            return Check(name, "failed", f"their logits differ by {error:.2g}", error, tolerance)
        return Check(name, "passed", "equal bit for bit" if error == 0 else f"within {error:.2g}", error, tolerance)

    def _exact(self, watch: Watch, logits: Tensor, prompt: _Prompt) -> Check:
        if prompt.exact is None:
            prompt.exact = self._run(full(), None, prompt, covering=False)
        reference, exact_logits = prompt.exact
        tolerance = self.trial.tolerance
        if bool(torch.isfinite(logits).all()) and distance(centred(logits), centred(exact_logits)) <= tolerance:
            where = ""
        else:
            found = first_difference(watch, reference, tolerance)
            where = f", {found}" if found else ""
        return self.trial.compare("exact when covering", logits, exact_logits, AFTER, where=where)

    def _run(
        self, policy: KVCachePolicy, budget: Budget | None, prompt: _Prompt, *, covering: bool
    ) -> tuple[Watch, Tensor]:
        """Take over the prompt and decode; what was attended to, and logits [calls, B, V]."""
        watch = Watch(policy, covering=covering)
        session = Session(self.trial.model, policy, budget, [watch], tokenizer=self.trial.tokenizer)
        torch.manual_seed(0)
        with session:
            _begin(session, prompt.prefill)
            return watch, self.trial.logits(prompt.prefill.ids, prompt.prefill.mask, AFTER, past=session.cache)

    def _in_fixed_steps(self, policy: KVCachePolicy, budget: Budget | None, prompt: _Prompt, logits: Tensor) -> Check:
        """Compare steps of fixed shapes, in a CUDA graph where there is a GPU, with steps hook by hook."""
        name = "fixed steps"
        trial = self.trial
        session = Session(trial.model, policy, budget, tokenizer=trial.tokenizer)
        torch.manual_seed(0)
        with session, torch.no_grad():
            _begin(session, prompt.prefill)
            decoder = session.fixed(trial.answer[:, 0], STEPS, graph=trial.device.type == "cuda")
            if isinstance(decoder, str):
                return Check(name, "skipped", f"none: {decoder}")
            found = []
            for step in range(STEPS):
                decoder.tokens.copy_(trial.answer[:, step : step + 1])
                decoder.step()
                found.append(decoder.logits.float().clone())
            taken = torch.stack([found[end - 1] for end in AFTER])
        error = distance(centred(taken), centred(logits))
        tolerance = 2 * trial.tolerance  # both sides round
        if error <= tolerance:
            detail = f"{decoder.mode}, within {error:.2g}; rounding allows {tolerance:.2g}"
            return Check(name, "passed", detail, error, tolerance)
        detail = f"their logits are {error:.2g} off those of steps hook by hook (rounding allows {tolerance:.2g})"
        return Check(name, "failed", detail, error, tolerance)

    def _prompt(self, policy: KVCachePolicy) -> _Prompt:
        """The exact pass over a prompt that is long enough for the policy's static set."""
        model = self.trial.model
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        longest, tokens = (limit or 2**20) - STEPS - 1, CONTEXT
        while tokens < longest and sum(static_tokens(policy, tokens)) > tokens - BESIDE:
            tokens += BESIDE
        tokens = min(tokens, longest)
        if tokens not in self._prompts:
            ids, _ = self.trial.tokens(tokens)
            padding = PADDING if self.trial.padding else 0
            made = prefill(model, [ids[0].tolist(), ids[1, padding:].tolist()])
            self._prompts[tokens] = _Prompt(tokens, made)
        return self._prompts[tokens]


def _begin(session: Session, prompt: Prefill) -> None:
    """Let a policy take over the prompt, or read it where it looks at more than attention's vectors."""
    if session.own_prompt or session.policy.reads_hidden:
        with torch.no_grad():
            forward(session, prompt.ids, prompt.mask, 0)
    else:
        session.resume(prompt)
