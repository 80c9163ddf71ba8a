"""`kvbench trace`: a request trace replayed over a store of saved prefixes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvbench.cli.common import (
    Device,
    Dtype,
    Json,
    Model,
    allocation,
    app,
    byte_size,
    err,
    interruptible,
    listed,
    load_registry,
    numbers,
    out,
    pairs,
    seconds,
    share,
)
from kvbench.contract.errors import KVBenchError, check_output, sentence, unwritable
from kvbench.contract.extras import check_extras

if TYPE_CHECKING:
    from kvbench.runs.results import RunConfig

BUILT_IN = "conversation"
POLICIES = "full,quest,retrieval"
LENGTHS = "1024,2048,4096"


@app.command()
@interruptible
def trace(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help=f"Trace in Mooncake's JSONL, or `{BUILT_IN}`: a made one with the published statistics.",
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(help=f"Policies to measure, separated by commas. [default: {POLICIES}; or all of --results]"),
    ] = None,
    store: Annotated[str, typer.Option(help="Size of the store, such as 64GiB, or `infinite`.")] = "64GiB",
    servers: Annotated[int, typer.Option(min=1, help="Servers, each with one request at a time.")] = 1,
    speed: Annotated[float, typer.Option(help="Let requests arrive so many times faster, or slower below 1.")] = 1.0,
    requests: Annotated[int | None, typer.Option(min=1, help="First requests of the trace only.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure service times here, with runs that a later call reuses.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(help="Folder of runs with --prefix cached that service times are taken from.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Context lengths to measure, two or more.")] = LENGTHS,
    budget: Annotated[str, typer.Option(help="Budget of the measured policies, as of kvbench run: uniform:10%.")] = (
        "uniform:10%"
    ),
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Option of the policies, name=value.")
    ] = None,
    model: Model = "smollm2-135m",
    device: Device = None,
    dtype: Dtype = None,
    output: Annotated[Path, typer.Option(help="Folder for results, figure and measurements.")] = Path("kvbench-trace"),
    as_json: Json = False,
) -> None:
    """Replay a request trace over a store of saved prefixes: hits, times to first token, and when an index pays.

    A simulation with service times that were measured: give --measure, or --results.
    """
    if measure == (results is not None):
        raise KVBenchError("Service times are measured: give one of --measure and --results DIR.")
    if not 0 < speed < float("inf"):
        raise KVBenchError(f"--speed {speed} is not a positive number.")
    check_extras("kvbench trace", "simpy")
    limit = None if store == "infinite" else byte_size("--store", store)
    check_output(output)
    found = _requests(file)[:requests]
    folder = output / "runs" if results is None else results
    named = listed(policy)
    if measure:
        _measure(named or listed(POLICIES), lengths, budget, option, model, device, dtype, folder)
    document = _replayed(folder, named, found, limit, servers, speed)
    document = {"file": file, **document}
    _write(document, output)
    if as_json:
        print(json.dumps(document, indent=2))
        return
    _print(document, output)


def _requests(file: str) -> list[Any]:
    from kvbench.serving.requests import read_requests  # noqa: PLC0415  --help stays quick
    from kvbench.serving.synthetic import conversation  # noqa: PLC0415

    if file == BUILT_IN and not Path(file).exists():
        return conversation()
    return read_requests(Path(file))


def _replayed(
    folder: Path, named: Sequence[str], requests: Sequence[Any], limit: int | None, servers: int, speed: float
) -> dict[str, Any]:
    from kvbench.report.collect import collect  # noqa: PLC0415  torch takes seconds to import; --help stays quick
    from kvbench.serving.costs import BASELINE, costs_of  # noqa: PLC0415
    from kvbench.serving.replay import replay  # noqa: PLC0415

    runs = [run for run in collect([folder]).runs if not named or run.policy in (*named, BASELINE)]
    missing = sorted(set(named) - {run.policy for run in runs})
    if missing:
        raise KVBenchError(f"{folder} has no run of {', '.join(missing)}: measure it, or leave it out of --policy.")
    environment = dict(runs[0].environment)
    document = replay(requests, costs_of(runs), limit=limit, servers=servers, speed=speed)
    return document | {"measured_on": environment, "model": runs[0].config["model"], "runs": str(folder)}


def _measure(
    names: list[str], lengths: str, budget: str, option: list[str] | None, model: str, device: str | None,
    dtype: str | None, folder: Path,
) -> None:  # fmt: skip
    """Run every policy with a cached prefix of every length, with a question alone after it and with a quarter more."""
    from kvbench.api.run import policy_options  # noqa: PLC0415  torch takes seconds to import

    registry = load_registry()
    names = ["full", *(name for name in names if name != "full")]
    given = {name: policy_options(registry, name, names, pairs(option)) for name in names}
    tokens = numbers("--lengths", lengths)
    if tokens is None or len(tokens) < 2 or tokens[0] < 1:
        raise KVBenchError(f"--lengths {lengths} are not two lengths or more: times are fitted to lengths.")
    allocator, size = allocation(budget)

    from kvbench.contract.budget import Budget  # noqa: PLC0415  torch takes seconds to import
    from kvbench.models import load_model  # noqa: PLC0415
    from kvbench.runs.runner import Request, execute, plan  # noqa: PLC0415

    shared = Budget(allocator=allocator, **size or {"ratio": 0.1})
    loaded = load_model(model, device=device, dtype=dtype, context_length=tokens[-1])
    configs = [
        plan(
            Request(
                policy=name, policy_options=given[name], budget=shared, task="shared_needles",
                task_options={"requests": 2}, context_length=length, examples=2, seed=42, probe_examples=0,
                prefix="cached", new_tokens=new,
            ),
            loaded,
        )
        for name in names for length in tokens for new in (0, length // 4)
    ]  # fmt: skip
    with err.status("Measuring") as status:

        def progress(config: RunConfig, done: int, of: int, note: str) -> None:
            status.update(f"Measuring {config.policy}")

        def failed(config: RunConfig, error: Exception) -> None:
            raise KVBenchError(f"Measuring {config.policy} failed: {sentence(error)}") from error

        execute(configs, loaded, folder, progress, failed)


def _write(document: dict[str, Any], output: Path) -> None:
    from kvbench.serving.figure import draw  # noqa: PLC0415  matplotlib is slow to import
    from kvbench.spreadsheet import write_table  # noqa: PLC0415

    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "trace.json").write_text(json.dumps(document, indent=2) + "\n", "utf-8")
        with (output / "trace.csv").open("w", encoding="utf-8", newline="") as table:
            write_table(table, [_flat(row) for row in document["rows"]])
        with (output / "reuse.csv").open("w", encoding="utf-8", newline="") as table:
            write_table(table, document["reuse"])
        draw(document, output)
    except OSError as error:
        raise KVBenchError(unwritable(output, error)) from None


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        found |= {f"{key}_{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _print(document: dict[str, Any], output: Path) -> None:
    about, store = document["trace"], document["store_bytes"]
    size = "a store that never forgets" if store is None else f"a store of {store / 2**30:.4g} GiB"
    table = Table(
        title=f"{about['requests']} requests of {about['mean_input_tokens']:.0f} tokens, answers of "
        f"{about['mean_output_tokens']:.0f}, over {size}",
        title_justify="left",
    )
    for heading in ("policy", "saved"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "requests\nhit", "blocks\nhit", "tokens\nhit", "TTFT\np50, s", "\np90", "\np99", "service\np50, s", "\np99",
        "TPOT\np50, ms", "\np99", "busy", "a hit,\nMiB",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for row in document["rows"]:
        ttft, service, tpot = row["ttft_s"], row["ttft_service_s"], row["tpot_s"]
        table.add_row(
            row["policy"], row["kept"], share(row["requests_hit"]), share(row["block_hit_ratio"]),
            share(row["token_hit_ratio"]), *(f"{ttft[name]:.3g}" for name in ("p50", "p90", "p99")),
            *(seconds(service[name]) for name in ("p50", "p99")),
            *(seconds(tpot[name], 1000) for name in ("p50", "p99")),
            f"{row['busy_share']:.2g}", "–" if row["bytes_per_hit"] is None else f"{row['bytes_per_hit'] / 2**20:.4g}",
        )  # fmt: skip
    out.print(table)
    for row in document["break_even"]:
        if "gained_by_a_hit_s" in row:
            out.print(
                f"{row['policy']}: a saved index pays after {_count(row['hits_against_full'])} hits against full with "
                f"saved keys, after {_count(row['hits_against_rebuilding'])} against building it at every hit.",
                highlight=False,
            )
    for label, fits in document["fits"].items():
        worst = max(fits, key=lambda name: fits[name]["largest_relative_error"])
        out.print(
            f"{label}: fits lie within {100 * fits[worst]['largest_relative_error']:.0f}% of what was measured (the "
            f"largest: {worst}).", style="dim", highlight=False, markup=False,
        )  # fmt: skip
    for note in document["notes"]:
        out.print(note, style="dim", highlight=False, markup=False)
    out.print(str(output / "trace.json"), style="dim", highlight=False, markup=False, soft_wrap=True)


def _count(hits: float | None) -> str:
    return "no number of" if hits is None else f"{hits:.3g}"
