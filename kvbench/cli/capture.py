"""`kvbench capture`: a model's queries, keys and values over a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvbench.api.capture import captured
from kvbench.cli.common import (
    Device,
    Dtype,
    Json,
    Layers,
    Model,
    RopeScaling,
    Steps,
    app,
    interruptible,
    joined,
    mib,
    out,
)
from kvbench.contract.errors import check_output

SourceTextName = Annotated[str, typer.Option(help="Text file, or `default`: Python's documentation and library.")]
PrefillChunk = Annotated[int, typer.Option(help="Compute the prompt this many tokens at a time.")]
DecodeTokens = Annotated[int, typer.Option(help="Tokens of the context that are decoded one by one.")]
Decoding = Annotated[str, typer.Option(help="text: the text goes on token by token; greedy: the model's own tokens.")]
StoreDtype = Annotated[str | None, typer.Option(help="Number type of the stored vectors. [default: the model's]")]


@app.command("capture")
@interruptible
def capture_command(
    output: Annotated[Path, typer.Option(help="Folder of the capture; the same capture found there is reused.")],
    model: Model = "smollm2-135m",
    text: SourceTextName = "default",
    context_length: Annotated[int, typer.Option(help="Tokens of prompt and decoding together.")] = 4096,
    decode_tokens: DecodeTokens = 128,
    layers: Layers = None,
    decoding: Decoding = "text",
    rope_scaling: RopeScaling = None,
    prefill_chunk: PrefillChunk = 1024,
    store_dtype: StoreDtype = None,
    seed: Annotated[int, typer.Option(help="Where in the text the prompt starts; 0 is its beginning.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Store a model's queries, keys and values over a text, prompt and decoding apart.

    The same command goes on with a capture that was stopped.
    """
    check_output(output)
    with Steps() as steps:
        done = captured(
            model, text, context_length, joined(layers) or "all", output, decode_tokens=decode_tokens,
            decoding=decoding, rope_scaling=rope_scaling, prefill_chunk=prefill_chunk,
            store_dtype=store_dtype, seed=seed, device=device, dtype=dtype, progress=steps.step,
        )  # fmt: skip
    manifest = done.manifest
    if as_json:
        print(json.dumps({
            "schema": 1, "folder": str(done.path), "reused": done.reused,
            "manifest": manifest.model_dump(mode="json", by_alias=True),
        }, indent=2))  # fmt: skip
        return
    config = manifest.config
    size = sum(file.bytes for file in manifest.files)
    out.print(
        f"{config.model}: {len(config.layers)} layers, {manifest.heads} query and {manifest.kv_heads} key/value heads "
        f"of dimension {manifest.head_dim}, {manifest.prompt_tokens} prompt and {config.decode_tokens} decoded tokens "
        f"({config.decoding}, {len(set(manifest.decoded_ids))} different), {config.dtype}, {mib(size)} MiB"
        f"{'; it was there already' if done.reused else ''}.", highlight=False,
    )  # fmt: skip
    out.print(str(done.path), style="dim", highlight=False, soft_wrap=True)
