"""Records a capture: runs a model over a text and stores what its attention layers see."""

from __future__ import annotations

import hashlib
import json
import platform
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kvbench.capture.files import (
    DEFAULT_TEXT,
    DTYPES,
    SCHEMA,
    Capture,
    CaptureConfig,
    CapturedFile,
    Decoding,
    Manifest,
    load_capture,
    sha256_of,
    writing_to,
)
from kvbench.capture.passing import Partial, Progress, read_through
from kvbench.capture.probe import CaptureProbe
from kvbench.contract.errors import KVBenchError
from kvbench.engine.survey import survey
from kvbench.models import LoadedModel, check_context


@dataclass(frozen=True)
class SourceText:
    """A text to capture over: its name, the text and its SHA-256."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the whole text as UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(name: str) -> SourceText:
    """Read a UTF-8 text file, or, for `default`, Python's own documentation followed by its library's sources.

    The default is `pydoc_data.topics` and the modules of the standard library's top folder, in order of their names:
    real prose and code, at hand wherever Python is. Raises KVBenchError for a file that is missing or no text.
    """
    if name == DEFAULT_TEXT:
        parts = []
        try:
            from pydoc_data.topics import topics  # noqa: PLC0415 - some systems package Python without it

            parts = [topics[topic] for topic in sorted(topics)]
        except ImportError:
            pass
        folder = Path(sysconfig.get_paths()["stdlib"])
        parts += [file.read_text("utf-8", errors="replace") for file in sorted(folder.glob("*.py"))]
        return SourceText(f"documentation and library of Python {platform.python_version()}", "\n\n".join(parts))
    try:
        return SourceText(Path(name).name, Path(name).read_text("utf-8"))
    except OSError as error:
        raise KVBenchError(
            f"The text {name} cannot be read ({error.strerror or error}): give a text file, or `{DEFAULT_TEXT}`."
        ) from None
    except UnicodeDecodeError as error:
        raise KVBenchError(
            f"The text {name} is not UTF-8 (byte {error.start}): convert it, or give another file."
        ) from None


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """Read a list of layers such as `2,8,14`, or `all` of `count`; raises KVBenchError for anything else."""
    if text.strip() == "all":
        return tuple(range(count))
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise KVBenchError(f"The layers '{text}' are neither `all` nor numbers separated by commas.") from None
    if layers[0] < 0 or layers[-1] >= count:
        wrong = layers[0] if layers[0] < 0 else layers[-1]
        raise KVBenchError(f"There is no layer {wrong}: the model's {count} layers are 0 to {count - 1}.")
    return tuple(layers)


def _layers(text: str, loaded: LoadedModel) -> tuple[int, ...]:
    """The layers of a list that a capture can see; `all` are all of these."""
    config = loaded.model.config.get_text_config(decoder=True)
    chosen, found = parse_layers(text, int(config.num_hidden_layers)), survey(loaded.model)
    seen = sorted(found.layers)
    if not seen:
        why = found.refusal or f"{type(loaded.model).__name__} has no layer of full attention"
        raise KVBenchError(f"{why}, so nothing of it can be captured: choose another model.")
    if text.strip() == "all":
        return tuple(seen)
    if unseen := [layer for layer in chosen if layer not in found.layers]:
        raise KVBenchError(
            f"Layer {unseen[0]} of {loaded.name} has no keys of its own and full attention that a capture could see: "
            f"choose of {', '.join(map(str, seen))}, or `all` for all of these."
        )
    return chosen


def plan_capture(
    loaded: LoadedModel,
    text: SourceText,
    *,
    context_length: int,
    decode_tokens: int = 128,
    layers: str = "all",
    decoding: Decoding = "text",
    dtype: str | None = None,
    seed: int = 0,
    rope_scaling: Literal["yarn"] | None = None,
) -> CaptureConfig:
    """Complete a capture's configuration from a loaded model and check it before anything runs.

    The model reads `context_length` tokens, the last `decode_tokens` of them one by one. `seed` chooses where in the
    text the prompt starts (0: at its beginning). Raises KVBenchError for lengths, layers or dtypes that cannot be had.
    """
    if decode_tokens < 1 or context_length <= decode_tokens:
        raise KVBenchError(
            f"{decode_tokens} decoded tokens of a context of {context_length} leave no prompt or decode nothing: "
            "choose at least 1, and fewer than the context length."
        )
    check_context(loaded, context_length)
    store = dtype or str(loaded.dtype).removeprefix("torch.")
    if store not in DTYPES:
        raise KVBenchError(f"{store} is not a number type for a capture: choose {', '.join(DTYPES)}.")
    config = loaded.model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None)
    extended = isinstance(rope, dict) and rope.get("rope_type") == rope_scaling
    start = 0
    if seed:
        start = text.text.find("\n", random.Random(seed).randrange(len(text.text) // 2 + 1)) + 1
    return CaptureConfig(
        model=loaded.name, model_fingerprint=loaded.fingerprint,
        model_dtype=str(loaded.dtype).removeprefix("torch."), text=text.name, text_sha256=text.sha256,
        text_start=start, seed=seed, context_length=context_length, decode_tokens=decode_tokens, decoding=decoding,
        layers=_layers(layers, loaded), dtype=store,  # type: ignore[arg-type]
        rope_scaling=rope_scaling if extended else None,
        rope_parameters=json.loads(json.dumps(rope)) if isinstance(rope, dict) else {},
    )  # fmt: skip


def capture(
    config: CaptureConfig, loaded: LoadedModel, text: SourceText, output: Path, *, prefill_chunk: int = 1024,
    progress: Progress = lambda *_: None,
) -> Capture:  # fmt: skip
    """Run the model over the text and write the capture to the folder `output`, or reuse the same one found there.

    It is written beside `output` under another name and renamed when complete, so that a killed run leaves no half
    capture; what it had read lies there, and the same call goes on after it. `progress` is told how many tokens of how
    many are read. Raises KVBenchError where `output` holds something else, where another process captures to it, and
    where the text is too short.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        found = _existing(output)
        if found is None or found.manifest.config != config:
            what = "no capture" if found is None else f"another capture ({_difference(found.manifest.config, config)})"
            raise KVBenchError(f"{output} exists and holds {what}: move it away, or give another --output.")
        return Capture(found.path, found.manifest, reused=True)
    needed = config.prompt_tokens if config.decoding == "greedy" else config.context_length
    ids = _token_ids(loaded, text, config.text_start, needed)
    with writing_to(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    plan = {
        "config": config.model_dump(mode="json"),
        "prefill_chunk": prefill_chunk,
        "environment": _environment(loaded),
    }
    with Partial(output, plan) as partial:
        work = partial.folder
        probe = CaptureProbe(work, config.layers, config.dtype)
        decoded = read_through(loaded.model, ids, config, probe, partial, prefill_chunk, progress)
        probe.finish()
        partial.forget()
        manifest = Manifest(
            schema=SCHEMA, config=config, prompt_tokens=config.prompt_tokens, heads=probe.shape[0],
            kv_heads=probe.shape[1], head_dim=probe.shape[2], scaling=probe.scaling, prefill_chunk=prefill_chunk,
            decoded_ids=tuple(decoded), environment=_environment(loaded),
            files=tuple(
                CapturedFile(name=file.name, bytes=file.stat().st_size, sha256=sha256_of(file))
                for file in sorted(work.iterdir())
            ),
        )  # fmt: skip
        with writing_to(output):
            text_form = manifest.model_dump_json(indent=2, by_alias=True) + "\n"
            (work / "manifest.json").write_text(text_form, "utf-8")
            work.replace(output)
    return Capture(output, manifest)


def _token_ids(loaded: LoadedModel, text: SourceText, start: int, needed: int) -> list[int]:
    """The text's first `needed` token ids from character `start` on, tokenising no more of it than that takes."""
    rest = len(text.text) - start
    length = needed * 6
    while True:
        piece = text.text[start : start + length]
        ids: list[int] = loaded.tokenizer(piece, verbose=False)["input_ids"]
        if len(ids) >= needed + 8:  # the last tokens may change with what follows
            return ids[:needed]
        if length >= rest:
            if len(ids) >= needed:
                return ids[:needed]
            raise KVBenchError(
                f"The text '{text.name}' has {len(ids)} tokens from where the prompt starts, and {needed} are needed: "
                "give a longer text, --seed 0 or a shorter --context-length."
            )
        length *= 2


def _environment(loaded: LoadedModel) -> dict[str, Any]:
    from importlib.metadata import version  # noqa: PLC0415

    return {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in ("kvbench", "torch", "transformers", "safetensors")},
        "device": loaded.device.type,
        "threads": torch.get_num_threads(),
    }


def _existing(path: Path) -> Capture | None:
    try:
        return load_capture(path)
    except KVBenchError:
        if (path / "manifest.json").is_file():
            raise
        return None


def _difference(found: CaptureConfig, wanted: CaptureConfig) -> str:
    name = next(name for name in CaptureConfig.model_fields if getattr(found, name) != getattr(wanted, name))
    return f"{name} {getattr(found, name)}, not {getattr(wanted, name)}"
