"""The page of long answers, made of packed runs of tasks whose answers are checked line by line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from kvbench.compare.wording import budget_text
from kvbench.report.reference import WEAK, PackedRun, markdown_table, packed_runs, percent, provenance
from kvbench.statistics import mean_interval, paired_difference

MADE = "<!-- made by kvbench results answers -->"
OPENING = """What a small cache does to answers of thousands of tokens whose every line is checked
([tasks](tasks.md)). With `every N` an evicting policy scores prompt and answer again after N generated tokens and
keeps the budget's best ([budgets](budgets.md#compression-while-decoding)); evicting policies without it keep the
whole answer beside what they kept of the prompt, and selecting ones choose from everything."""
COMMANDS = """```
kvbench sweep results/long-generation.yaml --output runs
kvbench results pack runs --output results/long-generation
kvbench results answers results/long-generation --output docs/long-generation.md
kvbench report runs
```

The last line draws tokens held and times over the answers."""
EXPLAINED = """Right lines in percent with their 95% interval, the difference from exact attention on the same
examples with its interval, and by the task's measures: whole answers right, the share of right lines before the
first wrong one, the answer's length by the right one's, the share of runs of eight words that were there before, and
answers that end as their prompt's first line asks. Bytes are the most that a step held and the mean over each
answer; a step's time is the median in an answer's first and last eighth."""
FINDINGS = (
    ("small budgets lengthen answers (arXiv 2512.12008)", "answer_length", True),
    ("instructions in what is evicted are ignored (arXiv 2510.00231)", "rule_kept", False),
)
"""Published findings: the measure that shows them, and whether it rises."""


def answers_page(results: Path, root: Path) -> str:
    """The page in Markdown of the runs below `results` whose task measures its answers' length.

    `root` is the repository that their commits are held to. Raises KVBenchError for runs that cannot be read.
    """
    runs = [run for run in packed_runs(results, root) if "answer_length" in run.metrics]
    lines = ["# Long answers", "", MADE, "", *OPENING.splitlines(), "", *COMMANDS.splitlines(), ""]
    if not runs:
        return "\n".join([*lines, "No results are committed yet."]) + "\n"
    lines += [*provenance(runs), *EXPLAINED.splitlines(), ""]
    groups: dict[tuple[Any, ...], list[PackedRun]] = defaultdict(list)
    for run in runs:
        groups[(*run.setting, run.task)].append(run)
    for setting in sorted(groups, key=str):
        lines += _setting(setting, groups[setting])
    lines += ["## Published findings", ""]
    head = ["finding", "model, task, tokens", "policy", "difference from exact attention", "verdict"]
    rows = [row for key in sorted(groups, key=str) for row in _findings(key, groups[key])]
    lines += markdown_table(head, rows)
    return "\n".join(lines).rstrip() + "\n"


def _setting(setting: tuple[Any, ...], runs: Sequence[PackedRun]) -> list[str]:
    model, scaling, length, _, device, task = setting
    stretched = f", {scaling}" if scaling else ""
    lines = [f"## {task}: {model}{stretched}, {length} tokens of prompt and answer ({device})", ""]
    exact = _exact(runs)
    answer = fmean(float(run.metrics["generated_tokens"]) for run in runs)
    weak = exact is not None and exact.metrics["accuracy"]["mean"] < WEAK
    lines += [
        f"{answer:.0f} tokens generated on average."
        + (" Exact attention has less than 10% of the lines right: no policy can be judged by this task." * weak),
        "",
    ]
    head = [
        "policy", "budget", "right lines", "difference", "whole", "before error", "length", "repeated", "rule kept",
        "MiB, most", "MiB, mean", "ms a step, first and last eighth", "steps",
    ]  # fmt: skip
    order = sorted(runs, key=lambda run: (run.policy != "full", -_mean(run, "accuracy"), run.policy, run.size))
    return lines + markdown_table(head, [_row(run, exact) for run in order])


def _row(run: PackedRun, exact: PackedRun | None) -> list[str]:
    low, high = run.metrics["accuracy"]["ci95"]
    held = run.metrics.get("answer_bytes") or {}
    sizes = ["–" if (size := held.get(name)) is None else f"{size / 2**20:.1f}" for name in ("peak", "mean")]
    parts = [row["step_s_parts"] for row in run.rows if row.get("step_s_parts")]
    times = (fmean(part[place] for part in parts) for place in (0, -1)) if parts else ()
    return [
        run.policy + (" †" if run.standing else ""), _budget(run),
        percent(_mean(run, "accuracy")) + ("" if low is None else f" ({100 * low:.0f}–{100 * high:.0f})"),
        "–" if exact is None or exact is run else _difference(exact.scores, run.scores)[0],
        percent(_mean(run, "whole_answer")), percent(_mean(run, "before_error")),
        f"{_mean(run, 'answer_length'):.2f}", percent(_mean(run, "repetition")), percent(_mean(run, "rule_kept")),
        *sizes, " to ".join(f"{1000 * seconds:.1f}" for seconds in times) or "–", str(run.metrics.get("mode") or "–"),
    ]  # fmt: skip


def _findings(setting: tuple[Any, ...], runs: Sequence[PackedRun]) -> list[list[str]]:
    exact, found = _exact(runs), []
    if exact is None:
        return []
    model, _, length, _, _, task = setting
    for text, name, rises in FINDINGS:
        for run in sorted(runs, key=lambda run: (run.policy, run.size)):
            theirs, ours = _values(exact, name), _values(run, name)
            if run is exact or not theirs.keys() & ours.keys():
                continue
            told, low, high = _longer(theirs, ours) if name == "answer_length" else _difference(theirs, ours)
            there, not_there = (low > 0, high <= 0) if rises else (high < 0, low >= 0)
            verdict = "holds" if there else "does not hold" if not_there else "undecided"
            if not rises and fmean(theirs.values()) < WEAK:
                verdict = "cannot be judged: exact attention fails, too"
            label = run.policy if run.config["budget"] is None else f"{run.policy} {_budget(run)}"
            found.append([text, f"{model}, {task}, {length}", label, told, verdict])
    return found


def _budget(run: PackedRun) -> str:
    return "–" if run.config["budget"] is None else budget_text(run.config["budget"])


def _exact(runs: Sequence[PackedRun]) -> PackedRun | None:
    return next((run for run in runs if run.policy == "full"), None)


def _mean(run: PackedRun, name: str) -> float:
    return float(run.metrics[name]["mean"])


def _values(run: PackedRun, name: str) -> dict[str, float]:
    return {row["id"]: float(row["scores"][name]) for row in run.rows if name in row.get("scores", {})}


def _difference(exact: Mapping[str, float], ours: Mapping[str, float]) -> tuple[str, float, float]:
    """The mean difference of shares with its interval in words, in points, and the interval."""
    found = paired_difference({0: dict(exact)}, {0: dict(ours)})
    low, high = found.ci95
    return f"{100 * found.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}), n {found.n}", low, high


def _longer(exact: Mapping[str, float], ours: Mapping[str, float]) -> tuple[str, float, float]:
    """The same of lengths, which have no upper end."""
    differences = [ours[name] - exact[name] for name in sorted(exact.keys() & ours.keys())]
    low, high = mean_interval(differences)
    return f"{fmean(differences):+.2f} ({low:+.2f} to {high:+.2f}), n {len(differences)}", low, high
