"""The table of runs: a column for each policy, or, where there are many, a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvbench.api.formats import count, figure, mib, seconds, share
from kvbench.api.table import Column, Table

Cell = Callable[[dict[str, Any]], str]

MOST_COLUMNS = 5
"""Policies that fit beside each other; more become rows."""


def _prefix(metrics: dict[str, Any], name: str) -> float | None:
    found: float | None = (metrics.get("prefix") or {}).get(name)
    return found


def _break_even(metrics: dict[str, Any]) -> str:
    value = _prefix(metrics, "break_even_requests")
    return "none" if value is None and metrics.get("prefix") else figure(value)


def _interval(metric: str, cell: Callable[[float | None], str]) -> Cell:
    return lambda m: " to ".join(cell(end) for end in m[metric]["ci95"])


def _mean(metric: str, cell: Callable[[float | None], str]) -> Cell:
    return lambda m: cell(m[metric]["mean"])


def _shown(metric: str, main: str | None) -> Callable[[float | None], str]:
    """The main metric lies between 0 and 1."""
    return share if metric == main else figure


_REST: list[tuple[str, str, Cell]] = [
    ("recall@k", "recall\n@k", lambda m: share(m["recall_at_k"])),
    ("recovered attention mass", "mass", lambda m: share(m["recovered_mass"])),
    ("  without the sinks", "", lambda m: share(m.get("recovered_mass_without_sinks"))),
    ("output error", "", lambda m: share(m.get("output_error"))),
    ("keys scanned", "", lambda m: share(m.get("scanned_fraction"))),
    ("density", "density", lambda m: share(m["density"])),
    ("  tokens asked for", "", lambda m: count(m.get("budget_tokens"))),
    ("  tokens attended", "tokens", lambda m: count(m.get("attended_tokens"))),
    ("  their bytes, MiB", "", lambda m: mib(m.get("attended_bytes"))),
    ("resident, MiB", "MiB on\ndevice", lambda m: mib(m["bytes"]["resident"])),
    ("offloaded, MiB", "MiB on\nhost", lambda m: mib(m["bytes"]["offloaded"])),
    ("index, MiB", "MiB\nindex", lambda m: mib(m["bytes"]["index"])),
    ("over the answer: peak, MiB", "", lambda m: mib((m.get("answer_bytes") or {}).get("peak"))),
    ("  mean, MiB", "", lambda m: mib((m.get("answer_bytes") or {}).get("mean"))),
    ("TTFT, s", "TTFT\ns", lambda m: seconds(m["ttft_s"]["total"])),
    ("  prefill", "", lambda m: seconds(m["ttft_s"]["prefill"])),
    ("  index construction", "", lambda m: seconds(m["ttft_s"]["index"])),
    ("  without the hit", "miss\ns", lambda m: seconds(_prefix(m, "ttft_miss_s"))),
    ("  load", "", lambda m: seconds(_prefix(m, "load_s"))),
    ("  new tokens", "", lambda m: seconds(_prefix(m, "extend_s"))),
    ("construction and saving, s", "once\ns", lambda m: seconds(_prefix(m, "construct_s"))),
    ("  break-even requests", "break\neven", _break_even),
    ("  saved state, MiB", "MiB\nsaved", lambda m: mib(_prefix(m, "state_bytes"))),
    ("accuracy without the hit", "without\nhit", lambda m: share(_prefix(m, "miss_score"))),
    ("recall before the new tokens", "", lambda m: share(_prefix(m, "recall_before"))),
    ("  and after", "", lambda m: share(_prefix(m, "recall_after"))),
    ("TPOT p50, ms", "TPOT\nms", lambda m: seconds(m["tpot_s"]["p50"], 1000)),
    ("TPOT p95, ms", "", lambda m: seconds(m["tpot_s"]["p95"], 1000)),
    ("  on the device, p50", "", lambda m: seconds((m.get("device_tpot_s") or {}).get("p50"), 1000)),
    ("  steps", "steps", lambda m: m.get("mode") or "–"),
    ("  floor, ms", "", lambda m: seconds(m.get("floor_s"), 1000)),
    ("  hot set's hit rate", "", lambda m: figure(m.get("hot_hit_rate"))),
    ("  times the floor", "x\nfloor", lambda m: figure(m.get("floor_ratio"))),
    ("peak memory, MiB", "", lambda m: mib(m["peak_memory_bytes"])),
]
"""Label, heading where policies are rows (none: left out there), and the cell."""
_OF_PREFIXES = {
    "  without the hit", "  load", "  new tokens", "construction and saving, s", "  break-even requests",
    "  saved state, MiB", "accuracy without the hit", "recall before the new tokens", "  and after",
}  # fmt: skip


def _entries(metrics: Mapping[str, str], main: str | None) -> list[tuple[str, str, Cell]]:
    if main is None:
        metrics, main = {"accuracy": "accuracy", **metrics}, "accuracy"
    entries: list[tuple[str, str, Cell]] = []
    for name, label in metrics.items():
        shown = _shown(name, main)
        entries.append((label, label.replace(" ", "\n"), _mean(name, shown)))
        entries.append(("  95% interval", "95%\ninterval", _interval(name, shown)))
    return entries + _REST


def results_table(documents: list[dict[str, Any]], title: str, metrics: Mapping[str, str], main: str | None) -> Table:
    """Make the table; `metrics` are the task's labels by name, beside the accuracy or, with `main`, in its place.

    Without rows that would be empty for every policy.
    """
    entries = _entries(metrics, main)
    if not any(document["metrics"].get("prefix") for document in documents):
        entries = [entry for entry in entries if entry[0] not in _OF_PREFIXES]
    names = [
        document["policy"] + (" (over budget)" if document["metrics"].get("over_budget") else "")
        for document in documents
    ]
    if len(documents) <= MOST_COLUMNS:
        rows = []
        for label, _, cell in entries:
            cells = [cell(document["metrics"]) for document in documents]
            if set(cells) != {"–"}:  # what nothing here measures, such as a GPU's times on a CPU
                rows.append([label, *cells])
        return Table(title, [Column("", numeric=False), *map(Column, names)], rows)
    # Intervals of the first metric only, so that a row fits a line; the JSON document has all.
    columns = [entry for place, entry in enumerate(entries) if entry[1] and (place < 2 or "95%" not in entry[1])]
    return Table(
        title,
        [Column("policy", numeric=False), *(Column(heading) for _, heading, _ in columns)],
        [
            [name, *(cell(document["metrics"]) for _, _, cell in columns)]
            for name, document in zip(names, documents, strict=True)
        ],
        boxed=False,
    )
