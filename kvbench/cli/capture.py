"""`kvbench capture`: a model's queries, keys and values over a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli.common import Device, Dtype, Json, Model, RopeScaling, app, err, mib, out
from kvbench.contract.errors import KVBenchError, check_output

if TYPE_CHECKING:
    from kvbench.capture.files import Capture

SourceTextName = Annotated[str, typer.Option(help="Text file, or `default`: Python's documentation and library.")]
PrefillChunk = Annotated[int, typer.Option(min=1, help="Compute the prompt this many tokens at a time.")]
DecodeTokens = Annotated[int, typer.Option(min=1, help="Tokens of the context that are decoded one by one.")]
Decoding = Annotated[str, typer.Option(help="text: the text goes on token by token; greedy: the model's own tokens.")]
StoreDtype = Annotated[str | None, typer.Option(help="Number type of the stored vectors. [default: the model's]")]


def captured(
    model: str, text: str, context_length: int, layers: str, output: Path | Callable[[str], Path], *,
    decode_tokens: int, decoding: str, rope_scaling: str | None, prefill_chunk: int, store_dtype: str | None,
    seed: int, device: str | None, dtype: str | None,
) -> Capture:  # fmt: skip
    """Make the capture that the options ask for, or find it in its folder (`output`, or of the capture's hash)."""
    if decoding not in ("greedy", "text"):
        raise KVBenchError(f"--decoding {decoding} is neither 'greedy' nor 'text'.")
    from kvbench.capture.record import capture, plan_capture, read_text  # noqa: PLC0415
    from kvbench.models import load_model  # noqa: PLC0415
    from kvbench.models.scaling import rope_scaling_named  # noqa: PLC0415

    scaling = rope_scaling_named(rope_scaling)
    source = read_text(text)
    loaded = load_model(
        model, device=device, dtype=dtype, context_length=context_length, rope_scaling=rope_scaling,
    )  # fmt: skip
    config = plan_capture(
        loaded, source, context_length=context_length, decode_tokens=decode_tokens, layers=layers,
        decoding=decoding, dtype=store_dtype, seed=seed,  # type: ignore[arg-type]
        rope_scaling=scaling and scaling.kind,  # type: ignore[arg-type]
    )  # fmt: skip
    folder = output if isinstance(output, Path) else output(config.hash)
    with err.status(f"Capturing {len(config.layers)} layers over {context_length} tokens"):
        return capture(config, loaded, source, folder, prefill_chunk=prefill_chunk)


@app.command("capture")
def capture_command(
    output: Annotated[Path, typer.Option(help="Folder of the capture; the same capture found there is reused.")],
    model: Model = "smollm2-135m",
    text: SourceTextName = "default",
    context_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and decoding together.")] = 4096,
    decode_tokens: DecodeTokens = 128,
    layers: Annotated[str, typer.Option(help="Layers separated by commas, or `all`.")] = "all",
    decoding: Decoding = "text",
    rope_scaling: RopeScaling = None,
    prefill_chunk: PrefillChunk = 1024,
    store_dtype: StoreDtype = None,
    seed: Annotated[int, typer.Option(help="Where in the text the prompt starts; 0 is its beginning.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Store a model's queries, keys and values over a text, prompt and decoding apart."""
    check_output(output)
    done = captured(
        model, text, context_length, layers, output, decode_tokens=decode_tokens, decoding=decoding,
        rope_scaling=rope_scaling, prefill_chunk=prefill_chunk, store_dtype=store_dtype, seed=seed, device=device,
        dtype=dtype,
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
