"""Checks of what probes and tasks measured, when they give it: a bad value is told before more work is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvbench.contract.errors import KVBenchError
from kvbench.contract.probe import Probe, StepTrace
from kvbench.runs.rows import is_number, shown
from kvbench.runs.timing import STEP_METRICS

RESERVED = frozenset((
    "accuracy", "bytes", "answer_bytes", "ttft_s", "tpot_s", "peak_memory_bytes", "context_tokens", "generated_tokens",
    "probed_examples", "truncated_examples", "probe_overhead", "budget_tokens", "attended_bytes", "over_budget",
    "batch", "prefill_chunk", "out_of_memory", "device_bytes", "device_peak_bytes", *STEP_METRICS,
))  # fmt: skip
"""Metrics of every run, which no probe can give."""


def probed_values(probes: Sequence[Probe], reserved: Iterable[str] = ()) -> dict[str, float | None]:
    """What probes measured, by name: finite numbers, or None where one had nothing to measure.

    Raises KVBenchError, naming the probe, for anything else, for a name that two probes give, and for a `reserved` one.
    """
    given: dict[str, Probe | None] = dict.fromkeys((*RESERVED, *reserved))
    found: dict[str, float | None] = {}
    for probe in probes:
        with _of(probe, "result"):
            values = probe.result()
        if not isinstance(values, dict):
            raise _wrong(probe, "result", f"{shown(values)}", "a dictionary of names and numbers")
        for name, value in values.items():
            if not isinstance(name, str):
                raise _wrong(probe, "result", f"the name {shown(name)}", "names that are texts")
            if value is not None and not is_number(value):
                raise _wrong(probe, "result", f"{name} = {shown(value)}", "a finite int or float, or None")
            if name in given:
                other = given[name]
                whose = "a metric of every run" if other is None else f"what probe '{other.name}' measures"
                raise _wrong(probe, "result", f"the name {name}, {whose}", "a name of its own")
            given[name] = probe
            found[name] = value
    return found


def probed_trace(probes: Sequence[Probe]) -> StepTrace:
    """The steps that probes recorded, by quantity; raises KVBenchError, naming the probe, for what is no trace."""
    found: StepTrace = {}
    for probe in probes:
        with _of(probe, "trace"):
            trace = probe.trace()
        if not isinstance(trace, dict):
            raise _wrong(probe, "trace", f"{shown(trace)}", "a dictionary of quantities")
        for name, column in trace.items():
            fine = isinstance(name, str) and isinstance(column, dict)
            if not fine or not all(map(_is_step, column.items())):
                wrong = (
                    next((f"{key}: {value}" for key, value in column.items() if not _is_step((key, value))), "")
                    if fine
                    else shown(column)
                )
                raise _wrong(
                    probe,
                    "trace",
                    f"for {name} {wrong[:80]}",
                    "numbers for each head by (tokens of the context, layer)",
                )
            if column:
                found[name] = column
    return found


def _is_step(item: tuple[Any, Any]) -> bool:
    place, values = item
    return (
        isinstance(place, tuple) and len(place) == 2 and all(isinstance(number, int) for number in place)
        and isinstance(values, Sequence) and len(values) > 0
        and all(isinstance(value, int | float) for value in values)
    )  # fmt: skip


def checked_score(task: Any, example: str, value: Any, name: str = "") -> float:
    """A task's score of an example, which must be a finite number; raises KVBenchError that names the task."""
    if not is_number(value):
        which = f" for {name}" if name else ""
        raise KVBenchError(
            f"Task '{task.name}' ({type(task).__module__}) scored example {example} with {shown(value)}{which}; "
            "expected a finite number."
        )
    return value  # type: ignore[no-any-return]


def checked_measures(task: Any, example: str, values: Any) -> dict[str, float]:
    """What a task measured of an example besides; raises KVBenchError for a name it never gave, and for no number."""
    if not isinstance(values, dict):
        raise KVBenchError(
            f"Task '{task.name}' ({type(task).__module__}) measured example {example} with {shown(values)}; expected a "
            "dictionary of names and numbers."
        )
    for name in values:
        if name not in task.metrics or name in RESERVED:
            wanted = ", ".join(sorted(set(task.metrics) - RESERVED)) or "nothing, since it has no `metrics`"
            raise KVBenchError(
                f"Task '{task.name}' ({type(task).__module__}) measured {name!r} of example {example}; expected "
                f"{wanted}."
            )
    return {name: checked_score(task, example, value, name) for name, value in values.items()}


@contextmanager
def task_errors(task: Any, doing: str) -> Iterator[None]:
    """Report an error in a task's code with the task's name."""
    try:
        yield
    except (KVBenchError, MemoryError):
        raise
    except Exception as error:
        raise KVBenchError(
            f"Task '{task.name}' ({type(task).__module__}) failed in {doing}: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _of(probe: Probe, hook: str) -> Iterator[None]:
    try:
        yield
    except (KVBenchError, MemoryError):
        raise
    except Exception as error:
        raise KVBenchError(
            f"Probe '{probe.name}' ({type(probe).__module__}) failed in {hook}: {type(error).__name__}: {error}"
        ) from error


def _wrong(probe: Probe, hook: str, what: str, expected: str) -> KVBenchError:
    return KVBenchError(f"Probe '{probe.name}' ({type(probe).__module__}) gave {what} as {hook}; expected {expected}.")
