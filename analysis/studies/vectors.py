"""Captured vectors as the analyses take them: one layer's queries and keys, and exact attention over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvbench.analysis import measures
from kvbench.capture.files import Capture


@dataclass(frozen=True)
class LayerVectors:
    """One layer's queries [H, m, d] and keys [G, m, d] of the prompt and of decoding, as captured.

    The methods give one query head's, in float64.
    """

    number: int
    scaling: float
    prompt_queries: Tensor
    prompt_keys: Tensor
    decode_queries: Tensor
    decode_keys: Tensor

    def _group(self, head: int) -> int:
        return head // (self.prompt_queries.shape[0] // self.prompt_keys.shape[0])

    def queries_of_prompt(self, head: int) -> measures.Float:
        """Queries [m, d] of the prompt."""
        return _float64(self.prompt_queries[head])

    def queries_of_decoding(self, head: int) -> measures.Float:
        """Queries [t, d] of the tokens decoded after it."""
        return _float64(self.decode_queries[head])

    def keys_of_prompt(self, head: int) -> measures.Float:
        """Keys [m, d] that the head attends to."""
        return _float64(self.prompt_keys[self._group(head)])

    def weights(self, head: int, steps: measures.Int) -> measures.Float:
        """Attention weights [steps, n] of decoding steps over the prompt and the tokens decoded by then, theirs too."""
        prompt = self.keys_of_prompt(head)
        keys = np.concatenate([prompt, _float64(self.decode_keys[self._group(head)])])
        queries = self.queries_of_decoding(head)[steps]
        return measures.attention_weights(queries, keys, scaling=self.scaling, visible=len(prompt) + steps + 1)


def _float64(tensor: Tensor) -> measures.Float:
    array: measures.Float = tensor.double().numpy()
    return array


def layers_of(capture: Capture, numbers: Sequence[int]) -> Iterator[LayerVectors]:
    """The chosen layers, read one at a time."""
    for number in numbers:
        layer = capture.layer(number)
        yield LayerVectors(
            number, capture.scaling, layer.prompt.queries, layer.prompt.keys, layer.decode.queries, layer.decode.keys
        )


def spread(count: int, wanted: int) -> measures.Int:
    """Up to `wanted` of `count` decoding steps, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(np.int64))
