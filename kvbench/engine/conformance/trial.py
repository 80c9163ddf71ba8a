"""A model on trial: tokens for it, and what it gives for them through transformers' own `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from kvbench.contract.errors import KVBenchError, NoRoomError, one_line
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.probe import Probe
from kvbench.engine.conformance.report import Check
from kvbench.engine.conformance.watch import distance
from kvbench.engine.session import Session
from kvbench.engine.survey import survey
from kvbench.plugins import registry

CHUNK, PADDING, STEPS = 8, 3, 9
"""Tokens of a prompt's first chunk, of padding in the second row, and steps after the prompt."""
_SPECIAL = ("pad", "bos", "eos")
Ends = tuple[int, ...]
"""Where forward calls end, in tokens after the prompt; 0 is the prompt's own call."""


@dataclass
class Trial:
    """A model, its tokenizer, and what was found out of it: whether it takes padding and how far rounding may go."""

    model: Any
    name: str
    tokenizer: Any
    padding: bool = True
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        """Note where the model lies."""
        weight = next(self.model.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def session(self, policy: KVCachePolicy, *probes: Probe) -> Session:
        """The model with a policy that needs no budget."""
        return Session(self.model, policy, None, probes)

    def tokens(self, count: int) -> tuple[Tensor, Tensor]:
        """Token ids [2, count] and their mask, the second row padded on its left."""
        ids = self._draw(count, seed=1)
        mask = torch.ones_like(ids)
        mask[1, :PADDING] = 0
        return ids, mask

    @cached_property
    def answer(self) -> Tensor:
        """Token ids [2, STEPS] that follow a prompt."""
        return self._draw(STEPS, seed=2)

    def _draw(self, count: int, seed: int) -> Tensor:
        """Token ids [2, count] of ordinary tokens: special ones lie at either end of a vocabulary, or are named."""
        config, generation = self.model.config.get_text_config(decoder=True), self.model.generation_config
        named = [getattr(part, f"{name}_token_id", None) for part in (config, generation) for name in _SPECIAL]
        special = {id for value in named for id in (value if isinstance(value, list) else [value])}
        words = self.model.get_input_embeddings().num_embeddings
        usable = [id for id in range(3, max(words // 2, 16)) if id not in special]
        places = torch.randint(len(usable), (2, count), generator=torch.Generator().manual_seed(seed))
        return torch.tensor(usable)[places].to(self.device)

    @cached_property
    def _singly(self) -> bool:
        """Whether tokens after the prompt must come one by one: where layers share keys."""
        try:
            return survey(self.model).shares
        except KVBenchError:
            return False

    @torch.no_grad()
    def logits(
        self, ids: Tensor, mask: Tensor | None, ends: Ends, *, chunked: bool = False, past: Any = None,
        cached: bool = True, hidden: list[tuple[Tensor, ...]] | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [calls, B, V] after the last token of each call, along given tokens.

        All is transformers' own `generate`, so that each architecture prepares its own inputs; ends that follow one
        another are its steps. Hidden states, the embeddings' and every layer's, are added to `hidden`.
        """
        whole = torch.cat([ids, self.answer], dim=1)
        kept = torch.cat([torch.ones_like(ids) if mask is None else mask, torch.ones_like(self.answer)], dim=1)
        every = tuple(range(ends[0], ends[-1] + 1)) if self._singly else ends
        found: dict[int, Tensor] = {}
        for run in _runs(every):
            stop = ids.shape[1] + run[0]
            made = self.model.generate(
                whole[:, :stop], attention_mask=kept[:, :stop], past_key_values=past, use_cache=cached,
                max_new_tokens=len(run), do_sample=False, num_beams=1, output_logits=True,
                return_dict_in_generate=True, pad_token_id=int(whole[0, 0]), output_hidden_states=hidden is not None,
                prefill_chunk_size=CHUNK if chunked and run[0] == 0 else None,
                logits_processor=LogitsProcessorList([_Along(whole)]),
            )  # fmt: skip
            found.update(zip(run, (logits.float() for logits in made.logits), strict=True))
            if hidden is not None:
                hidden.extend(made.hidden_states)
            past = made.past_key_values if cached else None
        return torch.stack([found[end] for end in ends])

    def compare(
        self, name: str, logits: Tensor, plain: Tensor, ends: Ends, tolerance: float | None = None, where: str = ""
    ) -> Check:
        """Compare logits [calls, B, V] with plain transformers', within rounding where `tolerance` is None."""
        tolerance = self.tolerance if tolerance is None else tolerance
        if torch.equal(logits, plain):
            return Check(name, "passed", "equal bit for bit", 0.0, tolerance)
        errors = [distance(centred(mine), centred(theirs)) for mine, theirs in zip(logits, plain, strict=True)]
        largest = max(errors)
        if largest <= tolerance and tolerance > 0:
            return Check(name, "passed", f"within {largest:.2g}; rounding allows {tolerance:.2g}", largest, tolerance)
        call = next(call for call, error in enumerate(errors) if not error <= tolerance)
        place = f"step {ends[call]}" if ends[call] else "the end of the prompt"
        allowed = f"rounding allows {tolerance:.2g}" if tolerance else "expected equality bit for bit"
        detail = f"logits differ from plain transformers' first at {place}, by {errors[call]:.2g} of them{where}"
        return Check(name, "failed", f"{detail} ({allowed})", largest, tolerance)


class _Along(LogitsProcessor):
    """Lets `generate` go along given tokens [B, n]."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] that leave the token that comes next."""
        place = input_ids.shape[1]
        if place == self.tokens.shape[1]:
            return scores
        return torch.full_like(scores, -torch.inf).scatter_(1, self.tokens[:, place : place + 1], 0.0)


def _runs(ends: Ends) -> list[list[int]]:
    """Ends in runs of which each follows the one before by a single token."""
    runs = [[ends[0]]]
    for before, end in pairwise(ends):
        if end == before + 1:
            runs[-1].append(end)
        else:
            runs.append([end])
    return runs


def full() -> KVCachePolicy:
    """Policy `full`."""
    made: KVCachePolicy = registry().make("policy", "full")
    return made


def centred(logits: Tensor) -> Tensor:
    """Logits [..., V] in float64, their mean taken off."""
    return logits.double() - logits.double().mean(-1, keepdim=True)


def clause(error: Exception) -> str:
    """An error as a clause; a lack of memory or disk says nothing of the model and is raised."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | NoRoomError):
        raise error
    text = one_line(error, 500).rstrip(".")
    return text if isinstance(error, KVBenchError) else f"{type(error).__name__}: {text}"
