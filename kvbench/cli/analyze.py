"""`kvbench analyze`: one analysis of a model and text, a capture or finished runs, its table, CSV and figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kvbench.api.capture import captured
from kvbench.cli.capture import (
    DecodeTokens,
    Decoding,
    PrefillChunk,
    SourceTextName,
    StoreDtype,
)  # fmt: skip
from kvbench.cli.common import (
    Device,
    Dtype,
    Heads,
    Json,
    Layers,
    Model,
    RopeScaling,
    Steps,
    app,
    err,
    grouped,
    interruptible,
    joined,
    load_registry,
    numbers,
    out,
    pairs,
    paths,
)  # fmt: skip
from kvbench.contract.errors import KVBenchError, check_output


@app.command()
@interruptible
def analyze(
    name: Annotated[str, typer.Argument(help="Analysis; `kvbench analyses` lists them and their options.")],
    capture: Annotated[
        Path | None, typer.Option(help="Folder of a capture; without it and --run one is made first.")
    ] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a finished run, for its traces; several by commas, or the option again."),
    ] = None,
    benchmark: Annotated[
        list[Path] | None,
        typer.Option(help="File of tests/bench/gpu/decode.py, for `latency`; several by commas, or the option again."),
    ] = None,
    layers: Layers = None,
    heads: Heads = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Option of the analysis, name=value.")
    ] = None,
    model: Model = "smollm2-135m",
    text: SourceTextName = "default",
    context_length: Annotated[int, typer.Option(help="Tokens to capture, prompt and decoding together.")] = 4096,
    decode_tokens: DecodeTokens = 128,
    decoding: Decoding = "text",
    rope_scaling: RopeScaling = None,
    prefill_chunk: PrefillChunk = 1024,
    store_dtype: StoreDtype = None,
    seed: Annotated[int, typer.Option(help="Where in the text the prompt starts; 0 is its beginning.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    output: Annotated[Path, typer.Option(help="Folder for the table, the CSV, the figure and a capture.")] = Path(
        "kvbench-analysis"
    ),
    as_json: Json = False,
) -> None:
    """Analyse a model over a text, a capture, runs or benchmarks: a table, its CSV and its figure."""
    check_output(output)
    found = load_registry()
    run, benchmark = paths(run), paths(benchmark)
    given = grouped(pairs(option), "index_options")
    found.options("analysis", name, given)
    if capture is not None and run:
        raise KVBenchError("Both --capture and --run were given; an analysis has one source: give one of them.")
    if run and (layers or heads):
        raise KVBenchError(
            "--layers and --heads choose captured vectors; the table of --run lists all: leave them out."
        )
    from kvbench.analysis.studies import documents as studies  # noqa: PLC0415
    from kvbench.capture.files import load_capture  # noqa: PLC0415

    if benchmark or found.find("analysis", name).reads_times:
        if capture is not None:
            raise KVBenchError(f"Analysis '{name}' compares measured times: leave --capture out.")
        document = studies.analyse_times(name, benchmark, run, given)
    elif run:
        document = studies.analyse_runs(name, run, given)
    else:
        chosen, chosen_heads = numbers("--layers", layers), numbers("--heads", heads)
        if capture is not None:
            source = load_capture(capture)
        else:
            with Steps() as steps:
                source = captured(
                    model, text, context_length, joined(layers) or "all", lambda name: output / f"capture-{name}",
                    decode_tokens=decode_tokens, decoding=decoding, rope_scaling=rope_scaling,
                    prefill_chunk=prefill_chunk, store_dtype=store_dtype, seed=seed, device=device, dtype=dtype,
                    progress=steps.step,
                )  # fmt: skip
        with err.status("") as status:
            document = studies.analyse_capture(
                name, source, given, layers=chosen, heads=chosen_heads, progress=status.update
            )
    studies.write(document, output)
    if as_json:
        print(json.dumps({**document, "folder": str(output)}, indent=1))
        return
    out.print(_table(document, studies.cell))
    for note in document["partial"]:
        out.print(f"Partial: {note}.", style="yellow", highlight=False)
    rows = len(document["rows"])
    out.print(f"{rows} row{'s' * (rows != 1)} in {output / name}.csv; figure {output / name}.svg and .png", style="dim",
              highlight=False, soft_wrap=True)  # fmt: skip


def _table(document: dict[str, Any], cell: Any) -> Table:
    table = Table(title=f"{document['analysis']}: {document['source']['title']}", title_justify="left", box=None,
                  pad_edge=False, header_style="bold")  # fmt: skip
    columns = list(document["summary"][0])
    for column in columns:
        numeric = not isinstance(document["summary"][0][column], str)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left")
    for row in document["summary"]:
        table.add_row(*(cell(row.get(column)) for column in columns))
    return table
