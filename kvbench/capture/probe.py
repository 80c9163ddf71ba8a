"""The probe that stores what attention layers see."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvbench.capture.files import DTYPES, TENSORS, file_name, writing_to
from kvbench.contract.budget import LayerBudget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.probe import Probe


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

    def decoded(self, start: int) -> dict[int, Tensor]:
        """The chosen layers' queries [1, H, m, d] of the decoded tokens from the `start`-th on."""
        return {number: torch.cat(parts["queries"][start:], dim=2) for number, parts in self._decoded.items()}

    def take(self, queries: dict[int, Tensor], keys: dict[int, Tensor], values: dict[int, Tensor]) -> None:
        """Take over decoded tokens of an earlier process, [1, H or G, m, d] by layer."""
        for number, parts in self._decoded.items():
            for name, given in (("queries", queries), ("keys", keys), ("values", values)):
                parts[name] += torch.split(given[number], 1, dim=2)

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
