"""Records a capture: runs a model over a text and stores what its attention layers see."""

from __future__ import annotations

import hashlib
import json
import platform
import random
import shutil
import sysconfig
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvbench.capture.files import (
    DEFAULT_TEXT,
    DTYPES,
    SCHEMA,
    TENSORS,
    Capture,
    CaptureConfig,
    CapturedFile,
    Decoding,
    Manifest,
    file_name,
    load_capture,
    sha256_of,
    writing_to,
)
from kvbench.contract.budget import LayerBudget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.probe import Probe
from kvbench.engine.attach import attach
from kvbench.models import LoadedModel, check_context


class CaptureProbe(Probe):
    """Stores the queries, keys and values of chosen layers, for the one sequence of a batch of one.

    The prompt's part is written to `folder` as soon as a layer's prompt is done, so that only the decoding part is
    held in memory until `finish`. `layers` are places in the model.
    """

    name = "capture"
    summary = "Stores post-rotary queries, keys and values of chosen layers, prompt and decoding apart."

    def __init__(self, folder: Path, layers: Sequence[int], dtype: str = "float32") -> None:
        super().__init__()
        self.folder, self.layers, self.dtype = folder, frozenset(layers), dtype
        self.shape = (0, 0, 0)
        """Query heads, key/value heads and head dimension."""
        self.scaling: float | None = None
        self._prompts: dict[int, int] = {}
        self._decoded: dict[int, dict[str, list[Tensor]]] = {}

    def query_window(self, number: int) -> int | None:
        """All of the prompt's queries in the chosen layers, none in the others."""
        return None if number in self.layers else 0

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> Generator[None, Any, Any]:
        """Write the prompt's part of a chosen layer."""
        if layer.number in self.layers:
            if layer.rows != 1 or layer.number in self._prompts:
                raise KVBenchError("A capture takes one sequence, in a batch of one: run the others one by one.")
            assert layer.prompt_queries is not None
            self.shape, self.scaling = (layer.heads, layer.kv_heads, layer.head_dim), layer.scaling
            self._prompts[layer.number] = layer.tokens
            self._decoded[layer.number] = {name: [] for name in TENSORS}
            self._write(layer.number, "prompt", {"queries": layer.prompt_queries, "keys": keys, "values": values})
        return (yield)

    def insert(self, layer: Layer, keys: Tensor, values: Tensor) -> Generator[None, Any, Any]:
        """Keep the new tokens' keys and values."""
        if layer.number in self.layers:
            self._decoded[layer.number]["keys"].append(keys.cpu())
            self._decoded[layer.number]["values"].append(values.cpu())
        return (yield)

    def select(self, layer: Layer, queries: Tensor, budget: LayerBudget) -> Generator[None, Any, Any]:
        """Keep the decoding queries."""
        if layer.number in self.layers:
            self._decoded[layer.number]["queries"].append(queries.cpu())
        return (yield)

    def finish(self) -> None:
        """Write the decoding parts; raises KVBenchError where a chosen layer was never seen."""
        for number in sorted(self.layers):
            if number not in self._decoded:
                seen = "none" if not self._decoded else ", ".join(map(str, sorted(self._decoded)))
                raise KVBenchError(
                    f"Layer {number} has no full attention that a capture could see (captured: {seen}): choose layers "
                    "of full attention."
                )
            parts = {name: torch.cat(tensors, dim=2) for name, tensors in self._decoded[number].items()}
            self._write(number, "decode", parts)

    def result(self) -> dict[str, Any]:
        """Tokens captured per layer."""
        return {"layers": {str(number): tokens for number, tokens in sorted(self._prompts.items())}}

    def _write(self, number: int, part: str, tensors: dict[str, Tensor]) -> None:
        stored = {}
        for name, tensor in tensors.items():
            plain = tensor[0].detach().to("cpu", DTYPES[self.dtype]).contiguous()
            if not bool(torch.isfinite(plain).all()):
                raise KVBenchError(
                    f"The {name} of layer {number} are not finite as {self.dtype}: store them as bfloat16 or float32, "
                    "or load the model in float32."
                )
            stored[name] = plain
        with writing_to(self.folder):
            save_file(stored, str(self.folder / file_name(number, part)))


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
        layers=parse_layers(layers, int(config.num_hidden_layers)), dtype=store,  # type: ignore[arg-type]
        rope_scaling=rope_scaling if extended else None,
        rope_parameters=json.loads(json.dumps(rope)) if isinstance(rope, dict) else {},
    )  # fmt: skip


def capture(
    config: CaptureConfig, loaded: LoadedModel, text: SourceText, output: Path, *, prefill_chunk: int = 1024
) -> Capture:
    """Run the model over the text and write the capture to the folder `output`, or reuse the same one found there.

    It is written beside `output` under a temporary name and renamed when complete, so that a killed run leaves no
    half capture. Raises KVBenchError where `output` holds something else, and where the text is too short.
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
        work = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        probe = CaptureProbe(work, config.layers, config.dtype)
        decoded = _decode(loaded, ids, config, probe, prefill_chunk)
        probe.finish()
        heads, kv_heads, head_dim = probe.shape
        manifest = Manifest(
            schema=SCHEMA, config=config, prompt_tokens=config.prompt_tokens, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, scaling=probe.scaling, prefill_chunk=prefill_chunk, decoded_ids=tuple(decoded),
            environment=_environment(loaded),
            files=tuple(
                CapturedFile(name=file.name, bytes=file.stat().st_size, sha256=sha256_of(file))
                for file in sorted(work.iterdir())
            ),
        )  # fmt: skip
        with writing_to(output):
            text_form = manifest.model_dump_json(indent=2, by_alias=True) + "\n"
            (work / "manifest.json").write_text(text_form, "utf-8")
            work.chmod(0o755)
            work.replace(output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
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


@torch.inference_mode()
def _decode(
    loaded: LoadedModel, ids: list[int], config: CaptureConfig, probe: CaptureProbe, prefill_chunk: int
) -> list[int]:
    """Run prompt and decoding through the probe; return the ids of the tokens that were decoded."""
    prompt, model = config.prompt_tokens, loaded.model
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = [ends] if isinstance(ends, int) else list(ends or ())
    tokens = torch.tensor([ids], device=loaded.device)
    decoded: list[int] = []
    with attach(model, policy="full", probes=[probe], prompt_tokens=prompt):
        past = None
        for start in range(0, prompt, prefill_chunk):
            piece = tokens[:, start : min(start + prefill_chunk, prompt)]
            out = model(piece, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
        for step in range(config.decode_tokens):
            if config.decoding == "text":
                token = ids[prompt + step]
            else:
                logits = out.logits[0, -1].clone()
                if stops:
                    logits[stops] = -torch.inf  # an answer's end would leave nothing to decode
                token = int(logits.argmax())
            decoded.append(token)
            out = model(
                torch.tensor([[token]], device=loaded.device), past_key_values=past, use_cache=True, logits_to_keep=1
            )
    return decoded


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
