"""`kvbench fit`: what policies need that is fitted once on a user's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbench.cli.capture import SourceTextName
from kvbench.cli.common import Device, Dtype, Json, Model, Steps, app, interruptible, load_registry, out
from kvbench.contract.errors import KVBenchError

fit = typer.Typer(help="Fit what a policy needs on a model, once.", no_args_is_help=True)
app.add_typer(fit, name="fit")


@fit.callback()
def _fit() -> None:
    pass


@fit.command("kvzap")
@interruptible
def kvzap_command(
    output: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    model: Model = "smollm2-135m",
    text: SourceTextName = "default",
    kind: Annotated[str, typer.Option(help="linear, or mlp: two layers.")] = "linear",
    samples: Annotated[int, typer.Option(min=2, help="Pieces of the text that are read and replayed.")] = 16,
    length: Annotated[int, typer.Option(min=16, help="Tokens of a piece.")] = 1024,
    seed: Annotated[int, typer.Option(help="Where in the text the pieces begin.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Fit the surrogate of policy `kvzap`: it predicts KVzip's scores from hidden states."""
    if kind not in ("linear", "mlp"):
        raise KVBenchError(f"--kind {kind} is no surrogate: choose linear or mlp.")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise KVBenchError(f"The surrogate cannot be written to {output}: name a file in a folder that exists.")
    load_registry()
    from kvbench.capture.record import read_text  # noqa: PLC0415  torch takes seconds to import
    from kvbench.fitting.kvzap import fit as fitted  # noqa: PLC0415
    from kvbench.fitting.kvzap import told  # noqa: PLC0415
    from kvbench.models import load_model  # noqa: PLC0415

    source = read_text(text)
    loaded = load_model(model, device=device, dtype=dtype)
    with Steps() as steps:

        def tell(what: str, done: int, of: int) -> None:
            steps.step(done, of, what)

        found = fitted(loaded, source, kind=kind, samples=samples, length=length, seed=seed, progress=tell)  # type: ignore[arg-type]
    found.surrogate.save(output)
    if as_json:
        facts: dict[str, Any] = {
            "schema": 1, "output": str(output), "model": loaded.name, "kind": kind, "tokens": found.tokens,
            "held_out_tokens": found.held_out, "explained_variance": found.explained,
        }  # fmt: skip
        print(json.dumps(facts, indent=2))
        return
    out.print(f"{output}: {told(found)}.", highlight=False, soft_wrap=True)
