"""The exact pass over a prompt, done once and taken over by any number of policies."""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.probe import Probe
from kvbench.engine.cached_layer import PolicyCacheLayer
from kvbench.engine.prompt import Prefill, PrefilledLayers
from kvbench.engine.session import Session


class _Recorder(KVCachePolicy):
    """Exact attention over the prompt that notes the vectors of each layer."""

    name = "prefill"
    summary = "Exact attention that notes what each layer made of the prompt."
    exact = True
    takes_budget = False

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.query_window = window
        self.layers = PrefilledLayers()
        self.seconds = 0.0
        """What noting took."""

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Note the vectors."""
        began = time.perf_counter()
        self.layers.note(layer, queries)
        self.seconds += time.perf_counter() - began


class PromptRecorder(Probe):
    """Notes what each layer made of the prompt while a policy generates, so that others need no pass of their own.

    Nothing it keeps takes memory, and what it takes is in `seconds`, so the policy's own figures stay true. Only where
    the session keeps the queries that are wanted anyway: see `can_record`.
    """

    name = "prompt"
    summary = "What each layer made of the prompt, for other policies."

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.layers = PrefilledLayers()
        self.seconds = 0.0
        self.prompt: Prefill | None = None
        self._window = window

    def query_window(self, number: int) -> int | None:
        """As many queries as the policies need that take over the prompt."""
        return self._window

    def prefill(self, layer: Layer, queries: Tensor, keys: Tensor, values: Tensor) -> Generator[None, Any, Any]:
        """Note the vectors before the policy evicts any."""
        began = time.perf_counter()
        seen = keys.new_empty(layer.rows, layer.heads, 0, layer.head_dim)
        if layer.prompt_queries is not None:
            seen = layer.prompt_queries
            seen = seen if self._window is None else seen[:, :, max(seen.shape[2] - self._window, 0) :]
        self.layers.note(layer, seen)
        self.seconds += time.perf_counter() - began
        return (yield)

    def finish(self, session: Session, ids: Tensor, border: int, logits: Tensor, seconds: float) -> None:
        """Note the prompt `ids` [B, n], its `logits` [B, V] and the `seconds` of its pass, and leave the session."""
        session.drop(self)
        others = copy.deepcopy(_ungoverned(session))
        self.prompt = Prefill(ids, None, border, self.layers, others, logits, seconds)

    def result(self) -> dict[str, float | None]:
        """Nothing: it measures nothing."""
        return {}


def can_record(session: Session, window: int | None, chunk: int | None) -> bool:
    """Whether recording a pass of this session takes no memory: its last `window` queries need not be kept for it.

    Layers that the policy leaves exact are not shown to probes, so a pass with any is not recorded.
    """
    if session.dense or session.own_prompt:
        return False
    own = session.query_window(0)
    enough = own is None or (window is not None and window <= own)
    return enough or not (session.defers or chunk)


def _ungoverned(session: Session) -> dict[int, Any]:
    assert session.cache is not None
    layers = enumerate(session.cache.layers)
    return {number: layer for number, layer in layers if not isinstance(layer, PolicyCacheLayer)}


@torch.inference_mode()
def prefill(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    query_window: int | None = None,
    chunk: int | None = None,
    context: int | None = None,
    before: Prefill | None = None,
) -> Prefill:
    """Run the model over prompts of token ids, left-padded to the longest, `chunk` tokens at a time.

    `query_window` is how many of each layer's last queries the policies need (None for all). The first `context` tokens
    of a single prompt (all by default) are a pass of their own; where `before`, the prefill of another prompt, has
    the same ones, it is taken from there: what comes out does not depend on whether it was. KVBenchError for prompts
    that cannot be read.
    """
    check_prompts(model, prompts, [0] * len(prompts))
    check_parts(chunk, None, 0)
    ids, mask = pad(prompts, input_device(model))
    whole = ids.shape[1]
    border = whole if mask is not None or len(ids) > 1 or not context else min(context, whole)
    window = query_window if query_window is None else query_window + whole - border
    common = border if before is not None and _is_reusable(before, ids, border, window) else 0
    if before is not None and common == whole:
        return replace(before, reused=whole)
    recorder = _Recorder(window)
    with Session(model, recorder, None, prompt_tokens=whole) as session:
        start = session.now()
        if before is not None and common:
            session.resume(before, common)
        else:
            logits = forward(session, ids[:, :border], mask, 0, chunk)
        if border < whole:
            logits = forward(session, ids, mask, border, chunk)
        seconds = session.now() - start - recorder.seconds
        others = _ungoverned(session)
    return Prefill(ids, mask, border, recorder.layers, others, logits, seconds, common)


def reusable(before: Prefill, prompt: Sequence[int], context: int | None, query_window: int | None) -> bool:
    """Whether `prefill` would take the first `context` tokens of a prompt from `before`."""
    ids = torch.tensor([list(prompt)], device=before.ids.device)
    border = min(context or ids.shape[1], ids.shape[1])
    window = query_window if query_window is None else query_window + ids.shape[1] - border
    return _is_reusable(before, ids, border, window)


def _is_reusable(before: Prefill, ids: Tensor, border: int, window: int | None) -> bool:
    if before.border != border or len(before.ids) > 1 or not torch.equal(before.ids[:, :border], ids[:, :border]):
        return False
    if before.others and border < before.ids.shape[1]:
        return False  # a sliding window's cache cannot go back
    beyond = before.ids.shape[1] - border
    wanted = border if window is None else min(window - (ids.shape[1] - border), border)
    return not before.layers or before.layers.queries - beyond >= wanted


def forward(session: Session, ids: Tensor, mask: Tensor | None, start: int, chunk: int | None = None) -> Tensor:
    """Run the tokens `ids` [B, n] from `start` on through the attached model; the last token's logits [B, V].

    The tokens before `start` are in the session's cache. `mask` [B, n] is 0 where a row is padded on its left.
    """
    past = session.cache if start else None
    extra: dict[str, Any] = {}
    whole = ids.shape[1]
    shares = start > 0 and not session.policy.exact and session.survey.shares
    size = 1 if shares else chunk or whole  # layers that share keys see the tokens after the prompt one by one
    # The first chunk shows the session all padding.
    opening = size if mask is None or start else max(size, whole - int(mask.sum(1).min()) + 1)
    borders = [start, *range(min(start + opening, whole), whole, size), whole]
    for first, stop in pairwise(borders):
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            extra = {"attention_mask": mask[:, :stop], "position_ids": positions[:, first:stop]}
        out = session.model(ids[:, first:stop], past_key_values=past, use_cache=True, logits_to_keep=1, **extra)
        past = getattr(out, "past_key_values", None)
        if past is None:
            raise KVBenchError(
                f"{type(session.model).__name__} keeps its state elsewhere than in a key-value cache, so there is none "
                "to govern or to measure: choose a model with attention."
            )
    logits: Tensor = out.logits[:, -1]
    return logits


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], more: Sequence[int]) -> None:
    """Raise KVBenchError unless the model can read these prompts of token ids and as many `more` tokens after each."""
    if not prompts:
        raise KVBenchError("There are no prompts to read: give at least one.")
    if len(prompts) != len(more):
        raise KVBenchError(
            f"There are {len(prompts)} prompts and {len(more)} max_new_tokens: give one for each prompt."
        )
    config = model.config.get_text_config(decoder=True)
    window, known = getattr(config, "max_position_embeddings", None), model.get_input_embeddings().num_embeddings
    for number, (prompt, limit) in enumerate(zip(prompts, more, strict=True)):
        if not prompt:
            raise KVBenchError(f"The prompt {number} is empty: give at least one token id.")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < known:
                raise KVBenchError(f"The prompt {number} has the token id {token}: the model has 0 to {known - 1}.")
        if limit < 0:
            raise KVBenchError(f"max_new_tokens is {limit}: give 0 or more.")
        if window is not None and len(prompt) + limit > window:
            raise KVBenchError(
                f"{type(model).__name__} reads at most {window} tokens, and the prompt {number} and {limit} new ones "
                f"are {len(prompt) + limit}: give a shorter prompt, ask for fewer, or load the model with rope scaling."
            )


def check_parts(chunk: int | None, prompt_tokens: int | None, most: int) -> None:
    """Raise KVBenchError for a chunk of no tokens, and for a prompt that does not end within `most` tokens."""
    if chunk is not None and chunk < 1:
        raise KVBenchError(f"prefill_chunk is {chunk}: give at least 1 token, or None for the whole prompt at once.")
    if prompt_tokens is not None and not 1 <= prompt_tokens <= most:
        raise KVBenchError(f"prompt_tokens is {prompt_tokens}: give a number from 1 to {most}.")


def input_device(model: Any) -> torch.device:
    """Where token ids for the model go: the host where accelerate keeps weights elsewhere between calls."""
    return torch.device("cpu") if model.device.type == "meta" else torch.device(model.device)


def pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, n] of prompts padded on the left to the longest, and their mask [B, n] where any is padded."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return ids, None
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
