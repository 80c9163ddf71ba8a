"""What a figure of the report is, and what all of them share: styles, titles, legends, the commands that made them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench import figures
from kvbench.compare.wording import budget_text
from kvbench.report.collect import BASELINE, Collection, ReportRun, Setting, labels
from kvbench.report.commands import run_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase


MIB = 2**20
MOST_PANELS = 4
"""Settings in one figure; more go into a second."""
WIDTH = 7.6
ONE_COLUMN = 18
"""Entries of a legend that fit below one another beside a panel."""
NO_RECALL = "measured recall: they ran with --probe-examples 0, or under a budget that left no choice"
Row = dict[str, Any]


@dataclass
class Chart:
    """A figure of the report: its texts, the rows of its CSV, and how it is painted.

    `summary` is the figure in words, for those who do not see it. `missing` says why there is no figure, or what
    is left out of it, and `remedy` holds the commands that would record that. `commands` made what it shows.
    """

    name: str
    title: str
    caption: str
    rows: list[Row] = field(default_factory=list)
    summary: str = ""
    missing: str = ""
    remedy: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    paint: Callable[[FigureBase], None] | None = None
    picture: Path | None = None
    """A figure that is there already, `.svg` beside the `.png` that this names, and is shown as it is."""
    size: tuple[float, float] = (WIDTH, 3.0)


def setting_text(setting: Setting, found: Collection) -> str:
    """A setting in words, without what all runs share beyond task and length."""
    model, task, length, question = setting
    parts = [task, f"{length} tokens"]
    if len({run.config["model"] for run in found.runs}) > 1:
        parts.insert(0, model_text(model))
    if len({run.config["question"] for run in found.runs}) > 1:
        parts.append(f"question {question}")
    return ", ".join(parts)


def model_text(model: str) -> str:
    """A model's name; of a local folder, the last part of its path."""
    return Path(model).name if Path(model).is_absolute() else model


def policy_styles(runs: Iterable[ReportRun]) -> dict[str, figures.Style]:
    """The same style for a policy in every figure of a report; black for exact attention."""
    names = sorted({run.policy for run in runs} - {BASELINE})
    return {BASELINE: figures.BASELINE_STYLE, **{name: figures.distinct(place) for place, name in enumerate(names)}}


def run_styles(runs: Iterable[ReportRun], styles: Mapping[str, figures.Style]) -> dict[int, figures.Style]:
    """The style of each run (by `id(run)`): its policy's, in which the runs of one policy differ by their dashes."""
    seen: dict[str, int] = {}
    found = {}
    for run in runs:
        place = seen[run.policy] = seen.get(run.policy, -1) + 1
        found[id(run)] = styles[run.policy]._replace(dashes=figures.style(place).dashes)
    return found


def portions(groups: Mapping[Setting, Any], most: int = MOST_PANELS) -> Iterator[tuple[str, list[Setting]]]:
    """Settings in portions for one figure each, with the suffix of the figure's name."""
    keys = list(groups)
    for start in range(0, len(keys), most):
        yield "" if not start else f"-{start // most + 1}", keys[start : start + most]


def setting_charts(
    found: Collection, runs: Sequence[ReportRun], chart: Chart, *, most: int = MOST_PANELS,
    row: Callable[[ReportRun], Iterable[Row]], told: Callable[[ReportRun, str], str],
    paint: Callable[..., None], height: Callable[[Mapping[Setting, list[ReportRun]]], float],
) -> list[Chart]:  # fmt: skip
    """Copies of `chart` that show runs by setting, `most` settings in each figure, with their rows and words.

    `row` gives what the CSV's rows of a run hold beside their beginning, `told` a run in words by its label; `paint` is
    called with the figure, `groups` (the runs by setting) and `found`; `height` is that of such groups in inches.
    """
    groups = found.settings(runs)
    result = []
    for suffix, settings in portions(groups, most):
        shown = {setting: groups[setting] for setting in settings}
        rows, words = [], []
        for setting, group in shown.items():
            names = labels(group)
            rows += [{**base_row(run, names[id(run)]), **more} for run in group for more in row(run)]
            text = in_few_words(told(run, names[id(run)]) for run in group)
            words.append(f"{setting_text(setting, found)}: {text}.")
        result.append(replace(
            chart, name=f"{chart.name}{suffix}", rows=rows, summary=" ".join(words),
            commands=commands_of(run for group in shown.values() for run in group),
            paint=partial(paint, groups=shown, found=found), size=(WIDTH, height(shown)),
        ))  # fmt: skip
    return result


def panel_height(entries: int) -> float:
    """Inches of a panel with a legend of so many entries beside it."""
    return max(2.6, 0.5 + 0.13 * (entries if entries <= ONE_COLUMN else -(-entries // 2)))


def in_few_words(texts: Iterable[str], most: int = 12) -> str:
    """Texts in a row, the first ones where there are many; the CSV has all."""
    found = list(texts)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more, in the CSV" if len(found) > most else "")


def grouped_title(title: str, group: tuple[str, str, str], groups: Iterable[tuple[str, str, str]]) -> str:
    """The title with the group's model, task and question mode, as far as the groups differ in them."""
    differing = [model_text(part) for place, part in enumerate(group) if len({other[place] for other in groups}) > 1]
    return f"{title}: {', '.join(differing)}" if differing else title


def commands_of(runs: Iterable[ReportRun]) -> list[str]:
    """The commands that made runs, each once."""
    return list(dict.fromkeys(run_command(run.config, run.path.parent) for run in runs))


def base_row(run: ReportRun, label: str) -> Row:
    """What every row of a figure's CSV begins with."""
    return {
        **{key: run.config[key] for key in ("model", "task", "context_length", "question", "seed", "policy")},
        "label": label, "budget": budget_text(run.config["budget"]), "status": run.status, "run": run.path.name,
    }  # fmt: skip


def percent(value: float | None) -> str:
    """A fraction in percent."""
    return "–" if value is None else f"{100 * value:.1f}%"


def policy_legend(axes: Axes, policies: Iterable[str], styles: Mapping[str, figures.Style]) -> None:
    """The policies of a panel by colour and marker, beside it; exact attention first."""
    from matplotlib.lines import Line2D  # noqa: PLC0415 - slow

    names = sorted(set(policies), key=lambda name: (name != BASELINE, name))
    handles = [
        Line2D([], [], color=styles[name].color, marker=styles[name].marker, markersize=4.5, linestyle="none")
        for name in names
    ]
    side_legend(axes, handles, names)


def side_legend(axes: Axes, handles: Sequence[Any], names: Sequence[str], **more: Any) -> None:
    """A legend to the right of a panel, in small print and two columns where it is long."""
    axes.legend(
        handles, names, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=6.5, borderaxespad=0.2,
        ncols=1 if len(names) <= ONE_COLUMN else 2, columnspacing=0.8, handletextpad=0.4, labelspacing=0.35,
        **{"handlelength": 1.2, **more},
    )  # fmt: skip


def legend(figure: FigureBase, axes: Iterable[Axes]) -> None:
    """One legend for all axes, above them, each name once."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside upper center", ncols=min(len(handles), 4),
            handlelength=2.6,
        )  # fmt: skip


def not_baseline(found: Collection) -> ReportRun | None:
    """A run of another policy than the baseline, or else of the baseline."""
    return next((run for run in found.runs if run.policy != BASELINE), found.runs[0] if found.runs else None)


def commands_with(runs: Sequence[ReportRun], probes: Sequence[str]) -> list[str]:
    """The commands that would make runs again with probes."""
    configs = [{**run.config, "probe_examples": max(1, run.config["probe_examples"])} for run in runs]
    return list(dict.fromkeys(
        run_command(config, run.path.parent, probes=probes) for config, run in zip(configs, runs, strict=True)
    ))  # fmt: skip


def missing_chart(
    name: str, title: str, found: Collection, what: str = "", lack: Sequence[ReportRun] = (),
    probes: Sequence[str] = (),
) -> Chart:  # fmt: skip
    """A figure that nothing here can be drawn of, and what would record it."""
    if not found.runs:
        return Chart(name, title, "", missing="There is no run here.", remedy=["kvbench run --policy retrieval"])
    return Chart(name, title, "", missing=f"None of the runs here {what}.", remedy=commands_with(lack, probes))
