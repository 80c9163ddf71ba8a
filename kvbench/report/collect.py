"""Finds runs and analyses in folders, and pairs each run with exact attention on the same examples."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from kvbench.compare.comparison import SAME, same_task
from kvbench.compare.wording import budget_text
from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import parse_json, plain, read_bytes, reading
from kvbench.runs.results import finished_rows, over_budget_text, read, summarise
from kvbench.runs.stored import Number
from kvbench.runs.traces import Trace, read_trace
from kvbench.statistics import PairedDifference, holm, paired_difference

BASELINE = "full"
Cell = str | int | float | bool | list[Any] | None
"""A value in a row of an analysis."""
SAME_EXAMPLES = (*SAME, "dtype", "seed")
"""What a run and its baseline have in common, beside the examples' ids."""


Setting = tuple[str, str, int, str]
"""Model, task, context length and question mode: what runs shown beside each other have in common."""


@dataclass(eq=False)
class ReportRun:
    """One run folder: what `run.json` says, its finished `rows`, and its metrics, computed for a partial run too."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    status: str
    rows: list[dict[str, Any]]
    metrics: dict[str, Any]
    baseline: ReportRun | None = None
    paired: PairedDifference | None = None
    p_adjusted: float | None = None

    @property
    def policy(self) -> str:
        """Name of the policy."""
        return str(self.config["policy"])

    @property
    def partial(self) -> bool:
        """Whether examples are missing."""
        return self.status != "complete"

    @property
    def over_budget(self) -> str:
        """How it went over its budget, in words; empty where it did not."""
        return over_budget_text(self.metrics)

    @property
    def marks(self) -> list[str]:
        """What a reader must know beside the run's name."""
        return [*(["partial"] if self.partial else []), *(["over budget"] if self.over_budget else [])]

    @property
    def accuracy(self) -> float:
        """Mean score of the finished examples."""
        return float(self.metrics["accuracy"]["mean"])

    @property
    def total_bytes(self) -> float:
        """Bytes of all tiers and the index together, as realised, averaged over the examples."""
        return float(sum(self.metrics["bytes"].values()))

    @property
    def setting(self) -> Setting:
        """What must be the same for two policies to be shown beside each other."""
        config = self.config
        return config["model"], config["task"], config["context_length"], config["question"]

    @cached_property
    def traces(self) -> list[Trace]:
        """The per-step traces of the probed examples."""
        return [read_trace(self.path / row["trace"]) for row in self.rows if row.get("trace")]

    def probed(self, name: str) -> list[float]:
        """The values that probes gave for `name`, one for each probed example that has one."""
        return [row["probes"][name] for row in self.rows if (row.get("probes") or {}).get(name) is not None]


@dataclass
class AnalysisResult:
    """The output of `kvbench analyze`: its rows, the few that sum them up, options, and where they came from."""

    path: Path
    name: str
    source: dict[str, Any]
    rows: list[dict[str, Any]]
    options: dict[str, Any]
    summary: list[dict[str, Any]]
    partial: list[str]

    @property
    def title(self) -> str:
        """What was analysed."""
        return str(self.source.get("title", self.path.name))


@dataclass
class Collection:
    """All that the folders hold, and what could not be shown (`problems`, a sentence each)."""

    runs: list[ReportRun] = field(default_factory=list)
    analyses: list[AnalysisResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def settings(self, runs: Iterable[ReportRun] | None = None) -> dict[Setting, list[ReportRun]]:
        """Runs by setting, in the order of model, task, context length and question."""
        found: dict[Setting, list[ReportRun]] = {}
        for run in self.runs if runs is None else runs:
            found.setdefault(run.setting, []).append(run)
        return dict(sorted(found.items()))


def _is_folder(path: Path) -> bool:
    with reading(lambda reason: f"{path} cannot be searched for runs ({reason})."):
        return path.is_dir()


def collect(folders: Sequence[Path]) -> Collection:
    """Read every run and analysis at or below the folders.

    A run that cannot be read becomes a problem, and the others are shown. Raises KVBenchError for a folder that does
    not exist, and where nothing is left to show.
    """
    found = Collection()
    seen: set[str] = set()
    for folder in folders:
        if not _is_folder(folder):
            raise KVBenchError(f"{folder} is no folder: give folders that `kvbench run` or `kvbench analyze` wrote.")
        for file in _candidates(folder):
            place = os.path.realpath(file)  # Path.resolve raises on a loop of links
            if place in seen:
                continue
            seen.add(place)
            if file.name == "run.json":
                _add_run(found, file.parent)
            else:
                _add_analysis(found, file)
    if not found.runs and not found.analyses:
        where = ", ".join(map(str, folders))
        if found.problems:
            raise KVBenchError(f"Nothing in {where} can be shown: {' '.join(found.problems)}")
        raise KVBenchError(
            f"There is no run in {where}: a run is a folder with run.json; `kvbench run --output DIR` makes them."
        )
    found.runs.sort(key=_order)
    _pair(found.runs)
    return found


def _candidates(folder: Path) -> Iterator[Path]:
    """Files `run.json`, and other `.json` files outside of runs, in sorted order; hidden folders are left out.

    Of a folder that cannot be listed, `run.json` is given: reading it says why.
    """
    closed: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=lambda error: closed.append(Path(error.filename))):
        if "run.json" in (*folders, *files):
            folders.clear()
            yield Path(parent) / "run.json"
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent) / name for name in sorted(files) if name.endswith(".json"))
    yield from (parent / "run.json" for parent in closed)


def _add_run(found: Collection, path: Path) -> None:
    try:
        content = read(path)
        rows = finished_rows(path)
        if not rows:
            raise KVBenchError(
                f"{path} has no finished example ({content['status']}): continue it with the same command."
            )
        with reading(
            lambda reason: (
                f"{path / 'examples.jsonl'} lacks what a run's examples hold ({reason}): the command that "
                "made the run repairs it."
            )
        ):
            run = ReportRun(path, content["config"], content["environment"], content["status"], rows, summarise(rows))
            _ = run.traces, run.total_bytes
    except KVBenchError as error:
        found.problems.append(str(error))
    else:
        found.runs.append(run)


def _add_analysis(found: Collection, file: Path) -> None:
    """Add a file that `kvbench analyze` wrote; any other JSON file is none of ours."""
    try:
        content = parse_json(read_bytes(file), ours=False)
    except (OSError, ValueError):
        return
    if not isinstance(content, dict) or content.get("analysis") != file.stem or not content.get("rows"):
        return
    if content.get("schema") != 1:
        told = plain(repr(content.get("schema")))
        found.problems.append(f"{file} has schema version {told}; this kvbench reads version 1.")
        return
    try:
        with reading(lambda reason: f"{file} is no analysis that can be read ({reason}): run `kvbench analyze` again."):
            stored = _StoredAnalysis.model_validate(content)
            if file.stem == "ood":
                for row in stored.rows:
                    if not row.get("missing"):
                        _OodRow.model_validate(row)
            if (picture := file.with_suffix(".png")).is_file():
                _check_picture(picture)
    except KVBenchError as error:
        found.problems.append(str(error))
        return
    found.analyses.append(
        AnalysisResult(
            file.parent,
            file.stem,
            stored.source or {},
            stored.rows,
            stored.options or {},
            stored.summary or [],
            stored.partial or [],
        )
    )


def _check_picture(file: Path) -> None:
    """Raise for a PNG that cannot be drawn."""
    from PIL import Image  # noqa: PLC0415 - matplotlib's, and slow to import

    with Image.open(file, formats=("PNG",)) as picture:
        picture.load()


class _OodRow(BaseModel):
    """What the figure of Mahalanobis distances draws of a head."""

    layer: Annotated[int, Field(strict=True)]
    dimension: Annotated[int, Field(strict=True, ge=1)]
    keys_median: Number
    queries_median: Number
    decode_to_keys_median: Number


class _StoredAnalysis(BaseModel):
    """What `kvbench analyze` writes, as far as reports rely on it."""

    source: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    rows: list[dict[str, Cell]]
    summary: list[dict[str, Cell]] | None = None
    partial: list[str] | None = None


def _order(run: ReportRun) -> tuple[Any, ...]:
    budget = run.config["budget"] or {}
    return (
        *run.setting, run.policy == BASELINE, run.policy, budget.get("allocator", ""),
        json.dumps(run.config["policy_options"], sort_keys=True), budget.get("ratio") or 0, budget.get("tokens") or 0,
        run.config["seed"], str(run.path),
    )  # fmt: skip


def _pair(runs: Sequence[ReportRun]) -> None:
    """Give each run its baseline and the paired difference, p-values adjusted over all of them (Holm)."""
    for run in runs:
        if run.policy == BASELINE:
            continue
        mine = {row["id"] for row in run.rows}
        partners = [
            (len(mine & {row["id"] for row in other.rows}), other.path.parent == run.path.parent, other)
            for other in runs
            if other.policy == BASELINE
            and all(other.config[key] == run.config[key] for key in SAME_EXAMPLES)
            and same_task(other.config, run.config)
        ]
        common, _, best = max(partners, key=lambda partner: partner[:2], default=(0, False, None))
        if best is None or not common:
            continue
        run.baseline, seed = best, run.config["seed"]
        scores = ({seed: {row["id"]: float(row["score"]) for row in one.rows}} for one in (best, run))
        run.paired = paired_difference(*scores)
    compared = [run for run in runs if run.paired is not None]
    for run, p in zip(compared, holm([run.paired.p_value for run in compared if run.paired]), strict=True):
        run.p_adjusted = p


def labels(runs: Sequence[ReportRun], apart: Sequence[str] = ()) -> dict[int, str]:
    """The shortest names (by `id(run)`) that tell the runs apart: policy, budget, and what differs within a policy.

    Keys in `apart` are shown elsewhere and left out.
    """
    facts = {id(run): _facts(run, apart) for run in runs}
    names = {}
    for run in runs:
        peers = [facts[id(other)] for other in runs if other.policy == run.policy]
        mine = facts[id(run)]
        differing = [key for key in mine if any(peer.get(key) != mine[key] for peer in peers)]
        parts = [mine[key] if key == "budget" else f"{key.split('.')[-1]} {mine[key]}" for key in differing]
        name = ", ".join([run.policy, *parts])
        names[id(run)] = f"{name}{''.join(f' ({mark})' for mark in run.marks)}"
    return names


def _facts(run: ReportRun, apart: Sequence[str]) -> dict[str, str]:
    config = run.config
    found = {} if "budget" in apart else {"budget": budget_text(config["budget"])}
    for key in ("policy_options", "task_options"):
        found |= {f"{key}.{name}": str(value) for name, value in config[key].items()}
    code = config["plugins"].get("policy")
    if code is not None:
        found["policy source"] = f"{code['version'] or ''} {code['source'] or 'unreadable'}".strip()
    for key, value in config.items():
        if key not in (
            "plugins",
            "budget", "policy_options", "task_options", "task_data", "model_fingerprint", "probes", "probe_examples",
            "policy", *apart,
        ):  # fmt: skip
            found[key.replace("_", " ")] = str(value)
    return found
