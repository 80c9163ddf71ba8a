"""`kvbench index`: vector indexes on captured queries and keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvbench.api.index import execute
from kvbench.cli.capture import DecodeTokens, Decoding, PrefillChunk, SourceTextName, StoreDtype
from kvbench.cli.common import (
    CapturedLayers,
    Device,
    Dtype,
    Heads,
    Json,
    Model,
    RopeScaling,
    Steps,
    app,
    interruptible,
    joined,
    listed,
    numbers,
    out,
    pairs,
)
from kvbench.contract.errors import KVBenchError, check_output


@app.command()
@interruptible
def index(
    names: Annotated[
        list[str],
        typer.Option("--indexes", help="Index; several by commas, or the option again; `kvbench indexes` lists them."),
    ],
    capture: Annotated[Path | None, typer.Option(help="Folder of a capture; without it one is made first.")] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="HDF5 file in ann-benchmarks' layout, by inner product, instead of a capture.")
    ] = None,
    learn: Annotated[
        int, typer.Option(help="With --dataset: so many of its first test queries are learnt from, not searched.")
    ] = 0,
    k: Annotated[int, typer.Option("-k", help="k of recall@k.")] = 100,
    layers: CapturedLayers = None,
    heads: Heads = None,
    efforts: Annotated[
        list[str] | None,
        typer.Option(help="Values of the search parameter: 32,64,128 for all indexes, or index=1,2,4 for one."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Option of an index, index.option=value.")
    ] = None,
    sinks: Annotated[int, typer.Option(help="First tokens left out of the index.")] = 4,
    window: Annotated[int, typer.Option(help="Last tokens of the prompt left out of the index.")] = 64,
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
    output: Annotated[Path, typer.Option(help="Folder for results and captures.")] = Path("kvbench-index"),
    as_json: Json = False,
) -> None:
    """Compare vector indexes on real queries and keys: recall, scanned keys, time, build and insertion time, bytes.

    The same command goes on with a benchmark that was stopped.
    """
    check_output(output)
    with Steps() as steps:
        found = execute(
            names, steps, capture=capture, dataset=dataset, learn=learn, k=k, layers=joined(layers),
            heads=joined(heads),
            efforts=_index_efforts(efforts, listed(names)), options=_index_options(option, listed(names)),
            sinks=sinks, window=window, model=model, text=text, context_length=context_length,
            decode_tokens=decode_tokens, decoding=decoding, rope_scaling=rope_scaling, prefill_chunk=prefill_chunk,
            store_dtype=store_dtype, seed=seed, device=device, dtype=dtype, output=output,
        )  # fmt: skip
    if as_json:
        print(json.dumps(found.document(), indent=1))
        return
    out.print(found.table())
    for place, note in enumerate(found.notes()):
        out.print(note, highlight=False, style="" if place else "dim")
    out.print(str(found.folder), style="dim", highlight=False, soft_wrap=True)


def _index_efforts(values: list[str] | None, names: list[str]) -> dict[str, tuple[int, ...]]:
    efforts = {}
    for value in values or []:
        name, equals, text = value.rpartition("=")
        given = numbers("--efforts", text)
        if given is None:
            raise KVBenchError(f"--efforts {value} is not a list of whole numbers separated by commas.")
        efforts.update(dict.fromkeys((name,) if equals else names, given))
    return efforts


def _index_options(values: list[str] | None, names: list[str]) -> dict[str, dict[str, str]]:
    options: dict[str, dict[str, str]] = {}
    for key, text in pairs(values).items():
        name, dot, field = key.partition(".")
        if not dot:
            raise KVBenchError(f"Option {key}={text} names no index: write {', '.join(names)} and a dot before it.")
        options.setdefault(name, {})[field] = text
    return options
