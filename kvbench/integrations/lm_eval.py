"""The model `kvbench` of EleutherAI's lm-evaluation-harness: any of its tasks, with any KV-cache policy.

`kvbench lm-eval --model kvbench --model_args pretrained=smollm2-135m,policy=quest,budget=pyramid --tasks ...` runs the
harness's own command with this model registered; in Python, give an instance to `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.engine.attach import attach
from kvbench.engine.session import Session
from kvbench.models import load_model
from kvbench.plugins import registry

_log = logging.getLogger(__name__)


class PromptBudget(Budget):
    """A budget for prompts of any length: at least the policy's static set (`floor`), at most the prompt."""

    floor: int = 1

    def size(self, context: int, token_bytes: int) -> int:
        """Tokens per layer and head, on average, for a context of `context` tokens."""
        wanted = super().size(10**12, token_bytes) if self.ratio is None else super().size(context, token_bytes)
        return min(max(wanted, self.floor), context)


@register_model("kvbench")
class KVBenchLM(HFLM):
    """A model under a KV-cache policy.

    `pretrained` is a known name, a Hugging Face id or a local folder; `policy` and `budget` name plugins, whose options
    are further keywords (of the policy) and `budget_options`; the budget is `tokens`, a `ratio` of each
    prompt, or `bytes`. The first `dense_layers` layers attend to everything.

    A prompt that is shorter than the budget is kept whole, and one whose share would be smaller than the policy's
    static set keeps that.

    Generation: the policy takes over each prompt after its exact attention; the harness knows no border between context
    and question, so the question is always part of the prompt. Log-likelihoods: the request's context is the prompt,
    and its continuation goes through the policy token by token. Rolling log-likelihoods have no context: they are
    computed with exact attention for policies that keep everything, and refused for others.
    """

    OWN: ClassVar[tuple[str, ...]] = (
        "max_length", "max_batch_size", "add_bos_token", "prefix_token_id", "enable_thinking", "think_end_token",
        "chat_template_args", "truncation",
    )  # fmt: skip
    """Keywords that are the harness's own and mean what they mean for its model `hf`."""

    def __init__(
        self,
        pretrained: str = "smollm2-135m",
        policy: str = "full",
        budget: str = "uniform",
        tokens: int | str | None = None,
        ratio: float | str | None = None,
        bytes: int | str | None = None,
        budget_options: Mapping[str, Any] | None = None,
        device: str | None = None,
        dtype: str | None = None,
        dense_layers: int | str = 0,
        batch_size: int | str | None = 1,
        trust_remote_code: bool | None = None,
        **options: Any,
    ) -> None:
        if trust_remote_code:
            raise KVBenchError("kvbench runs no code that comes with a model: leave trust_remote_code out.")
        if not str(batch_size or 1).isdigit():
            raise KVBenchError(
                f"batch_size={batch_size} would be found with exact attention, whose memory is not the policy's: give "
                "a number."
            )
        self.dense_layers = int(dense_layers)
        harness = {key: options.pop(key) for key in self.OWN if key in options}
        found = registry()
        chosen = found.find("policy", policy)
        self.policy, self.policy_options = policy, found.options("policy", policy, options).model_dump(mode="json")
        static = sum(registry().make("policy", policy, self.policy_options).static_tokens(1_000_000))
        self.budget = (
            None
            if chosen.exact
            else _budget(budget, {"tokens": tokens, "ratio": ratio, "bytes": bytes}, budget_options or {}, static)
        )
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            # The harness's command asks for cuda:0 where the user names no device.
            _log.warning("PyTorch finds no GPU: %s runs on the CPU instead of %s.", pretrained, device)
            device = "cpu"
        loaded = load_model(pretrained, device=device, dtype=None if dtype == "auto" else dtype)
        self.fingerprint = loaded.fingerprint
        super().__init__(
            pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=int(batch_size or 1),
            max_length=harness.pop("max_length", None) or loaded.max_context, **harness,
        )  # fmt: skip
        self.pretrained = pretrained

    def _attach(self, prompt_tokens: int | None = None) -> Session:
        return attach(
            self.model,
            policy=self.policy,
            options=self.policy_options,
            budget=self.budget,
            prompt_tokens=prompt_tokens,
            dense_layers=self.dense_layers,
        )

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        with self._attach():
            answer: torch.Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
        return answer

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        answers = []
        for request, context, continuation in tqdm(requests, disable=disable_tqdm, desc="Log-likelihoods"):
            ids = (context + continuation)[-(self.max_length + 1) :]  # the last one is not read
            cut = len(context) + len(continuation) - len(ids)
            if cut:
                _log.warning("Context and continuation exceed %d tokens: cut %d on the left.", self.max_length, cut)
            answers.append(self._loglikelihood(ids, len(continuation)))
            self.cache_hook.add_partial("loglikelihood", request, answers[-1])
        return answers

    @torch.inference_mode()
    def _loglikelihood(self, ids: list[int], asked: int) -> tuple[float, bool]:
        """Log-likelihood of the last `asked` ids given those before, and whether each is the likeliest."""
        prompt = len(ids) - asked
        if prompt < 1:
            raise KVBenchError(f"A continuation of {asked} tokens leaves no context within {self.max_length} tokens.")
        tokens = torch.tensor([ids], device=self.device)
        read = len(ids) - 1 if self.budget is None else prompt  # exact attention is the same on either side
        with self._attach(read) as session:
            logits = self.model(tokens[:, :read], use_cache=True, logits_to_keep=read - prompt + 1).logits
            if read < len(ids) - 1:
                rest = self.model(tokens[:, prompt:-1], past_key_values=session.cache, use_cache=True).logits
                logits = torch.cat([logits, rest], dim=1)
        logs = logits[0].float().log_softmax(-1)
        wanted = tokens[0, prompt:]
        return float(logs.gather(1, wanted[:, None]).sum()), bool((logs.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Sum of each text's log-likelihoods, by exact attention; raises KVBenchError for policies that drop tokens."""
        if self.budget is not None:
            raise KVBenchError(
                f"Rolling log-likelihoods (perplexity) have no prompt that policy '{self.policy}' could govern, and "
                "exact attention would not be its result: use policy=full, or a task of generation or multiple choice."
            )
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """What the harness stores of the model: weights, policy and budget."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_fingerprint": self.fingerprint,
            "policy": self.policy,
            "policy_options": self.policy_options,
            "budget": None if self.budget is None else self.budget.model_dump(mode="json"),
        }


def _budget(allocator: str, sizes: Mapping[str, Any], options: Mapping[str, Any], floor: int) -> PromptBudget:
    given = {key: value for key, value in sizes.items() if value is not None} or {"ratio": 0.1}
    words = ", ".join(f"{key}={value}" for key, value in given.items())
    if len(given) > 1:
        raise KVBenchError(f"A budget has one size, and {words} were given: give one of them.")
    chosen = registry().options("budget", allocator, options)
    try:
        return PromptBudget(
            **given, allocator=allocator, options=chosen.model_dump(mode="json"), floor=max(floor, 1)
        )  # fmt: skip
    except ValueError:
        raise KVBenchError(
            f"{words} is no budget: expected a positive number of tokens or bytes, or a ratio up to 1."
        ) from None
