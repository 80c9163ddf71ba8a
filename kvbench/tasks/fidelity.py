"""Fidelity to exact attention on real text, which separates policies whatever the model can answer."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

import kvbench.contract.extension
from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import reading
from kvbench.contract.task import ForcedTask, LogitScores, TokenExample
from kvbench.tasks.texts import Text, essays

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 32
"""Positions whose distributions are computed at a time, in float64."""


class Fidelity(ForcedTask):
    """How far a policy's next-token distributions are from exact attention's, on real text, token by token.

    Per position p(exact) and q(policy) over the vocabulary: the divergence KL(p‖q) in nats, whether both have the same
    most likely token, and how much the true token's negative log-likelihood grows; the perplexity ratio is e to
    the mean of that. Examples are disjoint windows of the text. Policy `full` must give 0, 100% and 1 exactly.
    """

    name = "fidelity"
    summary = "Next-token KL divergence, top-1 agreement and perplexity against exact attention, on real text"
    reference = "Kullback and Leibler 1951 (divergence); Jelinek et al. 1977 (perplexity)"
    metrics: ClassVar[dict[str, str]] = {
        "kl": "KL divergence, nats",
        "top1_agreement": "top-1 agreement",
        "perplexity_ratio": "perplexity ratio",
    }
    main = "top1_agreement"

    class Options(kvbench.contract.extension.Options):
        """The text, and how much of each window is scored."""

        text: str = Field("", description="A UTF-8 text file. [default: the essays, or Python's documentation]")
        scored: int = Field(128, ge=1, description="Positions scored at the end of each window.")

    def data(self) -> dict[str, str]:
        """Name the text and its hash."""
        text = self._text()
        return {"text": text.name, "text_sha256": text.sha256}

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[TokenExample]:
        """Yield disjoint windows of the text, each of `context_length` tokens, in an order that the seed draws."""
        scored, text = self.options.scored, self._text()
        prompt_tokens = context_length - scored - 1
        if prompt_tokens < scored:
            raise KVBenchError(
                f"A context of {context_length} tokens is too small for fidelity over {scored} positions: ask for at "
                f"least {2 * scored + 1} tokens, or for fewer positions (--task-option scored={context_length // 4})."
            )
        start, ids = _tokens(tokenizer, text)
        size = context_length - len(start)
        windows = list(range(len(ids) // size))
        if count > len(windows):
            raise KVBenchError(
                f"The text ({text.name}) has {len(windows)} disjoint windows of {context_length} tokens, fewer than "
                f"the {count} examples asked for: ask for fewer, for a shorter context, or give a longer text "
                "(--task-option text=FILE)."
            )
        random.Random(f"{seed} {self.name}").shuffle(windows)
        for window in windows[:count]:
            yield TokenExample(
                id=f"{self.name}/{context_length}/{window}",
                input_ids=(*start, *ids[window * size : (window + 1) * size]),
                prompt_tokens=prompt_tokens,
                info={"text": text.name, "text_sha256": text.sha256, "first_token": window * size},
            )

    def score(self, logits: Tensor, exact: Tensor, targets: Tensor) -> LogitScores:
        """Compare the distributions in float64."""
        kl, agree, growth = [], [], []
        for first in range(0, logits.shape[0], ROWS):
            rows = slice(first, first + ROWS)
            ours, theirs = logits[rows].double().log_softmax(-1), exact[rows].double().log_softmax(-1)
            kl += (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0).tolist()
            agree += (ours.argmax(-1) == theirs.argmax(-1)).double().tolist()
            true = targets[rows, None]
            growth += (theirs.gather(-1, true) - ours.gather(-1, true)).squeeze(-1).tolist()
        count = len(kl)
        values = {
            "kl": sum(kl) / count,
            "top1_agreement": sum(agree) / count,
            "perplexity_ratio": math.exp(sum(growth) / count),
        }
        return LogitScores(values, {"kl": kl, "top1_agreement": agree, "nll_growth": growth})

    def _text(self) -> Text:
        return _file(Path(self.options.text).expanduser()) if self.options.text else essays()


def _file(file: Path) -> Text:
    with reading(lambda reason: f"The text {file} cannot be read ({reason}): give a UTF-8 text file."):
        content = file.read_text("utf-8")
    words = tuple(content.split())
    return Text(file.name, hashlib.sha256(" ".join(words).encode()).hexdigest(), words)


@lru_cache(maxsize=1)
def _tokens(tokenizer: Any, text: Text) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts before a text, and those of the text itself."""
    content = " ".join(text.words)
    start = tuple(tokenizer("", verbose=False)["input_ids"])
    if start and start[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        start = start[:-1]
    return start, tuple(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
