"""Which policy, at which budget: the smallest budget of each policy that stays near exact attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from kvbench.compare.candidates import (
    Candidate,
    Limits,
    Recommendation,
    Scope,
    candidate,
    distance,
    metric,
    tier_bytes,
)
from kvbench.compare.comparison import Side, cell_key, describe, side_key, sides
from kvbench.compare.verdicts import sentences
from kvbench.contract.errors import KVBenchError

BASELINE = "full"
SCOPE = ("model", "model_fingerprint", "context_length", "question", "device", "dtype", "batch_size")
"""Fields of a configuration that agree within one decision: bytes and times are compared, too."""


def recommend(
    folders: Path | str | Sequence[Path | str], *, max_drop: float | None = None, max_kl: float | None = None,
    bytes: int | None = None, device_bytes: int | None = None,
    context_length: int | None = None, task: Sequence[str] = (),
) -> Recommendation:  # fmt: skip
    """Find the smallest budget of each policy that stays near exact attention, from runs at or below the folders.

    `max_drop`: points of accuracy (1.0 where neither it nor `max_kl` is given), on the mean over the tasks; `max_kl`:
    nats per token, of tasks that measure the divergence. `bytes` bounds all tiers and the index together,
    `device_bytes` what is resident. Differences are paired with runs of `full` on the same examples. A budget counts as
    within a limit where its 95% interval is, and where there are enough examples to rule out as many unseen losses.
    Raises KVBenchError where no run can be read, or none fits what is asked for.
    """
    given = [folders] if isinstance(folders, str | Path) else folders
    skipped: list[str] = []
    found = list(sides([Path(one) for one in given], skipped, skip_unfinished=True).values())
    lengths = sorted({side.config["context_length"] for side in found})
    tasks = sorted({side.config["task"] for side in found})
    if context_length is not None:
        found = [side for side in found if side.config["context_length"] == context_length]
        if not found:
            raise KVBenchError(
                f"No finished run here has a context length of {context_length}; there are {_and(lengths)}. Lengths "
                "are never extrapolated: run it, or choose one of these."
            )
    if task:
        found = [side for side in found if side.config["task"] in task]
        if not found:
            raise KVBenchError(f"No finished run here has the task {_and(task)}; there are {_and(tasks)}.")
    drop = 1.0 if max_drop is None and max_kl is None else max_drop
    return decide(found, Limits(drop, max_kl, bytes, device_bytes), skipped)


def decide(found: Iterable[Side], limits: Limits, left_out: Sequence[str] = ()) -> Recommendation:
    """Decide over runs that were read; see `recommend`."""
    groups: dict[tuple[Any, ...], list[Side]] = {}
    for side in found:
        key = (*(side.config[name] for name in SCOPE), side.device)
        groups.setdefault(key, []).append(side)
    notes, scopes = list(left_out), []
    for key, group in sorted(groups.items(), key=lambda one: repr(one[0])):
        scope = _scope(key, group, limits, notes)
        if scope is not None:
            scopes.append(scope)
    if not scopes:
        raise KVBenchError(f"Nothing can be recommended. {' '.join(dict.fromkeys(notes)) or 'No run is finished.'}")
    return Recommendation(
        limits.drop, limits.kl, limits.bytes, limits.device_bytes, tuple(scopes), tuple(dict.fromkeys(notes))
    )


def _scope(key: tuple[Any, ...], group: Sequence[Side], limits: Limits, notes: list[str]) -> Scope | None:
    model, _, length, question, _, dtype, batch, device = key
    title = f"{model}, {length} tokens, question {question}, {dtype}, batch {batch} on {device or 'an unknown device'}"
    cells: dict[str, Side] = {}
    for side in group:
        if side.config["policy"] == BASELINE:
            cells[cell_key(side.config)] = side
    wanted = {place: side for place, side in cells.items() if bool(side.kl) == (limits.drop is None)}
    if limits.drop is not None and limits.kl is not None:
        wanted = cells
    if not wanted:
        what = "whose answers are scored" if limits.kl is None else "that measures the divergence, such as fidelity"
        notes.append(f"{title}: no finished run of {BASELINE} of a task {what}, which others are compared with.")
        return None
    lines: dict[str, dict[str, Side]] = {}
    for side in group:
        if side.config["policy"] != BASELINE and cell_key(side.config) in cells:
            lines.setdefault(side_key(side.config), {})[cell_key(side.config)] = side
    candidates: list[Candidate] = []
    for line in lines.values():
        missing = [cells[place].config["task"] for place in wanted if place not in line]
        some = next(iter(line.values())).config
        if missing:
            notes.append(f"{title}: {describe(some)} was not run on {_and(missing)} and was left out.")
            continue
        try:
            candidates.append(candidate([(cells[place], line[place]) for place in wanted], limits))
        except KVBenchError as error:
            notes.append(f"{title}: {describe(some)} was left out. {error}")
    if not candidates:
        notes.append(f"{title}: nothing to choose from beside {BASELINE}.")
        return None
    exact = [side for side in wanted.values() if not side.kl]
    whole = list(wanted.values())
    candidates.sort(key=lambda one: (one.policy, one.budget_tokens or 0, one.total_bytes))
    candidates = [dataclasses.replace(one, dominated_by=_dominator(one, candidates)) for one in candidates]
    choices = _choices(candidates)
    accuracy = (
        fmean(fmean(s for run in side.scores.values() for s in run.values()) for side in exact) if exact else None
    )
    scope = Scope(
        title, model, length, _tasks(side for side in whole if not side.kl), _tasks(side for side in whole if side.kl),
        accuracy, tier_bytes(whole), metric(whole, "tpot_s", "p50"), metric(whole, "ttft_s", "total"),
        tuple(candidates), choices, (),
    )  # fmt: skip
    return dataclasses.replace(scope, sentences=tuple(sentences(scope, limits)))


def _dominator(one: Candidate, others: Sequence[Candidate]) -> str | None:
    def costs(of: Candidate) -> list[float]:
        found = [of.total_bytes, of.bytes["resident"]]
        found += [] if of.difference is None else [-of.difference.mean_b]
        found += [] if of.kl is None else [of.kl]
        return [*found, *([] if of.tpot_s is None else [of.tpot_s])]

    mine = costs(one)
    better = [
        (other.total_bytes, other.name) for other in others
        if other is not one and len(costs(other)) == len(mine) and costs(other) != mine
        and all(theirs <= ours for theirs, ours in zip(costs(other), mine, strict=True))
    ]  # fmt: skip
    return min(better)[1] if better else None


_RANKS: list[Callable[[Candidate], bool]] = [
    lambda one: one.fits and one.verdict == "within",
    lambda one: one.fits and one.observed_within,
    lambda one: one.verdict == "within",
    lambda one: one.observed_within,
]


def _choices(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    found: list[Candidate] = []
    for policy in dict.fromkeys(one.policy for one in candidates):
        mine = [one for one in candidates if one.policy == policy]
        ranked = next((chosen for rank in _RANKS if (chosen := [one for one in mine if rank(one)])), [])
        if ranked:
            found.append(min(ranked, key=lambda one: (one.budget_tokens or float("inf"), one.total_bytes)))
        else:
            found.append(min(mine, key=distance))

    def order(one: Candidate) -> tuple[Any, ...]:
        cost = one.total_bytes if one.observed_within else distance(one)
        return not one.fits, one.verdict != "within", not one.observed_within, cost

    return tuple(sorted(found, key=order))


def _and(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _tasks(found: Iterable[Side]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(side.config["task"] for side in found))
