"""The page of reference results, made of packed runs and published figures: nothing on it is written by hand."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import read_bytes, reading
from kvbench.runs.commit import standing
from kvbench.runs.packed import read_scores
from kvbench.runs.results import read, run_folders
from kvbench.statistics import PairedDifference, paired_difference

FAMILIES = {
    "single needles": ("niah_single",), "several needles": ("niah_multikey", "niah_multivalue", "niah_multiquery"),
    "key-value retrieval": ("infinitebench_kv_retrieval",), "tracing": ("vt",), "aggregation": ("cwe", "fwe"),
    "fidelity": ("fidelity",),
}  # fmt: skip
WEAK = 0.1
"""Exact attention below this solves a task too rarely for a policy to be judged by it."""
MADE = "<!-- made by kvbench results page -->"


class PackedRun:
    """A run with its scores."""

    def __init__(self, folder: Path, root: Path) -> None:
        found = read(folder)
        self.config, self.metrics, self.environment = found["config"], found["metrics"], found["environment"]
        self.rows = read_scores(folder)
        self.standing = standing(root, self.environment.get("commit"))
        self.scores = {row["id"]: float(row["score"]) for row in self.rows}
        budget = self.config["budget"] or {}
        self.policy, self.task = str(self.config["policy"]), str(self.config["task"])
        self.allocator = str(budget.get("allocator", ""))
        self.size = next((f"{budget[key]:g} {key}" for key in ("tokens", "ratio", "bytes") if budget.get(key)), "")
        if budget.get("compress_every"):
            self.size += f" every {budget['compress_every']}"

    @property
    def setting(self) -> tuple[Any, ...]:
        """What all policies of one table share."""
        config = self.config
        return (Path(config["model"]).name, config["rope_scaling"] or "", config["context_length"], config["question"],
                self.environment.get("device_name"))  # fmt: skip

    @property
    def cell(self) -> str:
        """The examples: runs of one cell are paired."""
        names = ("model_fingerprint", "task", "task_options", "context_length", "question", "seed")
        return json.dumps([self.config[name] for name in names], sort_keys=True)

    @property
    def held(self) -> float:
        """Bytes held in all tiers."""
        return float(sum(self.metrics["bytes"].get(tier) or 0 for tier in ("resident", "offloaded", "index")))

    @property
    def step_s(self) -> float | None:
        """Median seconds of a step, by the device's clock where it was."""
        own = (self.metrics.get("device_tpot_s") or {}).get("p50") or (self.metrics.get("tpot_s") or {}).get("p50")
        return None if own is None else float(own)


def page(results: Path, published: Path, root: Path) -> str:
    """The page in Markdown of all runs below `results`; `root` is the repository that their commits are held to.

    Raises KVBenchError for runs and figures that cannot be read.
    """
    with reading(lambda reason: f"{published} cannot be read ({reason}): give the file of published figures."):
        figures = yaml.safe_load(published.read_text("utf-8"))
        if not isinstance(figures, dict) or not isinstance(figures.get("claims"), list):
            raise ValueError("it has no list of claims")
    runs = packed_runs(results, root)
    lines = ["# Reference results", "", MADE, ""]
    lines += provenance(runs) + _note(results)
    settings: dict[tuple[Any, ...], list[PackedRun]] = defaultdict(list)
    for run in runs:
        settings[run.setting].append(run)
    for setting in sorted(settings, key=str):
        lines += _setting(setting, settings[setting])
    lines += _claims(runs, figures)
    lines += _tables(runs, figures)
    return "\n".join(lines).rstrip() + "\n"


def _note(results: Path) -> list[str]:
    """What whoever committed the results says of them, from the folder's `NOTE.md`."""
    file = results / "NOTE.md"
    if not file.is_file():
        return []
    with reading(lambda reason: f"{file} cannot be read ({reason}): it is a note in Markdown beside the runs."):
        return [read_bytes(file).decode("utf-8").strip(), ""]


def packed_runs(results: Path, root: Path) -> list[PackedRun]:
    """All runs below `results`, none where there are none; KVBenchError for one that cannot be read."""
    return [PackedRun(folder, root) for folder in run_folders(results)]


def provenance(runs: Sequence[PackedRun]) -> list[str]:
    """How many runs, examples and devices, and which runs are not of the committed code."""
    if not runs:
        return ["No results are committed yet: `kvbench sweep` with the files in `results/` makes them.", ""]
    marks = sorted({run.standing for run in runs if run.standing})
    counts = sorted({len(run.rows) for run in runs})
    devices = sorted({str(run.environment.get("device_name")) for run in runs})
    lines = [
        f"{len(runs)} runs of {_span(counts)} examples on {', '.join(devices)}. Accuracy in percent with its 95% "
        "interval. A task that exact attention solves in less than 10% of its examples is in brackets: no policy can "
        "be judged by it.", "",
    ]  # fmt: skip
    if marks:
        lines += ["† not of the committed code: " + "; ".join(f"some are {mark}" for mark in marks) + ".", ""]
    if any("cuda" not in str(run.config["device"]) for run in runs):
        lines += ["Times of runs on a processor say nothing about a GPU.", ""]
    return lines


def _setting(setting: tuple[Any, ...], runs: Sequence[PackedRun]) -> list[str]:
    model, scaling, length, question, device = setting
    stretched = f", {scaling}" if scaling else ""
    lines = [f"## {model}{stretched}, {length} tokens, question {question} ({device})", ""]
    exact = {run.task: run for run in runs if run.policy == "full"}
    tasks = sorted({run.task for run in runs})
    weak = {task for task in tasks if task in exact and _accuracy(exact[task]) < WEAK}
    rows: dict[tuple[str, str, str], dict[str, PackedRun]] = defaultdict(dict)
    for run in runs:
        rows[run.policy, run.size, run.allocator][run.task] = run
    head = ["policy", "budget", *(f"[{task}]" if task in weak else task for task in tasks), "mean"]
    judged = [task for task in tasks if task not in weak]

    def mean(found: Mapping[str, PackedRun], names: Sequence[str]) -> float | None:
        known = [_accuracy(found[task]) for task in names if task in found]
        return sum(known) / len(known) if len(known) == len(names) and known else None

    order = sorted(rows, key=lambda key: (-(mean(rows[key], judged) or -1.0), key))
    lines += markdown_table(head, [
        [_named(key, rows[key]), _budget(key), *(_cell(rows[key].get(task)) for task in tasks),
         percent(mean(rows[key], judged))]
        for key in order
    ])  # fmt: skip
    lines += ["### Accuracy against bytes and latency", ""]
    lines += markdown_table(
        ["policy", "budget", "mean", "bytes held, MiB", "TTFT, s", "TPOT p50, ms", "steps"],
        [[_named(key, rows[key]), _budget(key), percent(mean(rows[key], judged)),
          *_costs(list(rows[key].values()))] for key in order],
    )  # fmt: skip
    families = {name: [task for task in judged if task.startswith(starts)] for name, starts in FAMILIES.items()}
    lines += ["### Ranking by family of tasks", ""]
    lines += markdown_table(
        ["family", "tasks", "exact", "best first"],
        [[name, ", ".join(names), percent(mean(exact, names)), _ranking(rows, names, mean)]
         for name, names in families.items() if names],
    )  # fmt: skip
    return lines


def _ranking(
    rows: Mapping[tuple[str, str, str], Mapping[str, PackedRun]], tasks: Sequence[str],
    mean: Callable[[Mapping[str, PackedRun], Sequence[str]], float | None],
) -> str:  # fmt: skip
    found = [(value, key) for key in rows if key[0] != "full" and (value := mean(rows[key], tasks)) is not None]
    found.sort(key=lambda pair: (-pair[0], pair[1]))
    return ", ".join(f"{' '.join(filter(None, key))} {percent(value)}" for value, key in found[:8])


def _claims(runs: Sequence[PackedRun], figures: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Published claims",
        "",
        "Figures in a claim are the source's. A claim without one says in our own words what its method is for; it is "
        "no quotation.",
        "",
    ]
    rows = []
    for claim in figures["claims"]:
        for setting, verdict, ours in _verdicts(runs, claim) or [("", "not measured", "")]:
            rows.append([str(claim["text"]), str(figures["sources"][claim["source"]]), setting, ours, verdict])
    lines += markdown_table(["claim", "source", "our setting", "ours, difference", "verdict"], rows)
    return lines


def _verdicts(runs: Sequence[PackedRun], claim: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    question, found = claim.get("question", "aware"), []
    for run in runs:
        if (run.policy, run.task, run.config["question"]) != (claim["policy"], claim["task"], question):
            continue
        if run.allocator not in ("", claim.get("allocator", "uniform")):
            continue
        for other in runs:
            alike = other.cell == run.cell and other.size in ("", run.size)
            allocated = other.allocator in ("", claim.get("than_allocator", "uniform"))
            if other is run or other.policy != claim["than"] or not (alike and allocated):
                continue
            result = paired_difference({0: other.scores}, {0: run.scores})
            low, high = result.ci95
            ours = f"{100 * result.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}), n {result.n}"
            setting = f"{Path(run.config['model']).name}, {run.config['context_length']} tokens, {run.size}"
            mark = " †" if run.standing or other.standing else ""
            found.append((setting + mark, _verdict(claim, result, other), ours))
    return found


def _verdict(claim: Mapping[str, Any], result: PairedDifference, other: PackedRun) -> str:
    low, high = result.ci95
    if other.policy == "full" and result.mean_a < WEAK:
        return "cannot be judged: exact attention fails, too"
    match claim["holds"]:
        case "higher":
            return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        case "lower":
            return "holds" if high < 0 else "does not hold" if low > 0 else "undecided"
        case "near":
            near = float(claim["within"])
            return "holds" if low >= -near and high <= near else (
                "does not hold" if high < -near or low > near else "undecided"
            )  # fmt: skip
    raise KVBenchError(f"The claim '{claim['text']}' holds '{claim['holds']}': expected higher, lower or near.")


def _tables(runs: Sequence[PackedRun], figures: Mapping[str, Any]) -> list[str]:
    lines = ["## Published tables beside ours", ""]
    for table in figures.get("tables", ()):
        lines += [f"### {table['title']}", "", f"Source: {figures['sources'][table['source']]}.", ""]
        columns, ours = [str(name) for name in table["columns"]], table.get("ours") or {}
        rows = [[str(name), *("–" if value is None else f"{value:g}" for value in values)]
                for name, values in table["rows"].items()]  # fmt: skip
        tasks = list(table["rows"]) if ours.get("rows") == "task" else [ours["task"]] if "task" in ours else []
        groups: dict[tuple[Any, ...], dict[str, PackedRun]] = defaultdict(dict)
        for run in runs:
            if run.task in tasks and run.policy in columns and run.allocator in ("", "uniform"):
                sizes = {other.size for other in runs if other.cell == run.cell and other.size}
                for size in [run.size] if run.size else sorted(sizes) or [""]:
                    groups[(*run.setting, run.task, size)][run.policy] = run
        for key in sorted(groups, key=str):
            model, _, length, question, _, task, size = key
            name = f"ours: {task}, {model}, {length} tokens, {question}, {size}"
            rows.append([name, *(_cell(groups[key].get(column)) for column in columns)])
        lines += markdown_table(["", *columns], rows)
    return lines


def _accuracy(run: PackedRun) -> float:
    return float(run.metrics["accuracy"]["mean"])


def _named(key: tuple[str, str, str], found: Mapping[str, PackedRun]) -> str:
    return key[0] + (" †" if any(run.standing for run in found.values()) else "")


def _budget(key: tuple[str, str, str]) -> str:
    return " ".join(filter(None, key[1:])) or "–"


def _cell(run: PackedRun | None) -> str:
    if run is None:
        return "–"
    low, high = run.metrics["accuracy"]["ci95"]
    interval = "" if low is None else f" ({100 * low:.0f}–{100 * high:.0f})"
    return f"{percent(_accuracy(run))}{interval}" + (f" n {len(run.rows)}" if len(run.rows) < 10 else "")


def _costs(runs: Sequence[PackedRun]) -> list[str]:
    steps = [step for run in runs if (step := run.step_s) is not None]
    firsts = [float(total) for run in runs if (total := run.metrics["ttft_s"].get("total")) is not None]
    held = sum(run.held for run in runs) / len(runs) / 2**20
    modes = sorted({str(run.metrics["mode"]) for run in runs if run.metrics.get("mode")})
    return [
        f"{held:.1f}", f"{sum(firsts) / len(firsts):.2f}" if firsts else "–",
        f"{1000 * sum(steps) / len(steps):.1f}" if steps else "–", ", ".join(modes) or "–",
    ]  # fmt: skip


def percent(value: float | None) -> str:
    """A share in percent."""
    return "–" if value is None else f"{100 * value:.1f}"


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown, and an empty one."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]
