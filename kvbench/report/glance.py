"""What a reader should know before the table, in sentences."""

from __future__ import annotations

from kvbench.report.charts import percent, setting_text
from kvbench.report.collect import BASELINE, Collection, labels
from kvbench.report.commands import run_command
from kvbench.report.words import ALPHA, count, device_text, points, some, unmarked

NEAR_ZERO = 0.05
"""Accuracy of exact attention below which a task cannot tell policies apart."""


def fewest_examples(comparisons: int) -> int:
    """Examples from which the sign of every one can reach an adjusted p below 5% in a table of so many comparisons."""
    return next(n for n in range(1, 64) if 2 ** (1 - n) * max(comparisons, 1) < ALPHA)


def glance(found: Collection) -> list[tuple[str, str]]:
    """What a person should know before reading the table, in sentences, some with a command."""
    lines: list[tuple[str, str]] = []
    comparisons = sum(run.paired is not None for run in found.runs)
    needed = fewest_examples(comparisons)
    for setting, runs in found.settings().items():
        where = setting_text(setting, found)
        names = labels(runs)
        baselines = [run for run in runs if run.policy == BASELINE]
        compared = [run for run in runs if run.paired is not None]
        alone = [run for run in runs if run.paired is None and run.policy != BASELINE]
        if baselines:
            scores = [
                f"{names[id(run)]} scores {percent(run.accuracy)} on {count(len(run.rows), 'example')}"
                for run in baselines
            ]
            text = f"{where}: {some(scores, '; ')}."
            if min(run.accuracy for run in baselines) < NEAR_ZERO:
                text += " That is next to nothing: this task cannot tell policies apart on this model."
            worse: list[str] = []
            better: list[str] = []
            same: list[str] = []
            few: list[str] = []
            for run in compared:
                assert run.paired is not None
                assert run.p_adjusted is not None
                change = f"{names[id(run)]} ({points(run.paired.difference)} points)"
                if run.p_adjusted < ALPHA:
                    (worse if run.paired.difference < 0 else better).append(change)
                elif run.paired.n < needed:
                    few.append(f"{change[:-1]}, n = {run.paired.n})")
                else:
                    same.append(change)
            told = [("Worse", worse), ("Better", better), ("Not told apart from it", same)]
            for what, group in told:
                if group:
                    text += f" {what}: {some(group)}."
            if few:
                table = f" in a table of {comparisons} comparisons" if comparisons > 1 else ""
                text += (
                    f" Too few examples to tell: {some(few)}. However large a difference, its test cannot reach 5% "
                    f"with fewer than {needed} examples{table}."
                )
            lines.append((text, ""))
        cut = {names[id(run)]: run.metrics["truncated_examples"] for run in runs}
        if any(cut.values()):
            which = some([f"{examples} of {name}" for name, examples in cut.items() if examples])
            lines.append((f"{where}: examples whose text was cut to fit the context: {which}.", ""))
        over = [f"{unmarked(names[id(run)], run)} ({run.over_budget})" for run in runs if run.over_budget]
        if over:
            lines.append((f"{where}: not on the same budget as the others: {some(over)}.", ""))
        if any(run.metrics.get("prefix_left_out_examples") for run in runs):
            lines.append((f"{where}: no answer prefix was given, since the chat template opens a thinking block.", ""))
        if alone:
            which = some([names[id(run)] for run in alone])
            command = run_command({**alone[0].config, "policy": BASELINE, "policy_options": {}, "budget": None},
                                  alone[0].path.parent)  # fmt: skip
            lines.append((
                f"{where}: there is no {BASELINE} run on the same examples as {which}, so their differences are not "
                "known. Run it with:", command,
            ))  # fmt: skip
    overheads = [run.metrics["probe_overhead"] for run in found.runs if run.metrics.get("probe_overhead") is not None]
    if overheads:
        low, high = (f"{100 * value:+.0f}%".replace("-", "−") for value in (min(overheads), max(overheads)))
        lines.append((
            f"Probes changed the time of a decoding step by {low if low == high else f'{low} to {high}'}; the times "
            "and bytes shown are of generations without them.", "",
        ))  # fmt: skip
    devices = {f"{device_text(run)}, batch {run.config['batch_size']}" for run in found.runs}
    versions = {str(sorted(run.environment.get("packages", {}).items())) for run in found.runs}
    if len(devices) > 1 or len(versions) > 1:
        what = " and ".join(
            text for many, text in ((len(devices) > 1, "devices, threads, number types or batch size"),
                                    (len(versions) > 1, "package versions")) if many
        )  # fmt: skip
        lines.append((f"The runs differ in {what}: compare times only between runs that agree in them.", ""))
    return lines
