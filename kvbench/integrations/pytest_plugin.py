"""pytest fixture `ratio_gate`: benchmarks of ratios, held to a committed baseline, for kvbench and for any plugin.

A ratio of two things measured side by side in one run carries over to another hour, and better than seconds to another
machine, though processors with other caches move it too: each baseline names its processor. The baseline is a JSON
file (ini option `kvbench_baseline`, by default `benchmarks.json` beside the ini file); a run with
`--kvbench-update-baseline` writes it. A ratio more than 20% worse than its baseline fails the test.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from kvbench.contract.errors import KVBenchError

TOLERANCE = 0.20
"""How much worse than its baseline a ratio may be."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the baseline's place and the switch that rewrites it."""
    parser.addini("kvbench_baseline", "baseline file of the ratio benchmarks", default="benchmarks.json")
    parser.getgroup("kvbench").addoption(
        "--kvbench-update-baseline", action="store_true", help="write the measured ratios into the baseline file"
    )


@dataclass
class RatioGate:
    """Measures ratios and fails the test where one is more than 20% worse than the baseline's."""

    benchmark: Any
    baseline: Path
    update: bool

    def time(
        self, name: str, candidate: Callable[[], object], reference: Callable[[], object], *, rounds: int = 7,
        scale: float = 1, warm_up: bool = True,
    ) -> float:  # fmt: skip
        """Time `candidate` against `reference`, in turn, and gate the median ratio of their times (lower is better).

        The ratio is multiplied by `scale` first: the reference's amount of work over the candidate's, for a time per
        unit of work. Both run once unmeasured before, unless `warm_up` says no (for what takes a minute).
        """
        if warm_up:
            reference()
            candidate()
        reference_s: list[float] = []

        def time_reference() -> None:
            start = time.perf_counter()
            reference()
            reference_s.append(time.perf_counter() - start)

        self.benchmark.pedantic(candidate, setup=time_reference, rounds=rounds, iterations=1)
        if self.benchmark.stats is None:
            pytest.skip("pytest-benchmark measures nothing under xdist or --benchmark-disable: run it without them")
        candidate_s = self.benchmark.stats.stats.data
        ratio = statistics.median(ours / theirs for ours, theirs in zip(candidate_s, reference_s, strict=True))
        return self.ratio(name, scale * ratio)

    def ratio(
        self, name: str, value: float, *, better: Literal["lower", "higher"] = "lower", device: str | None = None
    ) -> float:
        """Record a ratio in pytest-benchmark's `extra_info` and gate it; return it.

        Of what ran on a GPU, `device` is the card's name: it has a baseline of its own for each card, and where there
        is none for this one the test is skipped.
        """
        from kvbench.runs.environment import processor  # noqa: PLC0415 - it is slow to import

        if device is not None:
            name = f"{name} on {device}"
        self.benchmark.extra_info[name] = value
        here = device or processor()
        known = self._known()
        if self.update:
            known[name] = {"ratio": round(value, 4), "better": better, "processor": here}
            self._write(json.dumps(known, indent=2, sort_keys=True) + "\n")
            return value
        if name not in known and device is not None:
            pytest.skip(f"Benchmark '{name}' has no baseline: run once on this card with --kvbench-update-baseline.")
        if name not in known:
            pytest.fail(
                f"Benchmark '{name}' has no baseline in {self.baseline}: run once with --kvbench-update-baseline.",
                pytrace=False,
            )
        expected = known[name]["ratio"]
        worse = value > expected * (1 + TOLERANCE) if better == "lower" else value < expected * (1 - TOLERANCE)
        if worse:
            there = known[name].get("processor", here)
            moved = f" The baseline is of another processor, {there}: measure it on this one ({here}) first."
            pytest.fail(
                f"Benchmark '{name}' measured {value:.3f}, more than {TOLERANCE:.0%} worse than its baseline of "
                f"{expected:.3f} ({better} is better) in {self.baseline}.{'' if there == here else moved}",
                pytrace=False,
            )
        return value

    def _known(self) -> dict[str, Any]:
        """The baselines by name; a file that is none fails the test in one sentence."""
        from kvbench.contract.reading import plain, read_json, reading  # noqa: PLC0415

        if not os.path.lexists(self.baseline):
            return {}
        here = plain(str(self.baseline))
        try:
            with reading(
                lambda reason: (
                    f"{here} is no readable file of baselines: {reason}. Restore it, or delete it and run "
                    "once with --kvbench-update-baseline."
                )
            ):
                known = read_json(self.baseline)
                if not isinstance(known, dict):
                    raise ValueError(f"it holds a {type(known).__name__}, not names with their ratios")
                for name, entry in known.items():
                    _check(name, entry)
                return known
        except KVBenchError as error:
            pytest.fail(str(error), pytrace=False)

    def _write(self, text: str) -> None:
        try:
            self.baseline.write_text(text, "utf-8")
        except OSError as error:
            pytest.fail(f"The baselines cannot be written to {self.baseline}: {error.strerror}.", pytrace=False)


def _check(name: str, entry: Any) -> None:
    """Raise ValueError for a baseline that holds no ratio."""
    ratio = entry.get("ratio") if isinstance(entry, dict) else None
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or ratio <= 0:
        raise ValueError(f"{name} has no ratio above 0")
    if not isinstance(entry.get("processor", ""), str):
        raise ValueError(f"{name} has a processor that is no text")


@pytest.fixture
def ratio_gate(request: pytest.FixtureRequest) -> RatioGate:
    """Measure ratios side by side and hold them to the committed baseline."""
    root = request.config.inipath.parent if request.config.inipath else request.config.rootpath
    return RatioGate(
        benchmark=request.getfixturevalue("benchmark"),
        baseline=root / str(request.config.getini("kvbench_baseline")),
        update=bool(request.config.getoption("--kvbench-update-baseline")),
    )
