"""Scores of generated text against references, as the benchmarks define them."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from kvbench.contract.errors import KVBenchError


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the prediction, ignoring case (RULER, arXiv:2404.06654)."""
    return sum(reference.lower() in prediction.lower() for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any of the references occurs in the prediction, ignoring case, else 0 (RULER, arXiv:2404.06654)."""
    return float(any(reference.lower() in prediction.lower() for reference in references))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the normalised prediction equals a normalised reference, else 0 (SQuAD, arXiv:1606.05250)."""
    return float(any(_normalised(prediction) == _normalised(reference) for reference in references))


def f1(prediction: str, references: Sequence[str]) -> float:
    """Best F1 over the references, of the normalised words with repeats (SQuAD, arXiv:1606.05250)."""
    return max(_f1(_normalised(prediction).split(), _normalised(reference).split()) for reference in references)


def _f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def _normalised(text: str) -> str:
    """Lower-case the text and drop punctuation, English articles and extra whitespace."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Best F-measure of ROUGE-L over the references, by rouge-score without stemming (Lin 2004)."""
    return _rouge("rougeL", prediction, references)


def rouge_lsum(prediction: str, references: Sequence[str]) -> float:
    """Best F-measure of summary-level ROUGE-L, whose sentences are lines, by rouge-score without stemming."""
    return _rouge("rougeLsum", prediction, references)


def bleu(prediction: str, references: Sequence[str]) -> float:
    """Sentence BLEU against all references, 0 to 1, by sacrebleu (arXiv:1804.08771)."""
    import sacrebleu  # noqa: PLC0415

    return float(sacrebleu.sentence_bleu(prediction, list(references)).score) / 100


def chrf(prediction: str, references: Sequence[str]) -> float:
    """Sentence chrF, 0 to 1, the best over the references, by sacrebleu (Popović 2015)."""
    import sacrebleu  # noqa: PLC0415

    return float(sacrebleu.sentence_chrf(prediction, list(references)).score) / 100


def edit_similarity(prediction: str, references: Sequence[str]) -> float:
    """Best normalised insert-and-delete similarity over the references, in whole percent, by rapidfuzz.

    This is fuzzywuzzy's `ratio`, which LongBench's code tasks use (arXiv:2308.14508).
    """
    from rapidfuzz import fuzz  # noqa: PLC0415

    return max(round(fuzz.ratio(prediction, reference)) / 100 for reference in references)


def f1_chinese(prediction: str, references: Sequence[str]) -> float:
    """Best F1 over the references, of jieba's Chinese words without punctuation (LongBench, arXiv:2308.14508)."""
    return max(_f1(_chinese_words(prediction), _chinese_words(reference)) for reference in references)


def f1_characters(prediction: str, references: Sequence[str]) -> float:
    """Best F1 over the references, of characters without punctuation and white space (∞-Bench, arXiv:2402.13718)."""
    return max(_f1(_plain(prediction), _plain(reference)) for reference in references)


def rouge_l_chinese(prediction: str, references: Sequence[str]) -> float:
    """Best F-measure of ROUGE-L over the references, of jieba's Chinese words (LongBench, arXiv:2308.14508)."""
    return _rouge("rougeL", prediction, references, _Chinese())


@cache
def _scorer(kind: str, tokenizer: Any) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415

    return RougeScorer([kind], tokenizer=tokenizer)


def _rouge(kind: str, prediction: str, references: Sequence[str], tokenizer: Any = None) -> float:
    scorer = _scorer(kind, tokenizer)
    return max(float(scorer.score(reference, prediction)[kind].fmeasure) for reference in references)


class _Chinese:
    """Words for rouge-score, which by itself drops all but Latin letters and digits."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Chinese)

    def __hash__(self) -> int:
        return 0

    def tokenize(self, text: str) -> list[str]:
        return [word for word in _cut(text) if word.strip()]


def _cut(text: str) -> list[str]:
    try:
        import jieba  # noqa: PLC0415
    except ImportError:
        raise KVBenchError("Chinese answers are cut into words by jieba: pip install 'kvbench[chinese]'.") from None
    jieba.setLogLevel("WARNING")
    return list(jieba.cut(text))


def _chinese_words(text: str) -> list[str]:
    return [word for word in map(_plain, _cut(text)) if word]


def _plain(text: str) -> str:
    """Lower-case the text and drop white space, punctuation and symbols of any script."""
    return "".join(c for c in text.lower() if not c.isspace() and unicodedata.category(c)[0] not in "PS")


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    metric.__name__: metric
    for metric in (
        string_match_all, string_match_part, exact_match, f1, rouge_l, rouge_lsum, bleu, chrf, edit_similarity,
    )
}  # fmt: skip
"""The metrics that a file of examples can name."""
