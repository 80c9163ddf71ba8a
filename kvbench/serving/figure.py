"""The figure of a replayed trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvbench import figures

NAME = "trace"
SHORT = {"nothing": "nothing saved", "keys": "keys saved", "index": "index saved"}


def draw(document: dict[str, Any], folder: Path) -> None:
    """Write `trace.svg` and `trace.png`: times to first token, and how they fall with the share of a prompt saved."""
    rows = document["rows"]
    with figures.drawing(folder, NAME, (7.4, 1.6 + 0.24 * len(rows))) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        policies = list(dict.fromkeys(row["policy"] for row in rows))
        for place, row in enumerate(rows):
            look = figures.style(policies.index(row["policy"]))
            times = row["ttft_s"]
            left.plot([times["p50"], times["p99"]], [place, place], color=look.color, linewidth=1.2)
            for name, marker in (("p50", "o"), ("p90", "s"), ("p99", "D")):
                label = name if not place else None
                left.plot(
                    [times[name]], [place], marker=marker, color=look.color, linestyle="none", markersize=4,
                    markerfacecolor="white" if name == "p99" else look.color, label=label,
                )  # fmt: skip
        left.set_yticks(range(len(rows)), [f"{row['policy']}, {SHORT[row['kept']]}" for row in rows], fontsize=7)
        left.set_ylim(len(rows) - 0.4, -0.6)
        left.set_xscale("log")
        left.set_xlabel("time to first token, waiting included (s)")
        left.grid(visible=False, axis="y")
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.2)
        reuse = document["reuse"]
        for policy in policies:
            look = figures.style(policies.index(policy))
            for kept, dashes in (("keys", ":"), ("index", "-")):
                line = [row for row in reuse if row["policy"] == policy and row["kept"] == kept]
                if line:
                    right.plot(
                        [100 * row["share"] for row in line], [row["ttft_service_s"] for row in line], color=look.color,
                        linestyle=dashes if policy != "full" else "--", marker=look.marker, markersize=4,
                        label=policy if kept == "index" or policy == "full" else None,
                    )  # fmt: skip
        right.set_xlabel(f"share of a prompt of {reuse[0]['tokens']} tokens in the store (%)")
        right.set_ylabel("time to first token, no waiting (s)")
        right.set_ylim(bottom=0)
        right.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.4, columnspacing=1.0,
            title="lines: index saved; dotted: keys saved", title_fontsize=8,
        )  # fmt: skip
