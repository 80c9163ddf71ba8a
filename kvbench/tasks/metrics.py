"""Scores of generated text against references, as the benchmarks define them."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kvbench.contract.extras import check_extras, need


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
    """Best F-measure of ROUGE-L over the references, of rouge-score's words without stemming (Lin 2004)."""
    return _rouge_l(_english(), prediction, references)


def rouge_lsum(prediction: str, references: Sequence[str]) -> float:
    """Best F-measure of summary-level ROUGE-L, whose sentences are lines, of rouge-score's words without stemming."""
    words = _english()
    predicted, best = _lines(words, prediction), 0.0
    for reference in references:
        expected = _lines(words, reference)
        hits = _summary_hits(predicted, expected)
        best = max(best, _f_measure(hits, sum(map(len, predicted)), sum(map(len, expected))))
    return best


def bleu(prediction: str, references: Sequence[str]) -> float:
    """Sentence BLEU against all references, 0 to 1, by sacrebleu (arXiv:1804.08771)."""
    return float(_package(bleu, "sacrebleu").sentence_bleu(prediction, list(references)).score) / 100


def chrf(prediction: str, references: Sequence[str]) -> float:
    """Sentence chrF, 0 to 1, the best over the references, by sacrebleu (Popović 2015)."""
    return float(_package(chrf, "sacrebleu").sentence_chrf(prediction, list(references)).score) / 100


def edit_similarity(prediction: str, references: Sequence[str]) -> float:
    """Best normalised insert-and-delete similarity over the references, in whole percent, by rapidfuzz.

    This is fuzzywuzzy's `ratio`, which LongBench's code tasks use (arXiv:2308.14508).
    """
    ratio: Callable[[str, str], float] = _package(edit_similarity, "rapidfuzz.fuzz").ratio
    return max(round(ratio(prediction, reference)) / 100 for reference in references)


def f1_chinese(prediction: str, references: Sequence[str]) -> float:
    """Best F1 over the references, of jieba's Chinese words without punctuation (LongBench, arXiv:2308.14508)."""
    return max(_f1(_chinese_words(prediction), _chinese_words(reference)) for reference in references)


def f1_characters(prediction: str, references: Sequence[str]) -> float:
    """Best F1 over the references, of characters without punctuation and white space (∞-Bench, arXiv:2402.13718)."""
    return max(_f1(_plain(prediction), _plain(reference)) for reference in references)


def rouge_l_chinese(prediction: str, references: Sequence[str]) -> float:
    """Best F-measure of ROUGE-L over the references, of jieba's Chinese words (LongBench, arXiv:2308.14508)."""
    return _rouge_l(_Chinese(), prediction, references)


class _Words(Protocol):
    def tokenize(self, text: str) -> list[str]: ...


def _english() -> _Words:
    words: _Words = _package(rouge_l, "rouge_score.tokenizers").DefaultTokenizer()
    return words


def _rouge_l(words: _Words, prediction: str, references: Sequence[str]) -> float:
    common = _package(rouge_l, "rapidfuzz.distance").LCSseq
    predicted = words.tokenize(prediction)
    best = 0.0
    for reference in references:
        expected = words.tokenize(reference)
        best = max(best, _f_measure(common.similarity(predicted, expected), len(predicted), len(expected)))
    return best


def _f_measure(hits: int, predicted: int, expected: int) -> float:
    if not hits:
        return 0.0
    precision, recall = hits / predicted, hits / expected
    return 2 * precision * recall / (precision + recall)


def _lines(words: _Words, text: str) -> list[list[str]]:
    return [words.tokenize(line) for line in text.split("\n") if line]


def _summary_hits(predicted: list[list[str]], expected: list[list[str]]) -> int:
    """Words of the expected lines in the union of their longest common subsequences with the predicted lines.

    Each word counts as often as both texts have it (ROUGE 1.5.5).
    """
    left = Counter(word for line in predicted for word in line) & Counter(word for line in expected for word in line)
    numbers = {word: number for number, word in enumerate(left)}
    shown = [[numbers.get(word, -1) for word in line] for line in predicted]
    hits = 0
    for line in expected:
        for place in _in_common([numbers.get(word, -2) for word in line], shown):
            if left[line[place]] > 0:
                left[line[place]] -= 1
                hits += 1
    return hits


def _in_common(line: list[int], others: list[list[int]]) -> list[int]:
    """Places of the line's words that are in its longest common subsequence with any of the other lines.

    Among several such subsequences it is the one that rouge-score takes, which goes back in the other line only where
    that alone keeps the length. The lengths of all others are computed at once, a row for each word of the line.
    """
    import numpy as np  # noqa: PLC0415

    starts = np.cumsum([0, *(len(other) + 1 for other in others)])
    columns = np.full(starts[-1], -3)
    for start, other in zip(starts, others, strict=False):
        columns[start + 1 : start + 1 + len(other)] = other
    # Lengths rise within a line and start anew at its first column: levels keep one running maximum for all lines.
    level = np.repeat(np.arange(len(others)), np.diff(starts)) * (len(line) + 1)
    lengths, back = level, []
    for word in line:
        above = lengths[:-1] + 1
        row = level.copy()
        row[1:] = np.where(columns[1:] == word, above, lengths[1:])
        np.maximum.accumulate(row, out=row)
        back.append(np.packbits(row[:-1] > lengths[1:]))
        lengths = row
    found = set()
    ends = starts[1:] - 1
    for number in np.flatnonzero(lengths[ends] > level[ends]).tolist():
        start, other = int(starts[number]), others[number]
        i, j = len(line), len(other)
        while i and j:
            bit = start + j - 1
            if line[i - 1] == other[j - 1]:
                i, j = i - 1, j - 1
                found.add(i)
            elif back[i - 1][bit >> 3] >> (7 - (bit & 7)) & 1:
                j -= 1
            else:
                i -= 1
    return sorted(found)


class _Chinese:
    """Words for ROUGE, of which rouge-score's own tokenizer drops all but Latin letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        return [word for word in _cut(text) if word.strip()]


def _cut(text: str) -> list[str]:
    jieba = _package(f1_chinese, "jieba")
    jieba.setLogLevel("WARNING")
    return list(jieba.cut(text))


def _chinese_words(text: str) -> list[str]:
    return [word for word in map(_plain, _cut(text)) if word]


_PUNCTUATION = frozenset(
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    + "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
"""What LongBench and ∞-Bench drop from Chinese answers."""


def _plain(text: str) -> str:
    """Lower-case the text and drop white space and punctuation."""
    return "".join(c for c in "".join(text.lower().split()) if c not in _PUNCTUATION)


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    metric.__name__: metric
    for metric in (
        string_match_all, string_match_part, exact_match, f1, rouge_l, rouge_lsum, bleu, chrf, edit_similarity,
    )
}  # fmt: skip
"""The metrics that a file of examples can name."""

_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "rouge_l": ("rouge_score", "rapidfuzz"), "rouge_lsum": ("rouge_score",), "bleu": ("sacrebleu",),
    "chrf": ("sacrebleu",), "edit_similarity": ("rapidfuzz",), "next_line_similarity": ("rapidfuzz",),
    "f1_chinese": ("jieba",), "rouge_l_chinese": ("jieba", "rapidfuzz"), "function_right": ("nltk",),
}  # fmt: skip
"""Metric -> the packages of extras that it is made with."""


def check_installed(name: str) -> None:
    """Raise KVBenchError, which names the pip command, where a metric's packages are missing."""
    check_extras(f"The metric {name}", *_PACKAGES.get(name, ()))


def _package(metric: Callable[..., float], module: str) -> Any:
    return need(module, f"The metric {metric.__name__}")
