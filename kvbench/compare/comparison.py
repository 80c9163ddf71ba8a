"""Compares finished runs with a baseline on the same examples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.contract.errors import KVBenchError
from kvbench.runs.results import find_runs, read, read_rows
from kvbench.statistics import PairedDifference, holm, paired_difference

SAME = ("model", "model_fingerprint", "task", "task_options", "task_data", "context_length", "question")
"""Fields of a configuration that must agree for scores to be comparable."""
POOLED = ("seed", "examples", "recall_k", "probe_examples", "probes")
"""Fields in which runs of one side may differ; every other field makes another side."""


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

    def document(self) -> dict[str, Any]:
        """The comparison as an element of the `--json` document."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "result"}
        return {**fields, **dataclasses.asdict(self.result)}


@dataclass
class _Side:
    """The runs of one configuration on one model, task and length, over all its seeds."""

    config: dict[str, Any]
    folders: list[str] = dataclasses.field(default_factory=list)
    scores: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    def add(self, folder: Path) -> None:
        config = read(folder)["config"]
        known = self.scores.setdefault(config["seed"], {})
        for row in read_rows(folder):
            if known.setdefault(row["id"], row["score"]) != row["score"]:
                raise KVBenchError(
                    f"{folder} scores example {row['id']} otherwise than {self.folders[0]}, which has the same "
                    "configuration: leave one of them out."
                )
        self.folders.append(str(folder))


def compare(baseline: Path, others: Sequence[Path]) -> tuple[list[Comparison], list[str]]:
    """Compare every configuration in `others` with the one in `baseline`, by model, task and length, seeds pooled.

    Each path is a run's folder or a folder of runs; runs of the baseline's configuration in `others` serve as baselines
    of their tasks and lengths. Also gives a sentence for each configuration that had no
    counterpart. Raises KVBenchError where the baseline is not one configuration, where a run is unfinished, and where
    nothing can be compared.
    """
    asked = {_side_key(side.config): side for side in _sides([baseline]).values()}
    if len(asked) > 1:
        names = sorted(describe(side.config) for side in asked.values())
        raise KVBenchError(
            f"The baseline {baseline} holds runs of {len(names)} configurations ({'; '.join(names)}): give a folder "
            "with runs of one."
        )
    ((base_key, base),) = asked.items()
    everything = _sides([baseline, *others]).values()
    by_cell = {_cell_key(side.config): side for side in everything if _side_key(side.config) == base_key}
    rest = [side for side in everything if _side_key(side.config) != base_key]
    if not rest:
        raise KVBenchError(f"There is nothing to compare: all runs are those of the baseline {baseline}.")
    pairs, skipped = [], []
    for side in rest:
        counterpart = by_cell.get(_cell_key(side.config))
        if counterpart is None:
            skipped.append(_why(base, side))
        else:
            pairs.append((counterpart, side, paired_difference(counterpart.scores, side.scores)))
    if not pairs:
        raise KVBenchError(f"{skipped[0]} Run both on the same model, task, length and question mode.")
    corrected = holm([result.p_value for _, _, result in pairs])
    return [
        Comparison(
            side.config["model"], side.config["task"], side.config["context_length"], describe(counterpart.config),
            describe(side.config), result, p, tuple(counterpart.folders), tuple(side.folders),
        )
        for (counterpart, side, result), p in zip(pairs, corrected, strict=True)
    ], skipped  # fmt: skip


def describe(config: dict[str, Any]) -> str:
    """Name a configuration: its policy, its size and allocator, and its options that are not the default ones."""
    from kvbench.plugins import registry  # noqa: PLC0415  imports torch

    words = [config["policy"]]
    if config["budget"]:
        budget = config["budget"]
        size = next(f"{name} {budget[name]:g}" for name in budget if isinstance(budget[name], (int, float)))
        words += [size, budget["allocator"], *(f"{key}={value}" for key, value in sorted(budget["options"].items()))]
    known = registry().classes["policy"].get(config["policy"])  # a plugin may have gone since
    defaults = known.Options().model_dump(mode="json") if known else {}
    words += [f"{key}={value}" for key, value in config["policy_options"].items() if defaults.get(key) != value]
    return " ".join(words)


def _sides(paths: Sequence[Path]) -> dict[str, _Side]:
    found: dict[str, _Side] = {}
    for folder in sorted({folder.resolve(): folder for path in paths for folder in find_runs(path)}.values()):
        run = read(folder)
        if run["status"] != "complete":
            raise KVBenchError(
                f"{folder} is not finished (status {run['status']}, {len(read_rows(folder))} of "
                f"{run['config']['examples']} examples): run the same command again to complete it, or leave it out."
            )
        key = _cell_key(run["config"]) + _side_key(run["config"])
        found.setdefault(key, _Side(run["config"])).add(folder)
    return found


def _cell_key(config: dict[str, Any]) -> str:
    return json.dumps([config[name] for name in SAME], sort_keys=True)


def _side_key(config: dict[str, Any]) -> str:
    return json.dumps({key: config[key] for key in config if key not in (*SAME, *POOLED)}, sort_keys=True)


def _why(base: _Side, side: _Side) -> str:
    name = next(name for name in SAME if base.config[name] != side.config[name])
    return (
        f"{side.folders[0]} cannot be compared with {base.folders[0]}: their {name.replace('_', ' ')} differs "
        f"({side.config[name]} against {base.config[name]})."
    )
