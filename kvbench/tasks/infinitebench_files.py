"""∞-Bench's tasks that need its published files (Zhang et al. 2024, arXiv:2402.13718)."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from kvbench.contract.task import Example
from kvbench.tasks.files import FileTask
from kvbench.tasks.metrics import check_installed, f1, f1_characters, rouge_lsum

_LETTERS = "ABCD"


class InfiniteBenchFile(FileTask):
    """Common part: a context of 100 thousand tokens and more with the paper's prompt for open models."""

    reference = "∞-Bench, arXiv:2402.13718"
    published = "∞-Bench's data (hub dataset xinrongzhang2022/InfiniteBench)"
    max_new_tokens: ClassVar[int] = 40

    def build(self, row: Any, name: str) -> list[Example]:
        """Make the example of a row."""
        context, question, answer_prefix = self.prompt(row)
        references = self.answers(row)
        if not references:
            raise ValueError("no answer")
        return [
            Example(
                name, context, question, answer_prefix, references, self.max_new_tokens,
                thinking_prefix=self.thinking_prefix,
            )
        ]  # fmt: skip

    @abstractmethod
    def prompt(self, row: Any) -> tuple[str, str, str]:
        """Give the context, the question and the answer prefix of a row."""

    def answers(self, row: Any) -> tuple[str, ...]:
        """Give the references of a row."""
        answer = row["answer"]
        return (answer,) if isinstance(answer, str) else tuple(str(part) for part in answer)


class BookQA(InfiniteBenchFile):
    """En.QA: a question about a book; F1 of the words."""

    name = "infinitebench_longbook_qa_eng"
    summary = "∞-Bench En.QA: answer a question about a book (needs its published file)"
    patterns = ("longbook_qa_eng.jsonl",)

    def prompt(self, row: Any) -> tuple[str, str, str]:
        """Give the context, the question and the answer prefix of a row."""
        return (
            "Read the book and answer the question. Be very concise in your answer.\n\n" + row["context"] + "\n\n",
            f"Question: {row['input']}",
            "Answer:",
        )

    def score(self, prediction: str, example: Example) -> float:
        """Best F1 of the normalised words."""
        return f1(prediction, example.references)


class ChineseBookQA(InfiniteBenchFile):
    """Zh.QA: a question about a Chinese book; F1 of the characters."""

    name = "infinitebench_longbook_qa_chn"
    summary = "∞-Bench Zh.QA: answer a question about a Chinese book (needs its published file)"
    patterns = ("longbook_qa_chn.jsonl",)

    def prompt(self, row: Any) -> tuple[str, str, str]:
        """Give the context, the question and the answer prefix of a row."""
        return f"阅读以下书籍然后回答问题。\n\n{row['context']}\n\n", f"问题：{row['input']}", "答案："

    def score(self, prediction: str, example: Example) -> float:
        """Best F1 of the characters without punctuation."""
        return f1_characters(prediction, example.references)


class BookSummary(InfiniteBenchFile):
    """En.Sum: a book's summary; summary-level ROUGE-L."""

    name = "infinitebench_longbook_sum_eng"
    summary = "∞-Bench En.Sum: summarise a book (needs its published file)"
    patterns = ("longbook_sum_eng.jsonl",)
    max_new_tokens = 1200

    def data(self) -> dict[str, str]:
        """Name the published file and its hash."""
        check_installed("rouge_lsum")
        return super().data()

    def prompt(self, row: Any) -> tuple[str, str, str]:
        """Give the context, no question and the answer prefix of a row."""
        return f"Summarize the book below.\n\n{row['context']}\n\n", "", "Summary:"

    def score(self, prediction: str, example: Example) -> float:
        """F-measure of summary-level ROUGE-L."""
        return rouge_lsum(prediction, example.references)


class Dialogue(InfiniteBenchFile):
    """En.Dia: the character whose name is masked in a script; the references are the character's names."""

    name = "infinitebench_longdialogue_qa_eng"
    summary = "∞-Bench En.Dia: name a masked character of a script (needs its published file)"
    patterns = ("longdialogue_qa_eng.jsonl",)

    def prompt(self, row: Any) -> tuple[str, str, str]:
        """Give the context, no question and the answer prefix of a row."""
        return (
            'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", '
            f"and you should try to guess who that character is.\n\n{row['context']}\n\n",
            "",
            "The name that has been replaced with $$MASK$$ is likely",
        )

    def score(self, prediction: str, example: Example) -> float:
        """1 if any of the character's names, of however many words, is in the prediction, ignoring case, else 0."""
        text = prediction.upper()
        return float(any(name.upper() in text for name in example.references))


class _Choice(InfiniteBenchFile):
    """Four options, of which the published answer is the text, the letter, or both."""

    def answers(self, row: Any) -> tuple[str, ...]:
        """Give the right option's text and its letter."""
        given = super().answers(row)
        letter = given[1] if len(given) == 2 and given[1] in _LETTERS else _LETTERS[row["options"].index(given[0])]
        return row["options"][_LETTERS.index(letter)], letter

    @staticmethod
    def _options(row: Any) -> str:
        return "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, row["options"], strict=True))


class BookChoice(_Choice):
    """En.MC: multiple choice about a book."""

    name = "infinitebench_longbook_choice_eng"
    summary = "∞-Bench En.MC: multiple choice about a book (needs its published file)"
    patterns = ("longbook_choice_eng.jsonl",)

    def prompt(self, row: Any) -> tuple[str, str, str]:
        """Give the context, the question and the answer prefix of a row."""
        return (
            f"Read the book and answer the question.\n\n{row['context']}\n\n",
            f"Question: {row['input']}\n{self._options(row)}",
            "The letter of the correct answer is",
        )

    def score(self, prediction: str, example: Example) -> float:
        """1 if the last letter that stands alone in a line is the right one, or else what `choice_right` says."""
        letter = _last_letter(prediction, _LETTERS)
        return float(letter in example.references or choice_right(prediction, example.references))


class CodeDebug(_Choice):
    """Code.Debug: which of four functions of a project has a deliberate error."""

    name = "infinitebench_code_debug"
    summary = "∞-Bench Code.Debug: find the function with an error (needs its published file)"
    patterns = ("code_debug.jsonl",)
    max_new_tokens = 5

    def prompt(self, row: Any) -> tuple[str, str, str]:
        """Give the context, the question and the answer prefix of a row."""
        return (
            "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes "
            f"it crash.\n\n{row['context']}\n\n",
            f"Options:\n{self._options(row)}",
            "The correct option is:",
        )

    def score(self, prediction: str, example: Example) -> float:
        """1 if the last letter that stands alone is the right one, or the answer begins with or names the function."""
        name, letter = example.references
        if _last_letter(prediction, "ABCDEFGHIJ") == letter:
            return 1.0
        text = re.sub(" +", " ", re.sub(r"[\n`'\"\-*]|[Oo]ption", " ", prediction.strip()))
        if text.startswith((letter, name)):
            return 1.0
        for opening in ("answer is:", "is:", "answer:"):
            if opening in text:
                return float(text.split(opening, 1)[1][1:].startswith((letter, name)))
        return 0.0


def _last_letter(prediction: str, letters: str) -> str | None:
    """The first of the `letters` that stands alone in the text with no other after it in its line."""
    letter = rf"\b[{letters}]\b"
    found = re.search(rf"{letter}(?!.*{letter})", prediction)
    return found and found.group()


def choice_right(prediction: str, references: Sequence[str]) -> bool:
    """Judge an answer to a multiple choice as ∞-Bench first did, and SCBench does.

    The references are the right text and the right letter.
    """
    text = prediction.strip()
    if not text:
        return False
    if text[0] in _LETTERS:
        return text[0] in references
    if text in references:
        return True
    text = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", text))
    for opening in ("answer is:", "answer:", "answer is", "option is"):
        if opening in text:
            return text.split(opening, 1)[1][1:].startswith(tuple(references))
    words = [word for word in text.split() if word in tuple(_LETTERS)]
    return bool(words) and words[0] in references


class MathCalc(InfiniteBenchFile):
    """Math.Calc: every intermediate value of a sum of tens of thousands of terms, in an answer of 30,000 tokens."""

    name = "infinitebench_math_calc"
    summary = "∞-Bench Math.Calc: the intermediate values of a long sum (needs its published file)"
    patterns = ("math_calc.jsonl",)
    max_new_tokens = 30_000

    def prompt(self, row: Any) -> tuple[str, str, str]:
        """Give the context, no question and the answer prefix of a row."""
        return (
            "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
            f"Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {row['context']}\n",
            "",
            "Values:",
        )

    def answers(self, row: Any) -> tuple[str, ...]:
        """Give the values without their signs, which the published score does not read either.

        Some files hold them inside a further list.
        """
        answer = row["answer"]
        return tuple(str(abs(int(value))) for value in (answer[0] if isinstance(answer[0], list) else answer))

    def score(self, prediction: str, example: Example) -> float:
        """Share of the values that are right up to the first wrong one."""
        right = 0
        for number, value in zip(re.findall("[0-9]+", prediction), example.references, strict=False):
            if (number.lstrip("0") or "0") != value:
                break
            right += 1
        return right / len(example.references)
