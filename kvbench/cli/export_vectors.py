"""`kvbench export-vectors`: a capture's queries and keys for other tools of vector search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvbench.api.given import whole
from kvbench.cli.common import (
    CapturedLayers,
    Heads,
    Json,
    Steps,
    app,
    interruptible,
    listed,
    mib,
    numbers,
    out,
)
from kvbench.contract.errors import check_output


@app.command("export-vectors")
@interruptible
def export_vectors(
    capture: Annotated[Path, typer.Argument(help="Folder of a capture.")],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="hdf5 (ann-benchmarks' layout), fvecs or npy; several by commas, or the option again. [default: hdf5]",
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Nearest keys of each query in the ground truth.")] = 100,
    layers: CapturedLayers = None,
    heads: Heads = None,
    sinks: Annotated[int, typer.Option(help="First tokens left out of the keys.")] = 4,
    window: Annotated[int, typer.Option(help="Last tokens of the prompt left out of the keys.")] = 64,
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("kvbench-vectors"),
    as_json: Json = False,
) -> None:
    """Write captured queries and keys, and their exact nearest neighbours by inner product, a file for each head."""
    check_output(output)
    whole("-k", k, 1)
    chosen, chosen_heads = numbers("--layers", layers), numbers("--heads", heads)
    from kvbench.capture.export import export  # noqa: PLC0415  torch takes seconds to import
    from kvbench.capture.files import load_capture  # noqa: PLC0415

    with Steps() as steps:
        written = export(
            load_capture(capture), output, listed(formats or "hdf5"), k=k, layers=chosen, heads=chosen_heads,
            sinks=sinks, window=window, progress=steps.step,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"schema": 1, "folder": str(output), "files": [file.name for file in written]}, indent=2))
        return
    size = sum(file.stat().st_size for file in written)
    out.print(f"{len(written)} files, {mib(size)} MiB.", highlight=False)
    out.print(str(output), style="dim", highlight=False, soft_wrap=True)
