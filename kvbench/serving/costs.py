"""Service times of a policy as functions of tokens, fitted to what runs with a cached prefix measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from scipy.optimize import nnls

from kvbench.contract.errors import KVBenchError
from kvbench.report.collect import ReportRun, labels

BASELINE = "full"
_SAME = ("policy", "policy_options", "budget", "dense_layers", "decoding", "prefill_chunk")
"""What runs of one policy have in common, whatever their lengths."""
Features = Callable[[float, float], tuple[float, ...]]
"""What a time is a sum of, of tokens held before and new tokens."""


def _linear(held: float, new: float) -> tuple[float, ...]:
    return 1.0, held


def _quadratic(held: float, new: float) -> tuple[float, ...]:
    return 1.0, held, held * held


def _extending(held: float, new: float) -> tuple[float, ...]:
    return 1.0, new, new * (held + new)


FORMS: dict[str, tuple[Features, str]] = {
    "prefill": (_quadratic, "a + b·n + c·n²"), "index": (_quadratic, "a + b·n + c·n²"),
    "load": (_linear, "a + b·n"), "save": (_linear, "a + b·n"), "state_bytes": (_linear, "a + b·n"),
    "extend": (_extending, "a + b·m + c·m·(n + m)"), "step": (_linear, "a + b·n"),
}  # fmt: skip
"""How each quantity depends on n tokens held and m new ones: seconds, and bytes for `state_bytes`."""


@dataclass(frozen=True)
class Fit:
    """Coefficients, none below 0, and how far the fit lies from what was measured, relative: at most and in median."""

    form: str
    coefficients: tuple[float, ...]
    worst: float
    typical: float
    points: int

    def document(self) -> dict[str, Any]:
        """As written to the results."""
        return {
            "form": self.form, "coefficients": list(self.coefficients), "largest_relative_error": self.worst,
            "median_relative_error": self.typical, "points": self.points,
        }  # fmt: skip


class Costs:
    """What requests take of one policy: every method gives seconds of `held` tokens that are there and `new` ones."""

    def __init__(self, label: str, measured: dict[str, list[tuple[float, float, float]]], token_bytes: float) -> None:
        """`measured`: by quantity (tokens held, new tokens, value); `token_bytes`: keys and values of a token."""
        self.label, self.token_bytes = label, token_bytes
        self.longest = int(max(held for held, _, _ in measured["prefill"]))
        self.fits: dict[str, Fit] = {}
        for name, (features, form) in FORMS.items():
            self.fits[name] = _fit(features, form, measured[name])

    def of(self, name: str, held: float, new: float = 0.0) -> float:
        """A quantity of `FORMS`."""
        features = FORMS[name][0]
        return sum(a * x for a, x in zip(self.fits[name].coefficients, features(held, new), strict=True))

    def anew(self, tokens: int) -> float:
        """Read a whole prompt and build the index."""
        return self.of("prefill", tokens) + self.of("index", tokens)

    def hit(self, held: int, new: int) -> float:
        """Load the policy's saved state of `held` tokens and let `new` ones follow."""
        return self.of("load", held) + self.of("extend", held, new)


def _fit(features: Features, form: str, measured: Sequence[tuple[float, float, float]]) -> Fit:
    """Least squares of relative errors, with no coefficient below 0."""
    values = np.array([value for _, _, value in measured])
    largest = values.max(initial=0.0)
    if largest <= 0:
        return Fit(form, (0.0,) * len(features(1, 1)), 0.0, 0.0, len(values))
    rows = np.array([features(held, new) for held, new, _ in measured])
    weights = 1 / np.maximum(values, 1e-3 * largest)
    scale = rows.max(axis=0)
    found = nnls(rows / scale * weights[:, None], values * weights)[0] / scale
    errors = np.abs(rows @ found - values) * weights
    return Fit(form, tuple(map(float, found)), float(errors.max()), float(np.median(errors)), len(values))


def costs_of(runs: Sequence[ReportRun]) -> list[Costs]:
    """The costs of every policy in runs with a cached prefix, exact attention first.

    Raises KVBenchError where there is no such run, no `full` among them, and for a policy with fewer than two lengths.
    """
    mine = [run for run in runs if any("load_s" in row for row in run.rows)]
    if not mine:
        raise KVBenchError(
            "There is no run with a cached prefix here: make some at two context lengths or more with kvbench run "
            "--prefix cached, or give --measure."
        )
    models = {(run.config["model_fingerprint"], run.config["dtype"], run.environment.get("device_name"))
              for run in mine}  # fmt: skip
    if len(models) > 1:
        raise KVBenchError(
            f"The runs with a cached prefix are of {len(models)} models, dtypes or devices: give a folder with those "
            "of one."
        )
    groups: dict[str, list[ReportRun]] = {}
    for run in mine:
        groups.setdefault(json.dumps({key: run.config[key] for key in _SAME}, sort_keys=True), []).append(run)
    firsts = [group[0] for group in groups.values()]
    names = labels(firsts, apart=[key for key in firsts[0].config if key not in _SAME])
    found = [
        _of(names[id(first)].removesuffix(" (over budget)"), group)
        for first, group in zip(firsts, groups.values(), strict=True)
    ]
    if not any(one.label == BASELINE for one in found):
        raise KVBenchError(
            "Exact attention is not among the runs with a cached prefix, and what saved keys and values take is "
            "measured with it: add --policy full."
        )
    return sorted(found, key=lambda one: one.label != BASELINE)


def _of(label: str, runs: Sequence[ReportRun]) -> Costs:
    rows = [row for run in runs for row in run.rows if "load_s" in row and row["step_s"]]
    if len({row["prefix_tokens"] for row in rows}) < 2:
        raise KVBenchError(
            f"{label} was measured at one length of the prefix only, and times are fitted to lengths: run it with "
            "another --context-length, too."
        )
    built = [row for row in rows if "construct_prefill_s" in row]
    measured = {
        "prefill": [(row["prompt_tokens"], 0, row["miss_prefill_s"]) for row in rows]
        + [(row["prefix_tokens"], 0, row["construct_prefill_s"]) for row in built],
        "index": [(row["prompt_tokens"], 0, row["miss_index_s"]) for row in rows]
        + [(row["prefix_tokens"], 0, row["construct_index_s"]) for row in built],
        "load": [(row["prefix_tokens"], 0, row["load_s"]) for row in rows],
        "save": [(row["prefix_tokens"], 0, row["save_s"]) for row in built],
        "state_bytes": [(row["prefix_tokens"], 0, row["state_bytes"]) for row in built],
        "extend": [(row["prefix_tokens"], row["new_tokens"], row["extend_s"]) for row in rows],
        "step": [(row["prompt_tokens"], 0, median(row["step_s"])) for row in rows],
    }
    if label == BASELINE:  # what exact attention takes besides is no index
        measured["index"] = [(tokens, 0, 0.0) for tokens, _, _ in measured["index"]]
    return Costs(label, measured, fmean(row["token_bytes"] for row in rows))
