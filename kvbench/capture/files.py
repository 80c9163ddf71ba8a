"""Real query and key vectors: runs a model over a text and stores what its attention layers see.

A capture is a folder: `manifest.json` and, for each layer, two safetensors files with `queries` [H, m, d], `keys` and
`values` [G, m, d] (H query heads, G key/value heads, d head dimension) after rotary embedding: one for the m tokens of
the prompt, one for the m tokens that were decoded one by one after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvbench.contract.errors import KVBenchError, unwritable
from kvbench.contract.reading import check_regular, parse_json, plain, read_bytes, reading

SCHEMA = 1
"""Version of a capture's `manifest.json`."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PARTS = ("prompt", "decode")
TENSORS = ("queries", "keys", "values")
DEFAULT_TEXT = "default"

Decoding = Literal["greedy", "text"]


class CapturedFile(BaseModel):
    """One file of a capture, in bytes, with its SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    bytes: int = Field(ge=0)
    sha256: str


class CaptureConfig(BaseModel):
    """What a capture's vectors depend on; two captures with the same configuration are interchangeable.

    `context_length` counts prompt and decoded tokens together; `layers` are places in the model. `text_start` is where
    the prompt starts in the text, in characters. `decoding`: `greedy`, or `text` for the text's own continuation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    model_fingerprint: str
    model_dtype: str
    text: str
    text_sha256: str
    text_start: int
    seed: int
    context_length: int = Field(ge=2)
    decode_tokens: int = Field(ge=1)
    decoding: Decoding
    layers: tuple[int, ...]
    dtype: Literal["float32", "float16", "bfloat16"]
    rope_scaling: Literal["yarn"] | None
    rope_parameters: dict[str, Any]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.context_length - self.decode_tokens

    @property
    def hash(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of the configuration and the schema version."""
        canonical = json.dumps({"schema": SCHEMA, **self.model_dump(mode="json")}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


class Manifest(BaseModel):
    """A capture's `manifest.json`: configuration, shapes, environment, the decoded tokens' ids and the files.

    `scaling` multiplies q·k before the softmax; captures that lack it are of models with 1/√d.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = Field(alias="schema")
    config: CaptureConfig
    prompt_tokens: int
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    scaling: float | None = Field(None, gt=0)
    prefill_chunk: int
    decoded_ids: tuple[int, ...]
    environment: dict[str, Any]
    files: tuple[CapturedFile, ...]


@dataclass(frozen=True)
class CapturedPart:
    """One layer's prompt or decoding part; each property reads its tensor, memory-mapped, when it is asked for."""

    file: Path
    shapes: dict[str, tuple[int, int, int]]
    dtype: torch.dtype

    @property
    def queries(self) -> Tensor:
        """Queries after rotary embedding [H, m, d]."""
        return self._read("queries")

    @property
    def keys(self) -> Tensor:
        """Keys after rotary embedding [G, m, d]."""
        return self._read("keys")

    @property
    def values(self) -> Tensor:
        """Values [G, m, d]."""
        return self._read("values")

    def _read(self, name: str) -> Tensor:
        with reading(lambda reason: str(broken(self.file, reason))):
            check_regular(self.file)
            with safe_open(str(self.file), framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != self.shapes[name] or tensor.dtype != self.dtype:
            raise broken(
                self.file, f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {self.dtype} {self.shapes[name]}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise broken(self.file, f"{name} hold NaN or infinite values")
        return tensor


@dataclass(frozen=True)
class CapturedLayer:
    """The vectors of one layer, `number` being its place in the model."""

    number: int
    prompt: CapturedPart
    decode: CapturedPart


@dataclass(frozen=True)
class Capture:
    """A capture on disk; `reused` tells that it was there before it was asked for."""

    path: Path
    manifest: Manifest
    reused: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """The captured layers, as places in the model."""
        return self.manifest.config.layers

    @property
    def scaling(self) -> float:
        """What multiplies q·k before the softmax."""
        return self.manifest.scaling or self.manifest.head_dim**-0.5

    def layer(self, number: int) -> CapturedLayer:
        """The vectors of layer `number`; raises KVBenchError where it was not captured."""
        if number not in self.layers:
            listed = ", ".join(map(str, self.layers))
            raise KVBenchError(f"{self.path} has no layer {number}: choose from {listed}, or capture it.")
        manifest = self.manifest
        tokens = {"prompt": manifest.prompt_tokens, "decode": manifest.config.decode_tokens}
        prompt, decode = (
            CapturedPart(
                self.path / file_name(number, part),
                {
                    name: (manifest.heads if name == "queries" else manifest.kv_heads, tokens[part], manifest.head_dim)
                    for name in TENSORS
                },
                DTYPES[manifest.config.dtype],
            )
            for part in PARTS
        )
        return CapturedLayer(number, prompt, decode)

    def verify(self) -> None:
        """Compare every file with its SHA-256; raises KVBenchError for the first that differs."""
        for file in self.manifest.files:
            if sha256_of(self.path / file.name) != file.sha256:
                raise broken(self.path / file.name, "its SHA-256 is not the manifest's")


def load_capture(path: str | Path) -> Capture:
    """Open a capture; its tensors are read, memory-mapped, when they are asked for.

    Raises KVBenchError for a folder that is no capture, of another schema version, or whose files are missing or cut.
    """
    folder = Path(path)
    file = folder / "manifest.json"
    with reading(
        lambda reason: f"{folder} is no capture ({file.name}: {reason}): give a folder that `kvbench capture` wrote."
    ):
        data = read_bytes(file)
    with reading(lambda reason: str(broken(file, f"it is not JSON that kvbench wrote: {reason}"))):
        content = parse_json(data)
    version = content.get("schema") if isinstance(content, dict) else None
    if version is None:
        raise KVBenchError(f"{folder} is no capture: its manifest.json has no schema version; give another folder.")
    if version != SCHEMA:
        raise KVBenchError(
            f"{folder} has schema version {plain(repr(version))}; this kvbench reads version {SCHEMA}: use a matching "
            "kvbench."
        )
    with reading(lambda reason: str(broken(file, reason))):
        manifest = Manifest.model_validate(content)
    config = manifest.config
    if {entry.name for entry in manifest.files} != {
        file_name(number, part) for number in config.layers for part in PARTS
    }:
        raise broken(file, "its files are not those of its layers")
    if manifest.prompt_tokens != config.prompt_tokens or manifest.heads % manifest.kv_heads:
        raise broken(file, "its numbers of tokens or heads do not fit together")
    for entry in manifest.files:
        part = folder / entry.name
        size = part.stat().st_size if part.is_file() else None
        if size != entry.bytes:
            raise broken(part, "it is missing" if size is None else f"it has {size} of {entry.bytes} bytes")
    return Capture(folder, manifest)


def file_name(number: int, part: str) -> str:
    """The file of a layer's part."""
    return f"layer-{number:03d}.{part}.safetensors"


def sha256_of(file: Path) -> str:
    """SHA-256 of a capture's file."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise broken(file, error.strerror or str(error)) from None


def broken(file: Path, reason: str) -> KVBenchError:
    """The error for a file that is not what a capture wrote."""
    return KVBenchError(f"{file} is not what `kvbench capture` wrote ({reason}): delete the folder and capture again.")


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn a disk's errors into sentences."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise KVBenchError(unwritable(path, error if isinstance(error, OSError) else str(error))) from None
