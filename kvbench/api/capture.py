"""Captures that other calls are made of: found where they lie, or made first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.api.given import one_of, whole

if TYPE_CHECKING:
    from kvbench.capture.files import Capture

Progress = Callable[[int, int, str], None]


def captured(
    model: str, text: str, context_length: int, layers: str, output: Path | Callable[[str], Path], *,
    decode_tokens: int, decoding: str, rope_scaling: str | None, prefill_chunk: int, store_dtype: str | None,
    seed: int, device: str | None, dtype: str | None, progress: Progress = lambda *_: None,
) -> Capture:  # fmt: skip
    """Make the capture that the options ask for, or find it in its folder (`output`, or of the capture's hash)."""
    one_of("--decoding", decoding, ("greedy", "text"))
    whole("--context-length", context_length, 2)
    whole("--decode-tokens", decode_tokens, 1)
    whole("--prefill-chunk", prefill_chunk, 1)
    from kvbench.capture.record import capture, plan_capture, read_text  # noqa: PLC0415
    from kvbench.models import load_model  # noqa: PLC0415
    from kvbench.models.scaling import rope_scaling_named  # noqa: PLC0415

    scaling = rope_scaling_named(rope_scaling)
    source = read_text(text)
    loaded = load_model(
        model, device=device, dtype=dtype, context_length=context_length,
        rope_scaling=rope_scaling,
    )  # fmt: skip
    config = plan_capture(
        loaded, source, context_length=context_length, decode_tokens=decode_tokens, layers=layers,
        decoding=decoding, dtype=store_dtype, seed=seed,  # type: ignore[arg-type]
        rope_scaling=scaling and scaling.kind,  # type: ignore[arg-type]
    )  # fmt: skip
    folder = output if isinstance(output, Path) else output(config.hash)
    return capture(config, loaded, source, folder, prefill_chunk=prefill_chunk, progress=progress)
