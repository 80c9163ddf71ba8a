"""Averages over families of tasks: one score for each configuration and length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kvbench.compare.families import family_of, family_text

NEEDED = (
    "model", "task", "context_length", "question", "policy", "policy_options", "budget", "device", "dtype", "accuracy",
    "examples", "total_bytes", "tpot_p50_s",
)  # fmt: skip
"""Columns of the leaderboard that an average is made of."""


@dataclass(frozen=True)
class Average:
    """The mean score over a family's tasks of one configuration at one length; None where it lacks some of them."""

    title: str
    model: str
    family: str
    tasks: tuple[str, ...]
    context_length: int
    question: str
    policy: str
    policy_options: str
    budget: str
    score: float | None
    lacks: tuple[str, ...]
    examples: int
    total_bytes: float | None
    tpot_p50_s: float | None


def averages(rows: Sequence[dict[str, Any]]) -> list[Average]:
    """The averages of leaderboard rows (with NEEDED), best first within each family and length.

    A task counts once whatever its examples, its seeds pooled by their examples. A family with one task has no average.
    """
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]]] = {}
    for row in rows:
        family = family_of(row["task"])
        if family is None or row["accuracy"] is None:
            continue
        place = (row["model"], family, row["context_length"], row["question"])
        who = tuple(row[name] for name in ("policy", "policy_options", "budget", "device", "dtype"))
        groups.setdefault(place, {}).setdefault(who, {}).setdefault(row["task"], []).append(row)
    found = []
    for (model, family, length, question), sides in sorted(groups.items()):
        tasks = tuple(sorted({task for side in sides.values() for task in side}))
        if len(tasks) < 2:
            continue
        title = f"{model}, {family_text(family, len(tasks))}, {length} tokens, question {question}"
        mine = []
        for (policy, options, budget, *_), side in sides.items():
            lacks = tuple(task for task in tasks if task not in side)
            everything = [row for part in side.values() for row in part]
            mine.append(Average(
                title, model, family, tasks, length, question, policy, options, budget,
                None if lacks else fmean(_pooled(part) for part in side.values()), lacks,
                sum(row["examples"] for row in everything), _mean(everything, "total_bytes"),
                _mean(everything, "tpot_p50_s"),
            ))  # fmt: skip
        found += sorted(mine, key=lambda one: (one.score is None, -(one.score or 0), one.total_bytes or 0))
    return found


def policy_names(found: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Names of policies, given with their options as JSON: with those options in which runs of a policy here differ."""
    options: dict[str, list[dict[str, Any]]] = {}
    for policy, text in found:
        options.setdefault(policy, []).append(json.loads(text or "{}"))
    names = {}
    for policy, text in found:
        peers, mine = options[policy], json.loads(text or "{}")
        told = [f"{key}={mine[key]}" for key in mine if any(peer.get(key) != mine[key] for peer in peers)]
        names[policy, text] = " ".join([policy, *told])
    return names


def _pooled(rows: Sequence[dict[str, Any]]) -> float:
    return float(sum(row["accuracy"] * row["examples"] for row in rows) / max(sum(row["examples"] for row in rows), 1))


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    known = [row[name] for row in rows if row[name] is not None]
    return fmean(known) if len(known) == len(rows) else None
