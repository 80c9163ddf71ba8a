"""The same cells of two commits compared on the same examples: what changed beyond noise."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.compare.comparison import describe
from kvbench.contract.errors import KVBenchError
from kvbench.runs.complete import CompleteRun, complete_runs
from kvbench.statistics import holm, mean_interval, paired_difference

LEVEL = 0.05
TIMED = {"ttft_s": "TTFT", "step_s": "TPOT", "bytes": "bytes"}
LEAST = 0.05
"""A time or a size that changed by less is never told, however sure it is."""


@dataclass(frozen=True)
class Change:
    """A figure of one cell in two commits: `before`, `after`, the interval of the change, and whether it is noise.

    The change of `accuracy` is a difference with McNemar's or a permutation test, corrected for all cells by Holm's
    method; that of times and bytes is a ratio less 1, by the mean logarithm over the examples of both.
    """

    cell: str
    figure: str
    before: float
    after: float
    change: float
    ci95: tuple[float, float]
    n: int
    beyond_noise: bool
    note: str = ""

    def document(self) -> dict[str, Any]:
        """As an element of a `--json` document."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class History:
    """All changes of the cells that both folders hold, and what was left out, in sentences."""

    before: list[str]
    after: list[str]
    changes: list[Change]
    skipped: list[str]


def history(before: Path, after: Path) -> History:
    """Compare the cells that two folders share; raises KVBenchError where they share none.

    A cell is a configuration without the code of its plugins, which is what differs between commits.
    """
    skipped: list[str] = []
    sides = [_cells(root, skipped) for root in (before, after)]
    shared = [key for key in sides[0] if key in sides[1]]
    for mine, theirs, root in ((0, 1, before), (1, 0, after)):
        alone = sorted(sides[mine][key].folder.name for key in sides[mine] if key not in sides[theirs])
        if alone:
            skipped.append(f"{len(alone)} runs are in {root} alone, such as {alone[0]}.")
    if not shared:
        raise KVBenchError(
            f"{before} and {after} have no cell in common: give two folders with runs of the same policies, budgets, "
            f"tasks, lengths and models. {' '.join(skipped)}"
        )
    changes: list[Change] = []
    scored: list[float] = []
    for key in shared:
        runs = sides[0][key], sides[1][key]
        cell = _name(runs[0].document["config"])
        before_rows, after_rows = ({row["id"]: row for row in run.rows} for run in runs)
        scores = [{0: {name: row["score"] for name, row in side.items()}} for side in (before_rows, after_rows)]
        found = paired_difference(scores[0], scores[1])
        scored.append(found.p_value)
        changes.append(
            Change(cell, "accuracy", found.mean_a, found.mean_b, found.difference, found.ci95, found.n, False)
        )
        devices = [run.document["environment"].get("device_name") for run in runs]
        other = "" if devices[0] == devices[1] else f"measured on {devices[0]} and {devices[1]}"
        for figure in TIMED:
            change = _ratio(cell, figure, before_rows, after_rows, other)
            changes += [] if change is None else [change]
    corrected = iter(holm(scored))
    changes = [
        dataclasses.replace(change, beyond_noise=next(corrected) < LEVEL) if change.figure == "accuracy" else change
        for change in changes
    ]
    return History(_commits(sides[0].values()), _commits(sides[1].values()), changes, skipped)


def _cells(root: Path, skipped: list[str]) -> dict[str, CompleteRun]:
    found: dict[str, CompleteRun] = {}
    for run in complete_runs([root], skipped):
        config = run.document["config"]
        key = json.dumps({name: value for name, value in config.items() if name != "plugins"}, sort_keys=True)
        if key in found:
            raise KVBenchError(
                f"{root} holds two runs of one cell, {found[key].folder.name} and {run.folder.name}, of two versions "
                "of the code: give a folder of one commit's runs."
            )
        found[key] = run
    return found


def _ratio(cell: str, figure: str, old: dict[str, Any], new: dict[str, Any], other: str) -> Change | None:
    pairs = [
        (old[i][figure], new[i][figure]) for i in old if i in new and old[i].get(figure) and new[i].get(figure)
    ]  # fmt: skip
    if len(pairs) < 2:
        return None
    logs = [math.log(after / before) for before, after in pairs]
    low, high = mean_interval(logs)
    mean = sum(logs) / len(logs)
    sure = (low > 0 or high < 0) and abs(math.expm1(mean)) >= LEAST and not other
    before, after = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
    return Change(
        cell, TIMED[figure], before, after, math.expm1(mean), (math.expm1(low), math.expm1(high)), len(pairs), sure,
        other,
    )  # fmt: skip


def _name(config: dict[str, Any]) -> str:
    model = Path(config["model"]).name
    return (
        f"{describe(config)} on {model}, {config['task']}, {config['context_length']} tokens, {config['question']}, "
        f"seed {config['seed']}"
    )


def _commits(runs: Iterable[CompleteRun]) -> list[str]:
    names = set()
    for run in runs:
        known = run.document["environment"].get("commit") or {}
        names.add(str(known.get("id", "unknown"))[:10] + ("+" if known.get("modified") else ""))
    return sorted(names)
