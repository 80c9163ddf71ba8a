"""Greedy generation through an attached policy, timed: time to first token, index construction, each further token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from kvbench.session import Session


@dataclass(frozen=True)
class Generation:
    """What was generated and what it took; times in seconds, `bytes` by tier after the last token."""

    tokens: list[int]
    prefill_s: float
    index_s: float
    step_s: list[float]
    bytes: dict[str, int]


@torch.inference_mode()
def generate(
    session: Session,
    input_ids: Sequence[int],
    *,
    prompt_tokens: int,
    max_new_tokens: int,
    stop: Collection[int] = (),
    prefill_chunk: int | None = None,
) -> Generation:
    """Generate up to `max_new_tokens` tokens greedily after `input_ids`; a token in `stop` ends it and is left out.

    The first `prompt_tokens` ids are the prompt, which the policy takes over once its exact attention is done; the
    others pass through the policy one by one (query-agnostic mode). `prefill_chunk` tokens of the prompt are computed
    at a time. Time to first token is `prefill_s` + `index_s`; `index_s` is the time inside the policy's `prefill` and
    `after_prompt`. A policy without a cache computes the whole context anew for every token.
    """
    model = session.model
    device = model.device
    ids = torch.tensor([list(input_ids)], device=device)
    if not session.policy.cached:
        return _generate_uncached(session, ids, max_new_tokens, stop)
    if session.policy.exact:
        prompt_tokens = len(input_ids)  # exact attention is the same on either side of the border
    session.prompt_tokens = prompt_tokens
    chunk = prefill_chunk or prompt_tokens
    starts = [*range(0, prompt_tokens, chunk), *([prompt_tokens] if prompt_tokens < len(input_ids) else [])]
    past = None
    began = session.now()
    for start, stop_at in zip(starts, [*starts[1:], len(input_ids)], strict=True):
        out = model(ids[:, start:stop_at], past_key_values=past, use_cache=True, logits_to_keep=1)
        past = out.past_key_values
    token = int(out.logits[0, -1].argmax())
    first_s = session.now() - began
    tokens: list[int] = []
    step_s: list[float] = []
    while token not in stop:
        tokens.append(token)
        if len(tokens) == max_new_tokens:
            break
        began = session.now()
        out = model(torch.tensor([[token]], device=device), past_key_values=past, use_cache=True, logits_to_keep=1)
        token = int(out.logits[0, -1].argmax())
        step_s.append(session.now() - began)
    assert session.cache is not None
    return Generation(tokens, first_s - session.cache.index_s, session.cache.index_s, step_s, session.cache.bytes())


def _generate_uncached(session: Session, ids: torch.Tensor, max_new_tokens: int, stop: Collection[int]) -> Generation:
    tokens: list[int] = []
    seconds: list[float] = []
    while len(tokens) < max_new_tokens:
        began = session.now()
        token = int(session.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())
        seconds.append(session.now() - began)
        if token in stop:
            break
        tokens.append(token)
        ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
    return Generation(tokens, seconds[0], 0.0, seconds[1:], {"resident": 0, "offloaded": 0, "index": 0})
