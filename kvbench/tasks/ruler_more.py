"""RULER's tracing, aggregation and question tasks (Hsieh et al. 2024, arXiv:2404.06654)."""

import itertools
import math
import random
import string
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

from kvbench.contract.errors import KVBenchError
from kvbench.contract.task import Example, Task
from kvbench.tasks.files import FileOptions, Published, load
from kvbench.tasks.metrics import string_match_all, string_match_part
from kvbench.tasks.prompts import fill, prompt_length
from kvbench.tasks.ruler import ReleaseOptions, RulerFileOptions
from kvbench.tasks.texts import NOISE, words


class VariableTracking(Task):
    """A chain of five variables, «VAR B = VAR A», in lines of noise, after one solved example of ten lines."""

    name = "vt"
    summary = "RULER: follow a chain of five variable assignments through noise"
    reference = "RULER, arXiv:2404.06654"
    Options = ReleaseOptions
    hops = 4

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield examples with as many lines of noise as fit."""
        for index in range(count):

            def build(lines: int, index: int = index) -> Example:
                rng = random.Random(f"{seed} {self.name} {index}")
                solved = self._problem(rng, 10, letters=3)
                context, question, answer_prefix, names = self._problem(rng, lines, letters=5)
                between, after = (" ", "\n\n\n\n") if self._old else ("", "\n\n")
                demonstration = f"{solved[0]}{solved[1]}{between}{solved[2]} {' '.join(solved[3])}{after}"
                return Example(
                    id=f"{self.name}/{context_length}/{seed}/{index}",
                    context=demonstration + context,
                    question=question,
                    answer_prefix=answer_prefix,
                    references=tuple(names),
                    max_new_tokens=30,
                    info={"haystack": "noise", "haystack_units": lines},
                    thinking_prefix=self.thinking_prefix,
                )

            yield fill(tokenizer, build, context_length=context_length, smallest=self.hops + 1)

    def score(self, prediction: str, example: Example) -> float:
        """Share of the five names that occur in the prediction."""
        return string_match_all(prediction, example.references)

    @property
    def _old(self) -> bool:
        return cast("ReleaseOptions", self.options).release == "2024"

    def _problem(self, rng: random.Random, lines: int, letters: int) -> tuple[str, str, str, list[str]]:
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        value = rng.randrange(10_000, 99_999)
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
        parts = [NOISE + "\n" if self._old else NOISE] * lines
        for shift, position in enumerate(sorted(rng.sample(range(lines), len(chain)))):
            parts.insert(position + shift, chain[shift])
        text = (" " if self._old else "\n").join(parts)
        # "assgined" is how it was published at first.
        assigned, end = ("assgined", "") if self._old else ("assigned", " ")
        prefix = (
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are {assigned} the value {value}, they are:{end}"
        )
        return (
            f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}\n",
            f"Question: Find all variables that are assigned the value {value} in the text above.",
            cast("ReleaseOptions", self.options).prefix(prefix),
            names,
        )


class CommonWords(Task):
    """A numbered list in which ten words occur more often than all others, after one solved example.

    The present release has the solved example as a turn of the user and one of the assistant.
    """

    name = "cwe"
    summary = "RULER: name the ten most common words of a list"
    reference = "RULER, arXiv:2404.06654"
    Options = ReleaseOptions

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield examples with as many different words as fit."""
        pool = words("noun", "adjective", "verb")
        # Repeats of the common and the other words, in the example and in the solved one.
        repeats, solved_words, solved_repeats = (
            ((30, 3), 40, (10, 3)) if context_length >= 4096 else ((6, 1), 20, (3, 1))
        )
        for index in range(count):

            def build(size: int, index: int = index) -> Example:
                rng = random.Random(f"{seed} {self.name} {index}")
                solved, solved_answer = self._list(rng, rng.sample(pool, solved_words), *solved_repeats)
                drawn = rng.sample(pool, len(pool))
                listed, answer = self._list(rng, drawn[:size], *repeats)
                numbered = " ".join(f"{place}. {word}" for place, word in enumerate(solved_answer, 1))
                options = cast("ReleaseOptions", self.options)
                context, question, prefix = self._context(listed), self.QUESTION, options.prefix(self.PREFIX)
                turns: tuple[tuple[str, str], ...] = ()
                if options.release == "2024":
                    context = f"{self._context(solved)}{question} {prefix}{numbered}\n{context}"
                else:
                    turns = ((f"{self._context(solved)}{question}", f"{prefix} {numbered}"),)
                return Example(
                    id=f"{self.name}/{context_length}/{seed}/{index}",
                    context=context,
                    question=question,
                    answer_prefix=prefix,
                    references=tuple(answer),
                    max_new_tokens=120,
                    info={"haystack": "words of wonderwords 3.0.1", "haystack_units": size},
                    solved=turns,
                    thinking_prefix=self.thinking_prefix,
                )

            yield fill(tokenizer, build, context_length=context_length, smallest=20, largest=len(pool))

    def score(self, prediction: str, example: Example) -> float:
        """Share of the ten words that occur in the prediction."""
        return string_match_all(prediction, example.references)

    QUESTION = "Question: What are the 10 most common words in the above list?"
    PREFIX = "Answer: The top 10 words that appear most often in the list are:"

    @staticmethod
    def _list(rng: random.Random, drawn: Sequence[str], common: int, other: int) -> tuple[str, Sequence[str]]:
        listed = [*drawn[:10]] * common + [*drawn[10:]] * other
        rng.shuffle(listed)
        return " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1)), drawn[:10]

    @staticmethod
    def _context(listed: str) -> str:
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. "
            f"Memorize the ones that appear most often.\n{listed}\n"
        )


class FrequentWords(Task):
    """Coded words whose frequencies follow a zeta distribution with α = 2; the most frequent one is noise."""

    name = "fwe"
    summary = "RULER: name the three most frequent of coded words"
    reference = "RULER, arXiv:2404.06654"
    Options = ReleaseOptions
    max_new_tokens: ClassVar[int] = 50

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield examples with as many words as fit."""
        size = max((context_length - self.max_new_tokens) // 50, 4)
        for index in range(count):
            rng = random.Random(f"{seed} {self.name} {index}")
            vocabulary = ["..."]
            while len(vocabulary) < size:
                word = "".join(rng.choices(string.ascii_lowercase, k=6))
                if word not in vocabulary:
                    vocabulary.append(word)

            def build(steps: int, index: int = index, vocabulary: list[str] = vocabulary) -> Example:
                total = steps * 10
                coded = []
                for rank, word in enumerate(vocabulary, 1):
                    coded += [word] * int(total * rank**-2 / (math.pi**2 / 6))
                random.Random(f"{seed} {self.name} {index} order").shuffle(coded)
                return Example(
                    id=f"{self.name}/{context_length}/{seed}/{index}",
                    context=(
                        "Read the following coded text and track the frequency of each coded word. Find the three most "
                        f"frequently appeared coded words. {' '.join(coded)}\n"
                    ),
                    question=(
                        "Question: Do not provide any explanation. Please ignore the dots '....'. "
                        "What are the three most frequently appeared words in the above coded text?"
                    ),
                    answer_prefix=cast("ReleaseOptions", self.options).prefix(
                        "Answer: According to the coded text above, the three most frequently appeared words are:"
                    ),
                    references=tuple(vocabulary[1:4]),
                    max_new_tokens=self.max_new_tokens,
                    info={"haystack": "coded words", "haystack_units": len(coded)},
                    thinking_prefix=self.thinking_prefix,
                )

            # From 60 words on the counts of ranks 2 to 5 differ.
            yield fill(tokenizer, build, context_length=context_length, smallest=6)

    def score(self, prediction: str, example: Example) -> float:
        """Share of the three words that occur in the prediction."""
        return string_match_all(prediction, example.references)


@dataclass(frozen=True)
class _Question:
    question: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Questions:
    name: str
    sha256: str
    documents: tuple[str, ...]
    questions: tuple[_Question, ...]


class QuestionTask(Task):
    """A question with the documents that answer it among others; subclasses read a published file."""

    reference = "RULER, arXiv:2404.06654"
    Options = RulerFileOptions
    patterns: ClassVar[tuple[str, ...]]
    published: ClassVar[str]
    max_new_tokens: ClassVar[int] = 32

    @staticmethod
    @abstractmethod
    def read(content: Any) -> tuple[Sequence[str], Sequence[_Question]]:
        """Give the documents and the questions of the file's content."""

    def data(self) -> dict[str, str]:
        """Name the published file and its hash."""
        found = self._load()
        return {"haystack": found.name, "haystack_sha256": found.sha256}

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield examples with as many documents as fit, the questions in an order drawn by the seed."""
        content = self._load()
        order = random.Random(f"{seed} {self.name}").sample(range(len(content.questions)), len(content.questions))
        for index, number in enumerate(order[:count]):
            asked = content.questions[number]
            rng = random.Random(f"{seed} {self.name} {index}")
            related = rng.sample(asked.related, len(asked.related))
            known = {*asked.needed, *related}
            others = [document for document in range(len(content.documents)) if document not in known]
            candidates = [*related, *rng.sample(others, len(others))]

            def made(shown: list[int], index: int = index, asked: _Question = asked) -> Example:
                random.Random(f"{seed} {self.name} {index} order").shuffle(shown)
                listed = "\n\n".join(f"Document {place}:\n{content.documents[d]}" for place, d in enumerate(shown, 1))
                return Example(
                    id=f"{self.name}/{context_length}/{seed}/{index}",
                    context=f"{_QA_INSTRUCTION}\n\nThe following are given documents.\n\n{listed}\n\n",
                    question=f"{_QA_INSTRUCTION}\n\nQuestion: {asked.question}",
                    answer_prefix=cast("ReleaseOptions", self.options).prefix("Answer:"),
                    references=asked.answers,
                    max_new_tokens=self.max_new_tokens,
                    thinking_prefix=self.thinking_prefix,
                    info={"haystack": content.name, "haystack_sha256": content.sha256, "haystack_units": len(shown)},
                )

            room = context_length - prompt_length(tokenizer, made([*asked.needed])) - self.max_new_tokens
            chosen = [*asked.needed, *self._fitting(tokenizer, candidates, room)]

            def build(size: int, chosen: list[int] = chosen, made: Callable[[list[int]], Example] = made) -> Example:
                return made(chosen[:size])

            yield fill(tokenizer, build, context_length=context_length, smallest=len(asked.needed), largest=len(chosen))

    def _fitting(self, tokenizer: Any, candidates: Sequence[int], room: int) -> Iterator[int]:
        """Give the documents, in order, that fit into `room` tokens together, leaving out those that are too long."""
        documents, misses = self._load().documents, 0
        for number in candidates:
            text = f"Document {len(documents)}:\n{documents[number]}\n\n"
            size = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if size <= room:
                room, misses = room - size, 0
                yield number
            elif (misses := misses + 1) == 100:  # what is left is too little for any
                return

    def score(self, prediction: str, example: Example) -> float:
        """1 if any of the answers occurs in the prediction, else 0."""
        return string_match_part(prediction, example.references)

    def _load(self) -> _Questions:
        return _read(type(self), load(cast("FileOptions", self.options), self.patterns, self.published))


_QA_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@cache
def _read(task: type[QuestionTask], found: Published) -> _Questions:
    try:
        documents, questions = task.read(found.content)
        if not questions:
            raise ValueError
    except (ValueError, KeyError, TypeError, IndexError):
        raise KVBenchError(f"{found.place} is not {task.published}: put the published file there.") from None
    return _Questions(found.name, found.sha256, tuple(documents), tuple(questions))


class Squad(QuestionTask):
    """SQuAD 2.0: one paragraph answers; paragraphs of the same article come before others as distractors."""

    name = "qa_1"
    summary = "RULER: answer a question of SQuAD 2.0 among paragraphs (needs its published file)"
    patterns = ("dev-v2.0.json", "squad_v2/validation-*.parquet")
    published = "SQuAD 2.0's development set (https://rajpurkar.github.io/SQuAD-explorer, or rajpurkar/squad_v2)"

    @staticmethod
    def read(content: Any) -> tuple[Sequence[str], Sequence[_Question]]:
        """Read SQuAD's articles, or the hub's table of questions, leaving out the questions without an answer."""
        rows = content if isinstance(content, list) else _squad_rows(content)
        articles: dict[str, dict[str, None]] = {}
        for row in rows:
            articles.setdefault(row["title"], {})[row["context"]] = None
        documents = sorted({text for texts in articles.values() for text in texts})
        numbers = {text: number for number, text in enumerate(documents)}
        questions = []
        for row in rows:
            own = numbers[row["context"]]
            related = tuple(numbers[text] for text in articles[row["title"]] if numbers[text] != own)
            if row["answers"]["text"]:
                questions.append(_Question(row["question"], tuple(row["answers"]["text"]), (own,), related))
        return documents, questions


def _squad_rows(content: Any) -> list[dict[str, Any]]:
    """The published file's questions as the hub's table has them."""
    return [
        {
            "title": article["title"], "context": paragraph["context"], "question": asked["question"],
            "answers": {"text": [] if asked["is_impossible"] else [answer["text"] for answer in asked["answers"]]},
        }
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]  # fmt: skip


class HotpotQA(QuestionTask):
    """HotpotQA with distractors: the question's own ten paragraphs, then others."""

    name = "qa_2"
    summary = "RULER: answer a question of HotpotQA among paragraphs (needs its published file)"
    patterns = ("hotpot_dev_distractor_v1.json", "distractor/validation-*.parquet")
    published = "HotpotQA's development set with distractors (https://hotpotqa.github.io, or hotpotqa/hotpot_qa)"

    @staticmethod
    def read(content: Any) -> tuple[Sequence[str], Sequence[_Question]]:
        """Read HotpotQA's questions with their paragraphs, of the published file or of the hub's table."""

        def texts(asked: Any) -> list[str]:
            context = asked["context"]
            pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
            return [f"{title}\n{''.join(sentences)}" for title, sentences in pairs]

        documents = sorted({text for asked in content for text in texts(asked)})
        numbers = {text: number for number, text in enumerate(documents)}
        return documents, [
            _Question(
                asked["question"], (asked["answer"],), tuple(dict.fromkeys(numbers[text] for text in texts(asked)))
            )
            for asked in content
        ]
