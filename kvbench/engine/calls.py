"""What a forward call brings: where its prompt ends, how its rows are padded, and the cache that came with it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import QuantizedLayer

from kvbench.contract.errors import KVBenchError
from kvbench.engine.cache import PolicyCache
from kvbench.engine.governor import Governor

_PREFILL = getattr(GenerationMixin, "_prefill", None)


def prompt_end(announced: int | None) -> int | None:
    """Where the prompt that begins now ends, None for the end of its first call; `announced` is `prompt_tokens`."""
    whole = _prompt_of_generate()
    if whole is not None and announced is not None and announced > whole:
        raise KVBenchError(
            f"prompt_tokens announced a prompt of {announced} tokens, and the one that generate was given has {whole}: "
            f"leave prompt_tokens out, or give at most {whole}."
        )
    return whole if announced is None else announced


def _prompt_of_generate() -> int | None:
    """Tokens of the prompt that transformers' `generate` is reading now; None where no `generate` reads one.

    With `prefill_chunk_size` the prompt comes in calls that do not say how many follow, so this looks for generate's
    own frame among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not getattr(_PREFILL, "__code__", None):
        frame = frame.f_back
    if frame is None:
        return None
    whole: int = frame.f_locals["input_ids"].shape[1]
    return whole or None  # a prompt of embeddings comes in one call


def named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of the model, by name."""
    return {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}


def check_replaceable(cache: Any) -> None:
    """Raise KVBenchError for a cache that a policy's cannot take the place of without a change of what comes out."""
    if cache.get_seq_length() > 0:
        raise KVBenchError("The cache passed to the model was filled without the policy: start from the prompt.")
    if any(isinstance(layer, QuantizedLayer) for layer in cache.layers):
        raise KVBenchError(
            "generate was asked for a cache that quantises, and a policy brings its own: leave cache_implementation "
            "and past_key_values out, or attach policy 'kivi', which quantises."
        )


def check_continued(cache: PolicyCache, session: Governor, rows: int | None) -> None:
    """Raise KVBenchError where a call of `rows` rows in this session cannot go on with a policy's cache."""
    if cache.session is not session:
        raise KVBenchError(
            "The cache passed to the model belongs to another `with` block of kvbench.attach: start from the prompt."
        )
    if cache.failed or cache.open:
        raise KVBenchError(
            "An earlier call with the cache passed to the model ended in an error, halfway through the layers: start "
            "from the prompt."
        )
    if rows is not None and cache.rows is not None and rows != cache.rows:
        raise KVBenchError(
            f"The cache passed to the model holds {cache.rows} rows, and the call brings {rows}: continue all of them, "
            "or start from the prompt."
        )


def plain_mask(mask: Any, tokens: int) -> Any:
    """The mask [B, n] of ones and zeros that `generate` made 4-dimensional, since it expected to fill a static cache.

    The last token sees all tokens but the padding, so its row of a full-attention layer's mask has it.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask
    last = mask[:, 0, -1, :tokens]
    return (last if last.dtype == torch.bool else last == 0).long()


def left_padding(mask: Any) -> Tensor | None:
    """Padding tokens at the start of each row [B], from a mask [B, n] of ones and zeros."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise KVBenchError(
            f"An attention mask of shape {shape} says more than which tokens are padding, which only policy 'full' can "
            "follow: give a mask of ones and zeros for each row and token, padded on the left."
        )
    padding = (mask == 0).sum(-1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    if not bool(((columns >= padding[:, None]) == (mask != 0)).all()):
        raise KVBenchError("The attention mask pads elsewhere than on the left: set tokenizer.padding_side='left'.")
    return padding.cpu()
