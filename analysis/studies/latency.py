"""From which context length and batch on a policy's decoding step is faster than exact attention's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field

from kvbench import figures
from kvbench.compare.wording import budget_text
from kvbench.contract.analysis import Analysis, Row, Tables
from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import parse_json, read_bytes, reading
from kvbench.runs.published import published
from kvbench.runs.results import read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "full"
MOST_PANELS = 3
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1)]


class _Measured(BaseModel):
    """A row of a benchmark's file, as far as it is read."""

    policy: str
    batch: Size
    tokens: Size
    budget: Size | None = None
    mode: str | None = None
    p50_s: Seconds | None = None
    floor_s: Seconds | None = None


class _Benchmark(BaseModel):
    """A file that `tests/bench/gpu/decode.py` wrote."""

    device: str
    layers: Size
    compiled: bool = False
    rows: list[_Measured]


class LatencyBreakEven(Analysis):
    """Compares a step's time with exact attention's, in the same setting, and finds where a policy begins to win.

    Between two measured lengths (or batches) the difference of the two times is taken as linear; beyond them nothing is
    said but that the break-even lies there.
    """

    name = "latency"
    summary = "Break-even context length and batch against exact attention, from decoding benchmarks and runs."
    reference = "asked for by every reader of a table of speed-ups"
    size = (10.5, 3.8)
    reads_times = True

    def read_times(self, benchmarks: Sequence[Path], runs: Sequence[Path]) -> tuple[Tables, list[str]]:
        """`rows`: a measured step each; `contexts`, `batches`: the break-evens.

        Raises KVBenchError where nothing has exact attention beside it.
        """
        rows = [row for file in benchmarks for row in _of_benchmark(file)] + [_of_run(folder) for folder in runs]
        timed = [row for row in rows if row["step_s"] is not None]
        notes = []
        if len(timed) < len(rows):
            notes.append(f"{len(rows) - len(timed)} of {len(rows)} measurements have no time of a decoding step")
        exact = {_setting(row): row for row in timed if row["policy"] == BASELINE}
        for row in timed:
            mine = exact.get(_setting(row))
            row["exact_s"] = mine["step_s"] if mine else None
            row["speed_up"] = mine["step_s"] / row["step_s"] if mine else None
        compared = [row for row in timed if row["exact_s"] is not None and row["policy"] != BASELINE]
        if not compared:
            raise KVBenchError(
                f"No policy was timed beside '{BASELINE}' on the same device, model, batch and context: give a "
                "benchmark's file that holds both, or runs made without --no-baseline."
            )
        apart = [row for row in compared if row["mode"] != exact[_setting(row)]["mode"]]
        if apart:
            which = ", ".join(dict.fromkeys(row["policy"] for row in apart))
            notes.append(f"{which}: steps did not run in the mode of exact attention's")
        alone = sum(row["policy"] != BASELINE and row["exact_s"] is None for row in timed)
        if alone:
            notes.append(f"{alone} measurements have no exact attention beside them")
        return {
            "rows": timed,
            "contexts": _break_evens(compared, "tokens", "batch"),
            "batches": _break_evens(compared, "batch", "tokens"),
        }, notes

    def summarise(self, tables: Tables) -> list[Row]:
        """A policy's break-even context at each batch, and how much faster it is at the longest context measured."""
        return [
            {name: row[name] for name in ("where", "policy", "budget", "batch", "break_even", "longest", "speed_up")}
            for row in tables["contexts"]
        ]

    def draw(self, figure: Figure, tables: Tables) -> None:
        """A step's time by context, a panel for each device and batch; published times where they apply."""
        groups: dict[tuple[str, int], list[Row]] = {}
        for row in tables["rows"]:
            groups.setdefault((row["where"], row["batch"]), []).append(row)
        shown = list(groups.items())[:MOST_PANELS]
        names = [name for name in dict.fromkeys(map(_name, tables["rows"])) if name != BASELINE]
        axes = figure.subplots(1, len(shown), squeeze=False)[0]
        for axis, ((where, batch), rows) in zip(axes, shown, strict=True):
            for place, name in ((6, BASELINE), *enumerate(names)):
                points = sorted((row["tokens"], 1e3 * row["step_s"]) for row in rows if _name(row) == name)
                if not points:
                    continue
                look = figures.style(place if name == BASELINE or place < 6 else place + 1)
                axis.plot(*zip(*points, strict=True), color=look.color, marker=look.marker, linestyle=look.dashes,
                          label=name)  # fmt: skip
            bar = published(rows[0]["model"], rows[0]["dtype"], rows[0]["device"], batch)
            if bar is not None:
                ends = sorted({row["tokens"] for row in rows})
                axis.plot(ends, [1e3 * bar.seconds(end) for end in ends], color=figures.REFERENCE, linestyle=":",
                          label=bar.text)  # fmt: skip
            axis.set_ylim(bottom=0)  # both axes linear, as the break-evens are interpolated
            axis.set_xlabel("context (tokens)")
            axis.set_ylabel("decoding step (ms)")
            axis.set_title(f"{where}, batch {batch}", loc="left")
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)


def _of_benchmark(file: Path) -> list[Row]:
    with reading(lambda reason: f"{file} is no file of tests/bench/gpu/decode.py ({reason}): give one that it wrote."):
        found = _Benchmark.model_validate(parse_json(read_bytes(file), ours=False))
    where = found.device + (", compiled" if found.compiled else "")
    return [
        {
            "where": where, "device": found.device, "model": f"llama-3-8b shape, {found.layers} layers",
            "dtype": "bfloat16", "policy": row.policy, "budget": "" if row.budget is None else f"{row.budget} tokens",
            "batch": row.batch, "tokens": row.tokens, "mode": row.mode, "step_s": row.p50_s, "floor_s": row.floor_s,
        }
        for row in found.rows
    ]  # fmt: skip


def _of_run(folder: Path) -> Row:
    found = read(folder)
    config, metrics, device = found["config"], found["metrics"], found["environment"].get("device_name") or "unknown"
    on_device = (metrics.get("device_tpot_s") or {}).get("p50")
    budget = config["budget"]
    return {
        "where": f"{device}, {Path(config['model']).name}, {config['task']}", "device": device,
        "model": config["model"], "dtype": config["dtype"], "policy": config["policy"],
        "budget": "" if budget is None else budget_text(budget), "batch": config["batch_size"],
        "tokens": config["context_length"], "mode": metrics.get("mode"),
        "step_s": on_device or (metrics.get("tpot_s") or {}).get("p50"), "floor_s": metrics.get("floor_s"),
    }  # fmt: skip


def _setting(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("where", "model", "dtype", "batch", "tokens"))


def _name(row: Row) -> str:
    return f"{row['policy']}, {row['budget']}" if row["budget"] else str(row["policy"])


def _break_evens(rows: Sequence[Row], along: str, fixed: str) -> list[Row]:
    """Where each policy begins to win as `along` grows, at each value of `fixed`."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("where", "policy", "budget", fixed)), []).append(row)
    found = []
    for key, part in groups.items():
        points = sorted((row[along], row["exact_s"] - row["step_s"]) for row in part)
        longest = max(part, key=lambda row: row[along])
        value, text = break_even(points)
        found.append({
            "where": key[0], "policy": key[1], "budget": key[2], fixed: key[3], "break_even": text, along: value,
            "longest": longest[along], "speed_up": longest["speed_up"], "measured": len(points),
        })  # fmt: skip
    return found


def break_even(points: Sequence[tuple[float, float]]) -> tuple[float | None, str]:
    """Where the gain of (place, gain), places ascending, turns positive for good: interpolated, and in words."""
    wins = [gain > 0 for _, gain in points]
    if not wins[-1]:
        return None, f"above {points[-1][0]:g}"
    if all(wins):
        return None, f"below {points[0][0]:g}"
    last = max(place for place, won in enumerate(wins) if not won)
    (left, loss), (right, gain) = points[last], points[last + 1]
    value = left + (right - left) * -loss / (gain - loss)
    return value, f"{value:.0f}" if value >= 100 else f"{value:.1f}"
