"""Time to first token against the reuse of saved prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kvbench import figures
from kvbench.report.charts.chart import WIDTH, Chart, base_row, commands_of, grouped_title, legend
from kvbench.report.collect import Collection, ReportRun, labels

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

CLAIMED = (0.5, 0.8)
"""Share of requests that hit a cached context at large services, as RetrievalAttention's authors put it (see docs)."""
Line = tuple[str, dict[str, Any], dict[str, float]]


def prefix_charts(found: Collection) -> list[Chart]:
    """The figures of runs with a cached prefix; none where there is no such run."""
    groups: dict[tuple[str, str, str], list[ReportRun]] = {}
    for run in found.runs:
        prefix = run.metrics.get("prefix")
        if prefix and None not in (prefix["ttft_hit_s"], prefix["ttft_miss_s"], prefix["construct_s"]):
            config = run.config
            size = f"{config['context_length']} tokens, {config.get('new_tokens', 0)} of them new"
            groups.setdefault((config["model"], config["task"], size), []).append(run)
    result = []
    for place, (group, runs) in enumerate(sorted(groups.items())):
        names = labels(runs)
        lines: list[Line] = [(names[id(run)], run.metrics["prefix"], run.metrics["amortised_ttft_s"]) for run in runs]
        rows = [
            {**base_row(run, name), "requests": int(count), "amortised_ttft_s": seconds,
             **{key: prefix[key] for key in ("ttft_hit_s", "ttft_miss_s", "construct_s", "break_even_requests")}}
            for run, (name, prefix, amortised) in zip(runs, lines, strict=True)
            for count, seconds in amortised.items()
        ]  # fmt: skip
        words = "; ".join(
            f"{name}: {prefix['ttft_hit_s']:.2f} s with a hit, {prefix['ttft_miss_s']:.2f} s without, "
            + (
                "a hit is no quicker"
                if prefix["break_even_requests"] is None
                else f"saved context pays from {prefix['break_even_requests']:.1f} requests on"
            )
            for name, prefix, _ in lines
        )
        low, high = (100 * share for share in CLAIMED)
        result.append(Chart(
            "prefixes" if not place else f"prefixes-{place + 1}",
            grouped_title("Time to first token against reuse", group, groups),
            "Left: construction and saving shared out over the requests that hit the prefix, plus the hit's own time; "
            "the short line at the right edge is the time without the hit. Right: the mean time where a share of the "
            f"requests hits. The band is {low:.0f} to {high:.0f}%, the share that RetrievalAttention's authors named "
            "when they left construction out of the time to first token.",
            rows, words + ".", commands=commands_of(runs), paint=partial(_paint, lines=lines),
            size=(WIDTH, 3.2),
        ))  # fmt: skip
    return result


def _paint(figure: FigureBase, lines: Sequence[Line]) -> None:
    shared, hits = figure.subplots(1, 2)
    for place, (name, prefix, amortised) in enumerate(lines):
        look = figures.style(place)
        counts = sorted((int(count), seconds) for count, seconds in amortised.items())
        shared.plot(
            [count for count, _ in counts], [seconds for _, seconds in counts], color=look.color, marker=look.marker,
            linestyle=look.dashes, label=name,
        )  # fmt: skip
        last = counts[-1][0]
        shared.plot([last, 2 * last], [prefix["ttft_miss_s"]] * 2, color=look.color, linewidth=2.5)
        hits.plot(
            [0, 100], [prefix["ttft_miss_s"], prefix["ttft_hit_s"]], color=look.color, linestyle=look.dashes,
            marker=look.marker,
        )  # fmt: skip
    figures.logarithmic(shared, "y")
    shared.set_xscale("log", base=2)
    ticks = sorted({int(count) for _, _, amortised in lines for count in amortised})
    shared.set_xticks(ticks, list(map(str, ticks)))
    shared.set_xlabel("requests on one saved prefix")
    shared.set_ylabel("time to first token (s)")
    hits.axvspan(*(100 * share for share in CLAIMED), color="#DDDDDD", zorder=0)
    hits.set_xlabel("requests that hit (%)")
    hits.set_ylabel("mean time to first token (s)")
    hits.set_ylim(bottom=0)
    legend(figure, (shared,))
