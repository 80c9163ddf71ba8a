"""`kvbench index`: vector indexes on captured queries and keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kvbench.cli.capture import (
    DecodeTokens,
    Decoding,
    PrefillChunk,
    SourceTextName,
    StoreDtype,
    captured,
)  # fmt: skip
from kvbench.cli.common import (
    Device,
    Dtype,
    Json,
    Model,
    RopeScaling,
    app,
    err,
    listed,
    load_registry,
    mib,
    numbers,
    out,
    pairs,
    share,
)
from kvbench.contract.errors import KVBenchError, check_output


@app.command()
def index(
    names: Annotated[
        list[str], typer.Option("--indexes", help="Indexes separated by commas; `kvbench indexes` lists them.")
    ],
    capture: Annotated[Path | None, typer.Option(help="Folder of a capture; without it one is made first.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="k of recall@k.")] = 100,
    layers: Annotated[str | None, typer.Option(help="Layers separated by commas. [default: all captured]")] = None,
    heads: Annotated[str | None, typer.Option(help="Query heads separated by commas. [default: all]")] = None,
    efforts: Annotated[
        list[str] | None,
        typer.Option(help="Values of the search parameter: 32,64,128 for all indexes, or index=1,2,4 for one."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Option of an index, index.option=value.")
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens left out of the index.")] = 4,
    window: Annotated[int, typer.Option(min=0, help="Last tokens of the prompt left out of the index.")] = 64,
    model: Model = "smollm2-135m",
    text: SourceTextName = "default",
    context_length: Annotated[int, typer.Option(min=2, help="Tokens to capture, prompt and decoding together.")] = 4096,
    decode_tokens: DecodeTokens = 128,
    decoding: Decoding = "text",
    rope_scaling: RopeScaling = None,
    prefill_chunk: PrefillChunk = 1024,
    store_dtype: StoreDtype = None,
    seed: Annotated[int, typer.Option(help="Where in the text the prompt starts; 0 is its beginning.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    output: Annotated[Path, typer.Option(help="Folder for results and captures.")] = Path("kvbench-index"),
    as_json: Json = False,
) -> None:
    """Compare vector indexes on real queries and keys: recall, scanned keys, time, build and insertion time, bytes."""
    found = load_registry()
    chosen = tuple(listed(names))
    if not chosen:
        raise KVBenchError(f"--indexes '{','.join(names)}' names no index: `kvbench indexes` lists them.")
    check_output(output)
    for name in chosen:
        found.find("index", name)
    from kvbench.analysis import index_benchmark, index_results  # noqa: PLC0415
    from kvbench.capture.files import load_capture  # noqa: PLC0415

    config = index_benchmark.IndexBenchmark(
        chosen, k=k, layers=numbers("--layers", layers), heads=numbers("--heads", heads),
        efforts=_index_efforts(efforts, chosen), options=_index_options(option, chosen), sinks=sinks, window=window,
    )  # fmt: skip
    if capture is not None:
        source = load_capture(capture)
    else:
        source = captured(
            model, text, context_length, layers or "all", lambda name: output / f"capture-{name}",
            decode_tokens=decode_tokens, decoding=decoding, rope_scaling=rope_scaling, prefill_chunk=prefill_chunk,
            store_dtype=store_dtype, seed=seed, device=device, dtype=dtype,
        )  # fmt: skip
    with err.status("") as status:
        rows = index_benchmark.run(source, config, status.update)
    content = index_results.document(source, config, rows)
    folder = output / index_results.folder_name(source, config)
    index_results.write(content, folder)
    if as_json:
        print(json.dumps({**content, "folder": str(folder)}, indent=1))
        return
    out.print(_index_table(content))
    out.print(
        f"{rows[0]['n_keys']} keys, {rows[0]['n_queries']} decoding queries that no index saw, of "
        f"{_count(rows, 'layer')} × {_count(rows, 'head')}; searches on one "
        f"thread, one step of all heads at a time; build and insertion of {source.manifest.config.decode_tokens} keys "
        f"on {content['environment']['build_threads']} threads and bytes are per layer, for all heads at once. "
        "95% intervals over layers and heads.", style="dim", highlight=False,
    )  # fmt: skip
    for entry in content["summary"]:
        out.print(_reached(entry), _whole(entry, content["environment"]["build_threads"]), highlight=False)
    out.print(str(folder), style="dim", highlight=False, soft_wrap=True)


def _index_efforts(values: list[str] | None, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    efforts = {}
    for value in values or []:
        name, equals, text = value.rpartition("=")
        given = numbers("--efforts", text)
        if given is None:
            raise KVBenchError(f"--efforts {value} is not a list of whole numbers separated by commas.")
        efforts.update(dict.fromkeys((name,) if equals else names, given))
    return efforts


def _index_options(values: list[str] | None, names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    options: dict[str, dict[str, str]] = {}
    for key, text in pairs(values).items():
        name, dot, field = key.partition(".")
        if not dot:
            raise KVBenchError(f"Option {key}={text} names no index: write {', '.join(names)} and a dot before it.")
        options.setdefault(name, {})[field] = text
    return options


def _count(rows: list[dict[str, Any]], name: str) -> str:
    number = len({row[name] for row in rows})
    return f"{number} {name}{'s' if number > 1 else ''}"


def _index_table(content: dict[str, Any]) -> Table:
    source, k = content["capture"], content["config"]["k"]
    title = f"{source['model']}, {source['context_length']} tokens, recall@{k}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("index", no_wrap=True)
    for column in ("effort", "recall", "95%", "scanned", "µs per\nquery", "build\ns", "insert\ns", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in content["summary"]:
        for place, point in enumerate(entry["curve"]):
            low, high = point["recall_ci95"] or (None, None)
            cells = [
                "–" if point["effort"] is None else str(point["effort"]), f"{point['recall']:.3f}",
                "–" if low is None else f"{low:.2f}–{high:.2f}", share(point["scanned"]),
                f"{point['us_per_query']:.0f}",
            ]  # fmt: skip
            of_index = [f"{entry['build_s']:.2f}", f"{entry['insert_s']:.3f}", mib(entry["bytes"])]
            table.add_row(entry["index"] if not place else "", *cells, *(["", "", ""] if place else of_index))
        table.add_section()
    return table


def _reached(entry: dict[str, Any]) -> str:
    scanned = entry["scanned_at_recall_95"]
    if scanned is None:
        return f"{entry['index']}: recall 0.95 not reached."
    first = entry["first_point_above"]
    how = "its lowest measured effort" if first else "interpolated between measured points"
    most = "≤ " if first and entry["curve"][0]["effort"] is not None else ""
    time = entry["us_per_query_at_recall_95"]
    return f"{entry['index']}: recall 0.95 at {most}{share(scanned)} scanned, {time:.0f} µs per query ({how})."


def _whole(entry: dict[str, Any], threads: int) -> str:
    text = (
        f"Recall {entry['recall_grown']:.3f} with half of the decoded keys inserted, parallel efficiency "
        f"{share(entry['parallel_efficiency'])} on {threads} threads"
    )
    lost = entry["unreached"]
    return f"{text}, {share(lost)} of the keys out of any search's reach." if lost else f"{text}."
