"""Decoding through an attached policy, greedily or along given tokens, timed: prompt, index construction, each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationMixin

from kvbench.contract.errors import KVBenchError
from kvbench.engine.fixed import FixedDecoder, Mode
from kvbench.engine.prefill import PromptRecorder, check_parts, check_prompts, forward, input_device, pad
from kvbench.engine.prompt import Prefill
from kvbench.engine.session import Session

Decoding = Literal["auto", "graph", "fixed", "eager"]
"""How steps run: captured as a CUDA graph; in fixed shapes, uncaptured; hook by hook.

`auto` takes the graph on a GPU wherever policy and model allow it, and hooks everywhere else.
"""


@dataclass(frozen=True)
class Generation:
    """What was generated and what it took; times in seconds, `bytes` by tier after the last token.

    Of a batch, every row has the times of the whole batch up to its own last token, and its share of the bytes.
    """

    tokens: list[int]
    prefill_s: float
    index_s: float
    step_s: list[float]
    bytes: dict[str, int]
    mode: Mode = "eager"
    mode_reason: str = ""
    """Why the steps ran hook by hook where a CUDA graph was wanted."""
    device_step_s: list[float] = field(default_factory=list)
    """Each step by events on the GPU; empty where steps ran hook by hook or on a CPU."""
    capture_s: float = 0.0
    """From the prompt to the first step: the tensors of the fixed steps, their warm-up and the capture."""
    reads: dict[str, int] = field(default_factory=dict)
    """Fewest bytes that the median step reads, by `weights`, `device` and `host`; empty for steps hook by hook."""
    answer_bytes: dict[str, float] = field(default_factory=dict)
    """`peak` and `mean` over the steps of the bytes held in all tiers and the index; empty without steps."""
    held_tokens: list[float] = field(default_factory=list)
    """With `Budget.compress_every`: tokens held per layer and head, on average, after each step."""
    parts_s: list[dict[str, float]] = field(default_factory=list)
    """Parts of each step that the host takes part in (`FixedDecoder.parts`); empty for others."""
    device_bytes: dict[str, int] = field(default_factory=dict)
    """The `resident` bytes by device, of a model that lies on several; else empty."""
    hot_hit_rate: float | None = None
    """The share of the tokens chosen from the host that a hot set on the device had; None without such a set."""


@dataclass(frozen=True)
class Forced(Generation):
    """What given tokens made the model predict: `logits` [m, V]; `tokens` are the most likely ones."""

    logits: Tensor = field(kw_only=True)


def generate(
    session: Session,
    input_ids: Sequence[int],
    *,
    prompt_tokens: int | None = None,
    max_new_tokens: int,
    stop: Collection[int] = (),
    prefill_chunk: int | None = None,
    prefilled: Prefill | None = None,
    decoding: Decoding = "auto",
) -> Generation:
    """Generate up to `max_new_tokens` tokens greedily after `input_ids`; a token in `stop` ends it and is left out.

    With 0 of them the prompt is read and timed and nothing follows. KVBenchError, before anything is computed, for an
    empty prompt, numbers that do not fit, and a prompt and answer that are longer than the model can read.

    The first `prompt_tokens` ids (all by default) are the prompt, which the policy takes over once its exact attention
    is done; the others pass through the policy one by one (query-agnostic mode). `prefill_chunk` tokens of the prompt
    are computed at a time; `prefilled` is the prompt where it was computed before. Time to first token is `prefill_s` +
    `index_s`; `index_s` is the time inside the policy's `prefill` and `after_prompt`. A policy without a cache computes
    the whole context anew for every token. `decoding` says how steps run, see `Decoding`.
    """
    (result,) = generate_batch(
        session, [input_ids], prompt_tokens=prompt_tokens, max_new_tokens=[max_new_tokens], stop=stop,
        prefill_chunk=prefill_chunk, prefilled=prefilled, decoding=decoding,
    )  # fmt: skip
    return result


@torch.inference_mode()
def generate_batch(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    prompt_tokens: int | None = None,
    max_new_tokens: Sequence[int],
    stop: Collection[int] = (),
    prefill_chunk: int | None = None,
    prefilled: Prefill | None = None,
    border: int | None = None,
    recorder: PromptRecorder | None = None,
    begun: bool = False,
    decoding: Decoding = "auto",
) -> list[Generation]:
    """Generate after several prompts at once, each up to its own number of tokens; see `generate`.

    `prompt_tokens` is for a single prompt, and so are `border`, the first tokens that are a pass of their own, as in
    `prefill`, and `recorder`, one of the session's probes, which notes the prompt for others; its time is left out.
    With `begun` the session's cache has the prompts' first tokens already (`Session.load`): the others are read and
    timed, as tokens that follow a prompt.
    Rows that ended go on unseen until the last one ends.
    """
    check_prompts(session.model, prompts, max_new_tokens)
    check_parts(prefill_chunk, prompt_tokens, len(prompts[0]))
    if prompt_tokens is not None and len(prompts) > 1:
        raise KVBenchError("prompt_tokens is for a single prompt: only that can end before its question.")
    assert (border, recorder) == (None, None) or len(prompts) == 1, "only a single prompt can be recorded"
    if not session.policy.cached:
        pairs = zip(prompts, max_new_tokens, strict=True)
        reason = _hooks_because(session, decoding, "it keeps no cache")
        return [_generate_uncached(session, prompt, limit, stop, reason) for prompt, limit in pairs]
    ids, mask = pad(prompts, input_device(session.model))
    ahead = ids[:, ids.shape[1] if prompt_tokens is None else prompt_tokens :]
    with session.followed_by(ahead):
        logits, prefill_s = _prompt(
            session, ids, mask, prompt_tokens, prefill_chunk, prefilled, border, recorder, begun
        )
    assert session.cache is not None
    found = logits.argmax(-1)
    tokens: list[list[int]] = [[] for _ in prompts]
    step_s: list[list[float]] = [[] for _ in prompts]
    going = {row for row, limit in enumerate(max_new_tokens) if limit}
    held_bytes: list[int] = []
    held_tokens: list[float] = []
    context = ids
    began = session.now()
    decoder = _decoder(session, decoding, found, max(max_new_tokens) - 1)
    capture_s = session.now() - began
    while going:
        for row, token in enumerate(found.tolist()):
            if row in going and token not in stop:
                tokens[row].append(token)
            if token in stop or len(tokens[row]) == max_new_tokens[row]:
                going.discard(row)
        if not going:
            break
        if isinstance(decoder, FixedDecoder):
            decoder.tokens.copy_(found[:, None])
            began = session.now()
            decoder.step()
            found = decoder.tokens[:, 0]
            seconds = session.now() - began
            for row in going:
                step_s[row].append(seconds)
            count = decoder.held_tokens()
            held_tokens += [count] if count is not None and session.every else []
            continue
        context = torch.cat([context, found[:, None].to(context.device)], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        began = session.now()
        inputs = step_inputs(session.model, context, mask, session.cache)
        with session.prompt_of(context.shape[1]):  # for a model that drops its cache
            out = session.model(**inputs)
        found = out.logits[:, -1].argmax(-1)
        seconds = session.now() - began
        for row in going:
            step_s[row].append(seconds)
        held_bytes.append(sum(session.cache.bytes().values()))
        if session.every:
            stores = session.cache.stores()
            held_tokens.append(sum(store.static_tokens for store in stores) / len(stores))
    whole = decoder.bytes() if isinstance(decoder, FixedDecoder) else session.cache.bytes()
    held = {tier: size // len(prompts) for tier, size in whole.items()}
    by_device = {place: size // len(prompts) for place, size in session.cache.device_bytes().items()}
    about: dict[str, Any] = {"mode_reason": decoder}
    device_s: list[float] = []
    parts_s: list[dict[str, float]] = []
    if isinstance(decoder, FixedDecoder):
        halfway = sum(map(len, prompts)) // len(prompts) + max(map(len, step_s)) // 2
        device_s, parts_s = decoder.device_s(), decoder.parts
        by_device = {}
        about = {"mode": decoder.mode, "capture_s": capture_s, "reads": decoder.reads(halfway)}
        held_bytes = [sum(whole.values())]  # memory for all steps is there from the first on
        about["hot_hit_rate"] = decoder.hot_hit_rate()
    index_s = session.cache.index_s - (recorder.seconds if recorder is not None else 0.0)
    if held_bytes:
        peak, mean = max(held_bytes), sum(held_bytes) / len(held_bytes)
        about["answer_bytes"] = {"peak": peak / len(prompts), "mean": mean / len(prompts)}
    results = []
    for mine, steps in zip(tokens, step_s, strict=True):
        taken = len(steps)
        own = about | {
            "device_bytes": by_device,
            "device_step_s": device_s[:taken],
            "parts_s": parts_s[:taken],
            "held_tokens": held_tokens[:taken],
        }
        results.append(Generation(mine, prefill_s, index_s, steps, held, **own))
    return results


def step_inputs(model: Any, ids: Tensor, mask: Tensor | None, past: Any) -> dict[str, Any]:
    """What `model.generate` would call the model with for the last of the tokens `ids` [B, n].

    `mask` [B, n] is 0 where a row is padded. A model may drop its cache, `past`, and want to see its context anew
    (Phi3, where it turns to its rotary embedding for long contexts).
    """
    plain = {"past_key_values": past, "use_cache": True, "logits_to_keep": 1}
    if type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        extra = {} if mask is None else {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        return {"input_ids": ids[:, -1:], **plain, **extra}
    given = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **plain, **given)
    return prepared


def _decoder(session: Session, decoding: Decoding, tokens: Tensor, new_tokens: int) -> FixedDecoder | str:
    """The decoder for steps of fixed shapes, or why steps run hook by hook."""
    on_gpu = session.model.device.type == "cuda"
    if decoding == "eager" or (decoding == "auto" and not on_gpu) or new_tokens < 1:
        return ""
    if decoding == "graph" and not on_gpu:
        raise KVBenchError(
            f"A CUDA graph needs a GPU, and the model is on {session.model.device}: use another decoding."
        )
    found = session.fixed(tokens, new_tokens, graph=on_gpu and decoding != "fixed")
    if isinstance(found, str) and decoding != "auto":
        raise KVBenchError(
            f"Policy '{session.policy.name}' cannot decode in fixed steps here: {found}; use decoding 'auto' or "
            "'eager'."
        )
    return found


def _hooks_because(session: Session, decoding: Decoding, reason: str) -> str:
    """The reason, where it is one: on a GPU, for `auto`. KVBenchError where other steps were asked for."""
    if decoding in ("graph", "fixed"):
        raise KVBenchError(
            f"Policy '{session.policy.name}' cannot decode in fixed steps here: {reason}; use decoding 'auto' or "
            "'eager'."
        )
    return reason if decoding == "auto" and session.model.device.type == "cuda" else ""


def _prompt(
    session: Session, ids: Tensor, mask: Tensor | None, prompt_tokens: int | None, chunk: int | None,
    prefilled: Prefill | None, border: int | None, recorder: PromptRecorder | None, begun: bool,
) -> tuple[Tensor, float]:  # fmt: skip
    """Let the policy take over the prompt and the question follow; the last logits [B, V] and the prefill's seconds."""
    whole = ids.shape[1]
    tokens = whole if prompt_tokens is None or session.policy.exact else prompt_tokens
    earlier = 0.0
    began = session.now()
    if begun:
        assert session.cache is not None and prefilled is None
        tokens, logits = session.cache.get_seq_length(), ids.new_empty(0)
        assert tokens < whole, "a token is left to be read"
    elif prefilled is None:
        # exact attention is the same on either side of the border, so `full` needs none
        first = min(border or tokens, tokens)
        prompt, prompt_mask = ids[:, :tokens], None if mask is None else mask[:, :tokens]
        with session.prompt_of(tokens):
            logits = forward(session, prompt[:, :first], prompt_mask, 0, chunk)
            if first < tokens:
                logits = forward(session, prompt, prompt_mask, first, chunk)
        assert session.cache is not None
        earlier = -session.cache.index_s
        if recorder is not None:
            earlier += session.now() - began
            recorder.finish(session, prompt, first, logits, earlier)
            began = session.now()
    else:
        tokens = prefilled.ids.shape[1]
        session.resume(prefilled)
        began, logits, earlier = session.now(), prefilled.logits, prefilled.seconds
    if tokens < whole:
        logits = forward(session, ids, mask, tokens)
    return logits, session.now() - began + earlier


def _generate_uncached(
    session: Session, prompt: Sequence[int], max_new_tokens: int, stop: Collection[int], reason: str
) -> Generation:
    ids = torch.tensor([list(prompt)], device=input_device(session.model))
    tokens: list[int] = []
    seconds: list[float] = []
    while len(tokens) < max_new_tokens or not seconds:
        began = session.now()
        token = int(session.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())
        seconds.append(session.now() - began)
        if token in stop or not max_new_tokens:
            break
        tokens.append(token)
        ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
    held = {"resident": 0, "offloaded": 0, "index": 0}
    return Generation(tokens, seconds[0], 0.0, seconds[1:], held, mode_reason=reason)


@torch.inference_mode()
def force(
    session: Session, input_ids: Sequence[int], *, prompt_tokens: int, prefill_chunk: int | None = None
) -> Forced:
    """Take given tokens through the policy after a prompt of `prompt_tokens`, one by one, and keep what they predict.

    m = len(input_ids) − prompt_tokens − 1 positions: every token after the prompt but the last, which has no successor.
    """
    following = torch.tensor([list(input_ids[prompt_tokens:])], device=input_device(session.model))
    with session.prompt_of(prompt_tokens), session.followed_by(following):
        logits, first_s, step_s = _forced(
            session.model,
            input_ids,
            prompt_tokens,
            prefill_chunk,
            session.now,
            session.prompt_of,
            cached=session.policy.cached,
        )
    index_s, held = 0.0, {"resident": 0, "offloaded": 0, "index": 0}
    if session.cache is not None:
        index_s, held = session.cache.index_s, session.cache.bytes()
    reason = _hooks_because(session, "auto", "given tokens go through the hooks")
    return Forced(
        logits.argmax(-1).tolist(), first_s - index_s, index_s, step_s, held, mode_reason=reason, logits=logits
    )  # fmt: skip


@torch.inference_mode()
def exact_logits(
    model: Any, input_ids: Sequence[int], *, prompt_tokens: int, prefill_chunk: int | None = None
) -> Tensor:
    """The logits [m, V] of `force` with the model's own attention and transformers' own cache, no policy attached.

    In the same calls, so that policy `full` differs in nothing, not even by rounding.
    """
    return _forced(
        model, input_ids, prompt_tokens, prefill_chunk, time.perf_counter, lambda tokens: nullcontext(), cached=True
    )[0]


def _forced(
    model: Any, input_ids: Sequence[int], prompt_tokens: int, prefill_chunk: int | None, now: Callable[[], float],
    prompt_of: Callable[[int], AbstractContextManager[None]], *, cached: bool,
) -> tuple[Tensor, float, list[float]]:  # fmt: skip
    check_prompts(model, [input_ids], [0])
    if len(input_ids) < 3:
        raise KVBenchError(f"{len(input_ids)} token ids are too few: a prompt, a forced token and its successor are 3.")
    check_parts(prefill_chunk, prompt_tokens, len(input_ids) - 2)
    ids = torch.tensor([list(input_ids)], device=input_device(model))
    past, chunk, began = None, prefill_chunk or prompt_tokens, now()
    if cached:
        for start in range(0, prompt_tokens, chunk):
            stop = min(start + chunk, prompt_tokens)
            past = model(ids[:, start:stop], past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
    else:
        model(ids[:, :prompt_tokens], use_cache=False, logits_to_keep=1)
    first_s = now() - began
    logits, step_s = [], []
    for place in range(prompt_tokens, ids.shape[1] - 1):
        began = now()
        if cached:
            with prompt_of(place + 1):  # for a model that drops its cache
                out = model(**step_inputs(model, ids[:, : place + 1], None, past))
            past = out.past_key_values
        else:
            out = model(ids[:, : place + 1], use_cache=False, logits_to_keep=1)
        logits.append(out.logits[0, -1])
        step_s.append(now() - began)
    return torch.stack(logits), first_s, step_s
