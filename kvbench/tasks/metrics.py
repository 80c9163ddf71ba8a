"""Scores of generated text against references, as the benchmarks define them."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence


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


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    metric.__name__: metric for metric in (string_match_all, string_match_part, exact_match, f1)
}
"""The metrics that a file of examples can name."""
