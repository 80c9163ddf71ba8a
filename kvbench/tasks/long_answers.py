"""Long answers whose every line is checked: arithmetic, states, copies, sorted lists, constrained lists, traces."""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, cast

from pydantic import Field

from kvbench.contract.task import Example, Task, TaskOptions
from kvbench.tasks import tracing
from kvbench.tasks.prompts import fill
from kvbench.tasks.texts import words

_LINE = re.compile(r"[ \t]*(\d{1,9})[.:)][ \t]*(.*?)[ \t]*")


class Written(NamedTuple):
    """A prompt, and the lines of its right answer without their numbers."""

    context: str
    question: str
    lines: list[str]


def numbered(text: str) -> dict[int, str]:
    """The numbered lines of an answer by their numbers, white space collapsed; of a number given twice, the first."""
    found: dict[int, str] = {}
    for line in text.splitlines():
        if match := _LINE.fullmatch(line):
            found.setdefault(int(match[1]), " ".join(match[2].split()))
    return found


def repetition(text: str, n: int = 8) -> float:
    """Share of a text's runs of n words that occurred in it before; 0 for a text of fewer words."""
    parts = text.split()
    runs = Counter(zip(*(parts[k:] for k in range(n)), strict=False))
    return 1 - len(runs) / total if (total := runs.total()) else 0.0


class LongAnswerOptions(TaskOptions):
    """How much longer than the right answer the model's may be."""

    room: float = Field(1.25, ge=1, le=8, description="Most tokens to generate, by the right answer's tokens.")


class LongAnswer(Task):
    """A task whose right answer is numbered lines, then a line that the prompt's first line asks for.

    The prompt, which gives the answer's first lines, and what may be generated fill the context: its length is the dial
    of the answer's. The score is the share of the lines that are right; `measures` says where the answer first goes
    wrong, whether it is longer than the right one, repeats itself, and keeps the first line's rule to its end.
    """

    Options = LongAnswerOptions
    metrics: ClassVar[dict[str, str]] = {
        "whole_answer": "whole answer right",
        "before_error": "right before an error",
        "first_error": "first wrong line",
        "answer_length": "length by the right one's",
        "repetition": "words repeated",
        "rule_kept": "rule kept to the end",
    }
    shown: ClassVar[int] = 2
    largest: ClassVar[int | None] = None

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield examples with as many lines as fit."""
        room = cast("LongAnswerOptions", self.options).room
        for index in range(count):

            def build(units: int, index: int = index) -> Example:
                rng = random.Random(f"{seed} {self.name} {index}")
                end = f"END {rng.randrange(1000, 10_000)}"
                written = self._write(rng, units)
                lines = [f"{n}. {line}" for n, line in enumerate(written.lines, 1)]
                rest = "\n".join([*lines[self.shown :], end])
                size = len(tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"])
                return Example(
                    id=f"{self.name}/{context_length}/{seed}/{index}",
                    context=f"A rule for your answer: after its last numbered line comes the line {end}\n\n"
                    f"{written.context}\n\n",
                    question=f"{written.question} Write all {len(lines)} lines, each with its number, and nothing "
                    "between them.",
                    answer_prefix="".join(f"{line}\n" for line in lines[: self.shown]),
                    references=(rest,),
                    max_new_tokens=int(size * room) + 1,
                    info={
                        "lines": len(lines),
                        "given": "\n".join(lines[: self.shown]),
                        "end": end,
                        "answer_tokens": size,
                    },
                    thinking_prefix=self.thinking_prefix,
                )

            yield fill(tokenizer, build, context_length=context_length, smallest=self.shown + 2, largest=self.largest)

    @abstractmethod
    def _write(self, rng: random.Random, units: int) -> Written:
        """Make a prompt whose answer has `units` lines."""

    def _right(self, prediction: str, example: Example) -> list[bool]:
        """Whether each of the asked lines is right."""
        found = numbered(prediction)
        return [found.get(number) == line for number, line in numbered(example.references[0]).items()]

    def score(self, prediction: str, example: Example) -> float:
        """Share of the lines that are right, each by its number, wherever it stands."""
        right = self._right(prediction, example)
        return sum(right) / len(right)

    def measures(self, prediction: str, example: Example) -> dict[str, float]:
        """Where the answer first goes wrong, its length, its repetition, and whether it ends as it was told to."""
        right = self._right(prediction, example)
        before = right.index(False) if False in right else len(right)
        last = next((line.strip() for line in reversed(prediction.splitlines()) if line.strip()), "")
        return {
            "whole_answer": float(before == len(right)),
            "before_error": before / len(right),
            **({"first_error": float(self.shown + before + 1)} if before < len(right) else {}),
            "answer_length": len(prediction.strip()) / len(example.references[0]),
            "repetition": repetition(prediction),
            "rule_kept": float(last == example.info["end"]),
        }


class ArithmeticChain(LongAnswer):
    """A running sum, by operations that the short prompt names once and the answer needs in turn to its end."""

    name = "arithmetic_chain"
    summary = "Short prompt, long output: a running sum by eight operations in turn, every step checked"
    operations = 8

    def _write(self, rng: random.Random, units: int) -> Written:
        start, changes = rng.randrange(300, 1000), [0]
        while (
            sum(changes) <= 0
        ):  # sums grow from turn to turn, and three subtractions of less than 100 leave them above 0
            signs = rng.sample([1] * 5 + [-1] * 3, self.operations)
            changes = [sign * rng.randrange(10, 100) for sign in signs]
        value, lines = start, []
        for n in range(units):
            change = changes[n % self.operations]
            lines.append(f"{value} {'+' if change > 0 else '-'} {abs(change)} = {value + change}")
            value += change
        told = ", ".join(f"{'add' if change > 0 else 'subtract'} {abs(change)}" for change in changes)
        return Written(
            f"Begin with {start}. Apply these operations in turn, and then again from the first: {told}.",
            f"Apply {units} operations in all.",
            lines,
        )


class StateUpdates(LongAnswer):
    """The contents of four boxes after each of many moves between them."""

    name = "state_updates"
    summary = "Long output: what four boxes hold after each of a list of moves, every state checked"
    boxes = ("red", "blue", "green", "white")

    def _write(self, rng: random.Random, units: int) -> Written:
        held = {box: rng.randrange(10, 50) for box in self.boxes}
        start, moves, lines = dict(held), [], []
        for n in range(1, units + 1):
            source = rng.choice([box for box in self.boxes if held[box]])
            target = rng.choice([box for box in self.boxes if box != source])
            number = rng.randint(1, min(9, held[source]))
            held[source] -= number
            held[target] += number
            moves.append(f"{n}. move {number} from {source} to {target}")
            lines.append(_state(held))
        return Written(
            f"Four boxes hold coins: {_state(start)}. Coins are moved:\n" + "\n".join(moves),
            "What do the boxes hold after each move?",
            lines,
        )


def _state(held: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in held.items())


class LongCopy(LongAnswer):
    """A list of random words and numbers, to be written again."""

    name = "long_copy"
    summary = "Long output: copy a list of random words and numbers, every line checked"

    def _write(self, rng: random.Random, units: int) -> Written:
        adjectives, nouns = words("adjective"), words("noun")
        lines = [f"{rng.choice(adjectives)} {rng.choice(nouns)} {rng.randrange(1000, 10_000)}" for _ in range(units)]
        listed = "\n".join(f"{n}. {line}" for n, line in enumerate(lines, 1))
        return Written(f"A list:\n{listed}", "Copy the list word by word.", lines)


class LongSort(LongAnswer):
    """Records with numbers, to be written in the order of these."""

    name = "long_sort"
    summary = "Long output: write a list of records in the order of their numbers, every place checked"
    largest = 80_000

    def _write(self, rng: random.Random, units: int) -> Written:
        nouns = words("noun")
        # Drawn one by one, so that a longer list begins as a shorter one does.
        numbers: dict[int, str] = {}
        while len(numbers) < units:
            numbers.setdefault(rng.randrange(10_000, 100_000), rng.choice(nouns))
        listed = "\n".join(f"{number} {noun}" for number, noun in numbers.items())
        return Written(
            f"A list of numbers, each with a name:\n{listed}",
            "Sort the list by its numbers, the smallest first.",
            [f"{number} {noun}" for number, noun in sorted(numbers.items())],
        )


class ConstrainedList(LongAnswer):
    """Words whose first letters are given in turn, none of them twice: there are many right answers."""

    name = "constrained_list"
    summary = "Short prompt, long output: words by given first letters in turn, none twice, every word checked"
    letters = 8
    largest = 8 * 120

    def _write(self, rng: random.Random, units: int) -> Written:
        by_letter: dict[str, list[str]] = {}
        for word in words("noun"):
            if re.fullmatch(r"[a-z]{4,}", word):
                by_letter.setdefault(word[0], []).append(word)
        enough = sorted(letter for letter, found in by_letter.items() if len(found) >= self.largest // self.letters)
        letters = rng.sample(enough, self.letters)
        drawn = {letter: rng.sample(by_letter[letter], self.largest // self.letters) for letter in letters}
        lines = [drawn[letters[n % self.letters]][n // self.letters] for n in range(units)]
        return Written(
            f"Write a list of {units} English words of at least four letters. Their first letters are, in turn and "
            f"then again from the first: {', '.join(letters)}. No word may come twice.",
            "Write a word in each line.",
            lines,
        )

    def _right(self, prediction: str, example: Example) -> list[bool]:
        """Whether each of the asked lines has a word of its letter that stands in no line before it."""
        found, seen, right = numbered(prediction), set(numbered(str(example.info["given"])).values()), []
        for number, possible in numbered(example.references[0]).items():
            word = found.get(number, "").lower()
            fine = re.fullmatch(r"[a-z]{4,}", word) is not None and word[0] == possible[0]
            right.append(fine and word not in seen)
            seen.add(word)
        return right


class ProgramTrace(LongAnswer):
    """What the registers hold after every step of a short program with a loop."""

    name = "program_trace"
    summary = "Short prompt, long output: trace a program of a tiny language, every step checked"
    registers = ("a", "b", "c", "i")

    def _write(self, rng: random.Random, units: int) -> Written:
        program = [f"set {name} {rng.randrange(1, 50)}" for name in "abc"]
        for _ in range(3):
            target, other = rng.sample("abc", 2)
            operand = rng.choice([other, str(rng.randrange(2, 30))])
            program += [f"{rng.choice(['add', 'add', 'sub'])} {target} {operand}", f"mod {target} 100"]
        program += ["add i 1", f"jump 4 if i {units}", "stop"]
        steps = tracing.run(program, self.registers, units)
        listed = "\n".join(f"{n}: {line}" for n, line in enumerate(program, 1))
        return Written(
            "A program for four registers a, b, c and i, which begin at 0. «set», «add», «sub» and «mod» change the "
            "first register by what follows it, a number or another register; «mod» keeps what is left of a division, "
            "never less than 0; «jump n if r x» goes on at line n if r is less than x. The program:\n" + listed,
            f"Trace the first {units} steps of the program: the line that is run, and the registers after it.",
            [f"line {step.line}: {' '.join(f'{k}={v}' for k, v in step.registers.items())}" for step in steps],
        )


LONG_ANSWERS: list[type[Task]] = [ArithmeticChain, StateUpdates, LongCopy, LongSort, ConstrainedList, ProgramTrace]
