"""Compares finished runs with a baseline on the same examples."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.compare.families import family_of, family_text
from kvbench.contract.errors import KVBenchError
from kvbench.identity import Identity
from kvbench.runs.complete import complete_runs
from kvbench.statistics import PairedDifference, averaged_difference, holm, paired_difference

SAME = ("model", "model_fingerprint", "task", "task_options", "task_data", "context_length", "question")
"""Fields of a configuration that must agree for scores to be comparable."""
POOLED = ("seed", "examples", "recall_k", "probe_examples", "probes")
"""Fields in which runs of one side may differ; every other field makes another side."""
TOLD = ("dense_layers",)
"""Fields beside the policy's options that make it another policy, named where they are set."""


@dataclass
class Side:
    """The runs of one configuration on one model, task and length, over all its seeds."""

    config: dict[str, Any]
    folders: list[str] = dataclasses.field(default_factory=list)
    scores: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    kl: list[float] = dataclasses.field(default_factory=list)
    """The divergence from exact attention, nats, of each example of a task that measures it."""
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Of each run."""
    device: str = ""
    over_budget: dict[str, float] | None = None

    def add(self, folder: Path, run: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Add a finished run; raises KVBenchError where an example has another score than in an earlier one."""
        self.over_budget = run["metrics"].get("over_budget") or self.over_budget
        self.metrics.append(run["metrics"])
        self.device = run["environment"].get("device_name") or self.device
        self.kl += [float(row["scores"]["kl"]) for row in rows if "kl" in (row.get("scores") or {})]
        known = self.scores.setdefault(run["config"]["seed"], {})
        for row in rows:
            if known.setdefault(row["id"], row["score"]) != row["score"]:
                raise KVBenchError(
                    f"{folder} scores example {row['id']} otherwise than {self.folders[0]}, which has the same "
                    "configuration: leave one of them out."
                )
        self.folders.append(str(folder))


@dataclass(frozen=True)
class Comparison:
    """One configuration beside the baseline on one model, task and length; `p_holm` corrects for the whole table."""

    model: str
    task: str
    context_length: int
    baseline: str
    candidate: str
    result: PairedDifference
    p_holm: float
    baseline_folders: tuple[str, ...]
    candidate_folders: tuple[str, ...]
    over_budget: dict[str, float] | None = None
    """Where the candidate attended to more than its budget: tokens asked for, allowed and attended to."""
    sides: tuple[Side, Side] | None = dataclasses.field(default=None, repr=False, compare=False)
    """The runs behind it, the baseline's first; None of an average."""

    def document(self) -> dict[str, Any]:
        """The comparison as an element of the `--json` document."""
        left_out = ("result", "sides")
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in left_out
        }
        return {**fields, **dataclasses.asdict(self.result)}


def compare(
    baseline: Path, others: Sequence[Path], *, skip_unfinished: bool = False
) -> tuple[list[Comparison], list[str]]:
    """Compare every configuration in `others` with the one in `baseline`, by model, task and length, seeds pooled.

    Each path is a run's folder or a folder of runs; runs of the baseline's configuration in `others` serve as baselines
    of their tasks and lengths. Also gives a sentence for each configuration that had no counterpart, for each run that
    cannot be read, and with `skip_unfinished` for each that is unfinished: these are left out. Raises KVBenchError
    where the baseline is not one configuration, where a run is unfinished, and where nothing can be compared.
    """
    skipped: list[str] = []
    asked = {side_key(side.config): side for side in sides([baseline], skipped, skip_unfinished).values()}
    if not asked:
        raise KVBenchError(f"The baseline {baseline} has no finished run that can be read: {' '.join(skipped)}")
    if len(asked) > 1:
        names = sorted(describe(side.config) for side in asked.values())
        raise KVBenchError(
            f"The baseline {baseline} holds runs of {len(names)} configurations ({'; '.join(names)}): give a folder "
            "with runs of one."
        )
    ((base_key, base),) = asked.items()
    skipped.clear()  # the baseline's are among all
    everything = sides([baseline, *others], skipped, skip_unfinished).values()
    by_cell = {cell_key(side.config): side for side in everything if side_key(side.config) == base_key}
    rest = [side for side in everything if side_key(side.config) != base_key]
    if not rest:
        left_out = f" {' '.join(skipped)}" if skipped else ""
        raise KVBenchError(f"There is nothing to compare: all runs are those of the baseline {baseline}.{left_out}")
    pairs, unread = [], len(skipped)
    for side in rest:
        counterpart = by_cell.get(cell_key(side.config))
        if counterpart is None:
            skipped.append(_why(base, side))
        else:
            pairs.append((counterpart, side, paired_difference(counterpart.scores, side.scores)))
    if not pairs:
        raise KVBenchError(f"{skipped[unread]} Run both on the same model, task, length and question mode.")
    named = _names([side.config for _, side, _ in pairs])
    corrected = holm([result.p_value for _, _, result in pairs])
    return [
        Comparison(
            side.config["model"], side.config["task"], side.config["context_length"], describe(counterpart.config),
            named[side_key(side.config)], result, p, tuple(counterpart.folders), tuple(side.folders), side.over_budget,
            (counterpart, side),
        )
        for (counterpart, side, result), p in zip(pairs, corrected, strict=True)
    ], skipped  # fmt: skip


def average_families(found: Sequence[Comparison]) -> tuple[list[Comparison], list[str]]:
    """The mean differences over families of tasks (RULER's thirteen) at each length, p-values adjusted among them.

    Also gives a sentence for each configuration that lacks some of the tasks that others have, and has no mean.
    """
    groups: dict[tuple[str, str, int, str], dict[str, dict[str, Comparison]]] = {}
    for entry in found:
        family = family_of(entry.task)
        if family is not None:
            place = (entry.model, family, entry.context_length, entry.baseline)
            groups.setdefault(place, {}).setdefault(entry.candidate, {})[entry.task] = entry
    made: list[Comparison] = []
    notes: list[str] = []
    for (model, family, length, baseline), candidates in groups.items():
        tasks = sorted({task for entries in candidates.values() for task in entries})
        if len(tasks) < 2:
            continue
        for candidate, entries in candidates.items():
            if len(entries) < len(tasks):
                lacks = ", ".join(task for task in tasks if task not in entries)
                notes.append(f"{candidate} has no mean over {family} at {length} tokens: it lacks {lacks}.")
                continue
            pairs = [entry.sides for entry in entries.values() if entry.sides is not None]
            result = averaged_difference([(one.scores, other.scores) for one, other in pairs])
            made.append(Comparison(
                model, family_text(family, len(tasks)), length, baseline, candidate, result, 1.0,
                tuple(folder for one, _ in pairs for folder in one.folders),
                tuple(folder for _, other in pairs for folder in other.folders),
            ))  # fmt: skip
    corrected = holm([entry.result.p_value for entry in made])
    return [dataclasses.replace(entry, p_holm=p) for entry, p in zip(made, corrected, strict=True)], notes


def describe(config: dict[str, Any]) -> str:
    """Name a configuration: its policy, its size and allocator, and its options that are not the default ones."""
    policy, *options = policy_text(config).split(" ")
    words = [policy]
    if config["budget"]:
        budget = config["budget"]
        size = next(f"{name} {budget[name]:g}" for name in budget if isinstance(budget[name], (int, float)))
        every = [f"every {budget['compress_every']}"] if budget.get("compress_every") else []
        given = [f"{key}={value}" for key, value in sorted(budget["options"].items())]
        words += [size, budget["allocator"], *every, *given]
    return " ".join([*words, *options])


def policy_text(config: dict[str, Any]) -> str:
    """Name a configuration without its budget: its policy, and its options that are not the default ones."""
    from kvbench.plugins import registry  # noqa: PLC0415  imports torch

    known = registry().classes["policy"].get(config["policy"])  # a plugin may have gone since
    defaults = known.Options().model_dump(mode="json") if known else {}
    options = [f"{key}={value}" for key, value in config["policy_options"].items() if defaults.get(key) != value]
    return " ".join([config["policy"], *options, *(f"{name}={config[name]}" for name in TOLD if config.get(name))])


def _names(configs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Names of configurations by their keys; those that differ in their plugins' code alone name it."""
    found = {side_key(config): (describe(config), config["plugins"].get("policy")) for config in configs}
    taken = Counter(name for name, _ in found.values())
    return {
        key: name if taken[name] == 1 or code is None else f"{name} ({Identity.model_validate(code)})"
        for key, (name, code) in found.items()
    }


def sides(paths: Sequence[Path], skipped: list[str], skip_unfinished: bool) -> dict[str, Side]:
    """The finished runs by cell and side; `skipped` tells of those that cannot be read, and of unfinished ones."""
    found: dict[str, Side] = {}
    for run in complete_runs(paths, skipped, skip_unfinished=skip_unfinished):
        config = run.document["config"]
        found.setdefault(cell_key(config) + side_key(config), Side(config)).add(run.folder, run.document, run.rows)
    return found


def cell_key(config: dict[str, Any]) -> str:
    """What two configurations whose scores can be compared have in common."""
    return json.dumps([*(config[name] for name in SAME), config["plugins"].get("task")], sort_keys=True)


def side_key(config: dict[str, Any]) -> str:
    """What all runs of one configuration have in common, whatever their task, length and seed."""
    plugins = {role: code for role, code in config["plugins"].items() if role in ("policy", "budget")}
    rest = {key: config[key] for key in config if key not in (*SAME, *POOLED, "plugins")}
    return json.dumps({**rest, "plugins": plugins}, sort_keys=True)


def same_task(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two configurations' examples were made and scored by the same code."""
    return bool(one["plugins"].get("task") == other["plugins"].get("task"))


def _why(base: Side, side: Side) -> str:
    def told(config: dict[str, Any], name: str) -> Any:
        if name != "code of the task":
            return config[name]
        code = config["plugins"].get("task")
        return "not recorded" if code is None else Identity.model_validate(code)

    name = next((name for name in SAME if base.config[name] != side.config[name]), "code of the task")
    return (
        f"{side.folders[0]} cannot be compared with {base.folders[0]}: their {name.replace('_', ' ')} differs "
        f"({told(side.config, name)} against {told(base.config, name)})."
    )
