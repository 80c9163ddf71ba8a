"""Which policy: the report's tables of the smallest budget of each policy near exact attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvbench.compare.candidates import Candidate, Limits, Scope
from kvbench.compare.comparison import Side, cell_key, side_key
from kvbench.compare.recommend import decide
from kvbench.compare.wording import bytes_text, count, points, seconds_text
from kvbench.contract.errors import KVBenchError
from kvbench.report.collect import Collection

HEADINGS = ("Policy", "Budget", "Limit", "Difference, points", "Bytes", "On device", "TPOT", "TTFT")
VERDICTS = {"within": "within", "beyond": "beyond", "unknown": "cannot tell"}
DEFAULT = Limits(1.0, None)


@dataclass
class Decision:
    """A table and sentences for each scope; `limit` says what was asked for, `left_out` what is not judged."""

    limit: str
    scopes: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def decision(found: Collection, limits: Limits | None = None) -> Decision:
    """Decide over the finished runs: over all tasks of a length together, where there are several, and over each."""
    asked = limits or DEFAULT
    result = Decision(" and ".join(part for part in (asked.text, asked.size_text) if part))
    sides = _sides(found)
    by_task: dict[tuple[str, int, str], list[Side]] = {}
    for side in sides:
        config = side.config
        by_task.setdefault((config["model"], config["context_length"], config["task"]), []).append(side)
    scopes: list[Scope] = []
    parts = [sides, *by_task.values()] if len(by_task) > 1 else [sides]
    for part in parts:
        try:
            made = decide(part, asked)
        except KVBenchError:
            continue
        known = {(scope.title, scope.tasks, scope.kl_tasks) for scope in scopes}
        scopes += [scope for scope in made.scopes if (scope.title, scope.tasks, scope.kl_tasks) not in known]
        result.left_out += [note for note in made.left_out if note not in result.left_out]
    scopes.sort(key=lambda scope: (scope.title, -len(scope.tasks), scope.tasks))
    result.scopes = [_scope(scope) for scope in scopes]
    return result


def _sides(found: Collection) -> list[Side]:
    sides: dict[str, Side] = {}
    for run in found.runs:
        if not run.partial:
            document = {"config": run.config, "metrics": run.metrics, "environment": run.environment}
            key = cell_key(run.config) + side_key(run.config)
            try:
                sides.setdefault(key, Side(run.config)).add(run.path, document, run.rows)
            except KVBenchError as error:
                if str(error) not in found.problems:
                    found.problems.append(str(error))
    return list(sides.values())


def _scope(scope: Scope) -> dict[str, Any]:
    tasks = [*scope.tasks, *scope.kl_tasks]
    over = f"mean over {count(len(tasks), 'task')}: {', '.join(tasks)}" if len(tasks) > 1 else tasks[0]
    exact = [] if scope.accuracy is None else [f"{100 * scope.accuracy:.1f}%"]
    exact += [bytes_text(sum(scope.bytes.values())), f"TPOT {seconds_text(scope.tpot_s)}"]
    return {
        "title": f"{over}, {scope.context_length} tokens",
        "detail": f"{scope.title}. Exact attention: {', '.join(exact)}.",
        "rows": [_cells(one) for one in scope.choices],
        "sentences": list(scope.sentences),
    }


def _cells(one: Candidate) -> list[tuple[str, str]]:
    """Texts and second lines, in the order of HEADINGS."""
    found = one.difference
    verdict = VERDICTS[one.verdict] + ("" if one.fits else ", too large")
    needed = f"{one.examples_needed} examples would" if one.verdict == "unknown" and one.examples_needed else ""
    if found is not None:
        middle = (points(found.difference), f"{points(found.ci95[0])} to {points(found.ci95[1])}, n = {found.n}")
    else:
        low, high = one.kl_ci95 or (0.0, 0.0)
        middle = (f"{one.kl or 0:.3g} nats", f"{low:.2g} to {high:.2g}, n = {one.examples}")
    return [
        (one.policy, "over budget" if one.over_budget else ""), (one.budget or "none", ""), (verdict, needed), middle,
        (bytes_text(one.total_bytes), ""), (bytes_text(one.bytes["resident"]), ""), (seconds_text(one.tpot_s), ""),
        (seconds_text(one.ttft_s), ""),
    ]  # fmt: skip
