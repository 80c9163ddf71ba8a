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
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from kvbench.contract.budget import Budget
from kvbench.contract.policy import KVCachePolicy
from kvbench.engine.conformance.of_model import model_checks
from kvbench.engine.conformance.of_policy import PolicyChecks
from kvbench.engine.conformance.report import Check, Report
from kvbench.engine.conformance.trial import Trial, full
from kvbench.engine.session import Session


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
        self.name = name or type(model).__name__
        self.trial = Trial(model, self.name, tokenizer)
        self.fixed = self.trial.device.type == "cuda" if fixed is None else fixed
        how = str(self.trial.device), str(self.trial.dtype), str(model.config._attn_implementation), str(self.fixed)
        self._known = _KNOWN.setdefault(model, {}).setdefault(how, _Known())
        self._memory = memory
        self._policies = PolicyChecks(self.trial, self.fixed)

    def check_model(self) -> Report:
        """Prove that `full`, and a selection and an eviction that cover everything, equal plain transformers."""
        known, trial = self._known, self.trial
        if known.model is None:
            known.model = self._recall(None)
        if known.model is None:
            start = time.perf_counter()
            with _seeded(trial.device):
                checks = tuple(self._model_checks())
            took = time.perf_counter() - start
            known.model = Report(self.name, None, checks, took, trial.padding, trial.tolerance)
            self._keep(None, known.model)
        trial.padding, trial.tolerance = known.model.padding, known.model.tolerance
        return replace(known.model, model=self.name)

    def check_policy(self, policy: KVCachePolicy) -> Report:
        """Prove what a policy promises, on this model and with its options."""
        key = type(policy), policy.name, policy.given.model_dump_json()
        known = self._known.policies
        if key not in known and (found := self._recall(policy)) is not None:
            known[key] = found
        if key not in known:
            model = self.check_model()
            start = time.perf_counter()
            with _seeded(self.trial.device):
                checks = tuple(self._policy_checks(policy))
            took = time.perf_counter() - start
            known[key] = Report(self.name, policy.name, checks, took, model.padding, model.tolerance)
            self._keep(policy, known[key])
        return replace(known[key], model=self.name)

    def check(self, policy: KVCachePolicy) -> list[Report]:
        """Check the model, and where it is sound the policy on it; `full` is the model's check alone.

        Raises KVBenchError, in the policy's own words, for one that does not fit the model (`KVCachePolicy.begin`).
        """
        reports = [self.check_model()]
        if reports[0].failure is None and (self.fixed or type(policy) is not type(full())):
            reports.append(self.check_policy(policy))
            if policy.cached and reports[-1].failure is not None:
                budget = Budget(ratio=1.0) if policy.takes_budget else None
                with Session(self.trial.model, policy, budget, tokenizer=self.trial.tokenizer):
                    pass
        return reports

    def prove(self, policy: KVCachePolicy) -> tuple[Report, ...]:
        """Check the model and a policy on it, and raise KVBenchError where one of them fails."""
        reports = self.check(policy)
        for report in reports:
            report.require()
        return tuple(reports)

    def _model_checks(self) -> Iterator[Check]:
        return model_checks(self.trial)

    def _policy_checks(self, policy: KVCachePolicy) -> Iterator[Check]:
        return self._policies.of(policy)

    def _recall(self, policy: KVCachePolicy | None) -> Report | None:
        return None if self._memory is None else self._memory.find(policy, self.fixed)

    def _keep(self, policy: KVCachePolicy | None, report: Report) -> None:
        if self._memory is not None:
            self._memory.keep(policy, self.fixed, report)


@dataclass
class _Known:
    """What was found in this process."""

    model: Report | None = None
    policies: dict[tuple[type[KVCachePolicy], str, str], Report] = field(default_factory=dict)


_KNOWN: WeakKeyDictionary[Any, dict[tuple[str, ...], _Known]] = WeakKeyDictionary()
"""By model, and by its device, dtype and attention."""


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Leave PyTorch's random numbers as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
