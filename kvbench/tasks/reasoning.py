"""Reasoning with answers that can be checked by themselves: GSM8K, MATH-500, AIME, LongGenBench and MRCR."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, ClassVar, Literal, cast

from pydantic import Field

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import parse_json
from kvbench.contract.task import Example
from kvbench.tasks.files import FileOptions, FileTask, Published, PublishedTask, load
from kvbench.tasks.long_answers import repetition
from kvbench.tasks.prompts import prompt_length

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_BOXED = "\nReason step by step, and write the final answer within \\boxed{}."


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of a text holds, its braces balanced; None where there is none that closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None


def last_number(text: str) -> str | None:
    """The last number of a text, without commas between its thousands; None where there is none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def same_number(one: str | None, other: str | None) -> bool:
    """Whether two texts are the same number."""
    values = [_value(text) for text in (one, other)]
    return values[0] is not None and values[0] == values[1]


def normal_form(answer: str) -> str:
    r"""A LaTeX answer without what doesn't change it: spacing, `\left`, `\text`, units of degrees, percent, dollars."""
    text = answer.strip().rstrip(".").replace("\n", "")
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:left|right|!|,|;|:|\s)|\\?\$|\\?%|\^\{?\\circ\}?|\s|~", "", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"^[a-zA-Z](?:\\in|=)", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text) else text
    text = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    value = _value(text)
    return text if value is None else str(value)


def _value(text: str | None) -> Fraction | None:
    if text is None or len(text) > 100:
        return None
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


class ReasoningOptions(FileOptions):
    """Where the published file is, and how long an answer may be."""

    max_new_tokens: int = Field(2048, ge=1, description="Most tokens to generate.")


class Reasoning(FileTask):
    """A problem whose answer is a short text at the end of a chain of thought of any length."""

    Options = ReasoningOptions
    metrics: ClassVar[dict[str, str]] = {
        "answered": "gave an answer",
        "answer_words": "words of the answer",
        "repetition": "words repeated",
    }

    @property
    def most(self) -> int:
        """Most tokens to generate."""
        return cast("ReasoningOptions", self.options).max_new_tokens

    def measures(self, prediction: str, example: Example) -> dict[str, float]:
        """Whether there is a final answer, the words before and in it, and how many of them repeat others."""
        return {
            "answered": float(self._answer(prediction) is not None),
            "answer_words": float(len(prediction.split())),
            "repetition": repetition(prediction),
        }

    def _answer(self, prediction: str) -> str | None:
        return boxed(prediction)

    def _example(self, name: str, problem: str, answer: str, **info: str | int | float) -> Example:
        return Example(
            id=name, context=problem, question=_BOXED, answer_prefix="", references=(answer,),
            max_new_tokens=self.most, info=info,
        )  # fmt: skip


class GSM8K(Reasoning):
    """Problems of school arithmetic; the last number in the box, or else of the answer, is compared."""

    name = "gsm8k"
    summary = "GSM8K: school arithmetic, the final number is compared (needs its published file)"
    reference = "Cobbe et al. 2021, arXiv:2110.14168"
    patterns = ("gsm8k_test.jsonl", "gsm8k/test.jsonl", "main/test-*.parquet")
    published = "GSM8K's test set (hub dataset openai/gsm8k)"

    def build(self, row: Any, name: str) -> list[Example]:
        """Make the example of a row, whose answer stands after `####`."""
        return [self._example(name, row["question"], gsm8k_answer(row))]

    def _answer(self, prediction: str) -> str | None:
        return last_number(boxed(prediction) or "") or last_number(prediction)

    def score(self, prediction: str, example: Example) -> float:
        """1 if the number is the right one, else 0."""
        return float(same_number(self._answer(prediction), example.references[0]))


def gsm8k_answer(row: Mapping[str, str]) -> str:
    """The final number of a row of GSM8K; raises ValueError where there is none."""
    _, mark, answer = row["answer"].rpartition("####")
    number = answer.strip().replace(",", "")
    if not mark or _value(number) is None:
        raise ValueError("its answer has no number after ####")
    return number


class Math500(Reasoning):
    """500 problems of the MATH test set; the box is compared with the answer, both in a normal form."""

    name = "math500"
    summary = "MATH-500: competition mathematics, the boxed answer is compared (needs its published file)"
    reference = "Hendrycks et al. 2021, arXiv:2103.03874; the 500 of Lightman et al. 2023, arXiv:2305.20050"
    patterns = ("math500.jsonl", "MATH-500/test.jsonl", "test.jsonl")
    published = "MATH-500 (hub dataset HuggingFaceH4/MATH-500)"

    def build(self, row: Any, name: str) -> list[Example]:
        """Make the example of a row."""
        return [self._example(name, row["problem"], row["answer"], level=int(row.get("level", 0)))]

    def score(self, prediction: str, example: Example) -> float:
        """1 if the boxed answer is the right one, else 0."""
        found = boxed(prediction)
        return float(found is not None and normal_form(found) == normal_form(example.references[0]))


class Aime(Reasoning):
    """Problems of the AIME, whose answers are whole numbers from 0 to 999."""

    name = "aime"
    summary = "AIME: competition mathematics with whole-number answers (needs a published file)"
    reference = "American Invitational Mathematics Examination"
    patterns = ("aime*.jsonl", "aime*/test.jsonl", "data/train-*.parquet", "data/test-*.parquet")
    published = "an AIME set with problem and answer (hub dataset HuggingFaceH4/aime_2024, say)"

    def build(self, row: Any, name: str) -> list[Example]:
        """Make the example of a row."""
        row = {key.lower(): value for key, value in row.items()}
        return [self._example(name, row["problem"], str(int(row["answer"])))]

    def score(self, prediction: str, example: Example) -> float:
        """1 if the box holds the right number, else 0."""
        return float(same_number(last_number(boxed(prediction) or ""), example.references[0]))


class LongGenBenchOptions(ReasoningOptions):
    """How many questions one answer takes."""

    max_new_tokens: int = Field(8192, ge=1, description="Most tokens to generate.")
    questions: int = Field(30, ge=2, le=1000, description="Questions of GSM8K in one prompt.")


class LongGenBench(PublishedTask):
    """Many questions of GSM8K in one prompt, all to be answered in one long answer, in their order.

    The recipe is LongGenBench's; its wording, and the solved examples that it gives, are not.
    """

    name = "longgenbench_gsm8k"
    summary = "LongGenBench's recipe: many questions of GSM8K in one long answer (needs GSM8K's published file)"
    reference = "Liu et al. 2024, arXiv:2410.04199"
    Options = LongGenBenchOptions
    patterns = GSM8K.patterns
    published = GSM8K.published
    metrics: ClassVar[dict[str, str]] = {
        "answered": "questions answered",
        "first_error": "first wrong question",
        "answer_words": "words of the answer",
        "repetition": "words repeated",
    }

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield `count` examples, each of questions that it draws for itself."""
        options = cast("LongGenBenchOptions", self.options)
        found = self._load()
        rows = found.content
        if not isinstance(rows, list) or len(rows) < options.questions:
            raise KVBenchError(
                f"{found.place} holds fewer than {options.questions} questions: expected {self.published}, or ask for "
                "fewer with --task-option questions=N."
            )
        for index in range(count):
            drawn = random.Random(f"{seed} {self.name} {index}").sample(range(len(rows)), options.questions)
            try:
                problems = [rows[number]["question"] for number in drawn]
                answers = tuple(gsm8k_answer(rows[number]) for number in drawn)
            except Exception as error:  # of any kind: it comes from the rows
                raise KVBenchError(
                    f"A row of {found.place} is not as published ({type(error).__name__}: {error}): expected "
                    f"{self.published}."
                ) from error
            listed = "\n\n".join(f"Question {n}: {problem}" for n, problem in enumerate(problems, 1))
            example = Example(
                id=f"{self.name}/{context_length}/{seed}/{index}",
                context=f"Answer the following {len(problems)} questions, in their order.\n\n{listed}\n\n",
                question="Begin each answer with «Answer n:», n being the question's number; reason step by step, and "
                "end the answer with «The answer is» and the number. Answer all questions.",
                answer_prefix="", references=answers, max_new_tokens=options.max_new_tokens,
                info={"haystack": found.name, "questions": len(problems)},
            )  # fmt: skip
            size = prompt_length(tokenizer, example) + options.max_new_tokens
            if size > context_length:
                raise KVBenchError(
                    f"A context of {context_length} tokens is too small for {len(problems)} questions and "
                    f"{options.max_new_tokens} tokens of answers, which take {size}: ask for a longer one, or for less "
                    "with --task-option questions=N or max_new_tokens=N."
                )
            yield example

    def score(self, prediction: str, example: Example) -> float:
        """Share of the questions whose answer's last number is the right one."""
        right = self._right(prediction, example)
        return sum(right) / len(right)

    def measures(self, prediction: str, example: Example) -> dict[str, float]:
        """Share of the questions answered at all, the first that is wrong, the answer's words and their repetition."""
        right, count = self._right(prediction, example), len(example.references)
        given = set(_answers(prediction)) & set(range(1, count + 1))
        return {
            "answered": len(given) / count,
            **({"first_error": float(right.index(False) + 1)} if False in right else {}),
            "answer_words": float(len(prediction.split())),
            "repetition": repetition(prediction),
        }

    def _right(self, prediction: str, example: Example) -> list[bool]:
        given = _answers(prediction)
        return [same_number(last_number(given.get(n, "")), answer) for n, answer in enumerate(example.references, 1)]


def _answers(prediction: str) -> dict[int, str]:
    """The text of each answer by its question's number; of a number answered twice, the first."""
    parts = re.split(r"Answer[ _](\d{1,6})\s*:", prediction)
    found: dict[int, str] = {}
    for number, text in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(int(number), text)
    return found


class MrcrOptions(FileOptions):
    """Which of the files, and how long an answer may be."""

    needles: Literal[2, 4, 8] = Field(2, description="Equal requests in a conversation.")
    max_new_tokens: int = Field(1024, ge=1, description="Most tokens to generate.")


class Mrcr(FileTask):
    """A long conversation with equal requests, one of whose answers is to be written again, after a given string."""

    name = "mrcr"
    summary = "MRCR: write again one answer of a long conversation (needs its published files)"
    reference = "Vodrahalli et al. 2024, arXiv:2409.12640; the dataset openai/mrcr"
    Options = MrcrOptions
    patterns = ("2needle/*.parquet", "2needle*.parquet", "2needle*.jsonl")
    published = "MRCR's conversations (hub dataset openai/mrcr)"

    def _load(self) -> Published:
        options = cast("MrcrOptions", self.options)
        return load(options, [name.replace("2", str(options.needles), 1) for name in self.patterns], self.published)

    def build(self, row: Any, name: str) -> list[Example]:
        """Make the example of a row, its conversation in turns."""
        messages = row["prompt"]
        messages = parse_json(messages, ours=False) if isinstance(messages, str) else messages
        roles = [message["role"] for message in messages]
        if not messages or roles != [("user", "assistant")[n % 2] for n in range(len(messages))] or len(roles) % 2 == 0:
            raise ValueError("its messages are not turns of user and assistant that end with the user's")
        texts = [message["content"] for message in messages]
        if not row["answer"].startswith(row["random_string_to_prepend"]):
            raise ValueError("its answer doesn't begin with its string")
        return [
            Example(
                id=name,
                context="",
                question=texts[-1],
                answer_prefix="",
                references=(row["answer"],),
                max_new_tokens=cast("MrcrOptions", self.options).max_new_tokens,
                solved=tuple(zip(texts[:-1:2], texts[1::2], strict=True)),
                info={"begins": row["random_string_to_prepend"], "needles": int(row["n_needles"])},
            )
        ]

    def score(self, prediction: str, example: Example) -> float:
        """Python's SequenceMatcher ratio of both texts after the given string, and 0 for an answer without it."""
        begins = str(example.info["begins"])
        if not prediction.startswith(begins):
            return 0.0
        answer = example.references[0].removeprefix(begins)
        return difflib.SequenceMatcher(None, prediction.removeprefix(begins), answer).ratio()


REASONING: list[type[PublishedTask]] = [GSM8K, Math500, Aime, LongGenBench, Mrcr]
