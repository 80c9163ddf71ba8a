"""∞-Bench's generated tasks (Zhang et al. 2024, arXiv:2402.13718), scaled to the asked length.

As published they are 44 to 122 thousand tokens long and were drawn without a seed: what can be had again is their
recipe.
"""

import json
import random
import re
import statistics
import uuid
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from kvbench.tasks.base import Example, Task, fill
from kvbench.tasks.texts import NOISE

GOLDEN_RATIO = (5**0.5 - 1) / 2


class InfiniteBenchTask(Task):
    """Common part: examples of any length, and positions that sweep the context evenly for any number of examples."""

    reference = "∞-Bench, arXiv:2402.13718"
    smallest: ClassVar[int] = 1

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield examples of the published form with as many lines, pairs, numbers or functions as fit."""
        start = random.Random(f"{seed} {self.name}").random()
        for index in range(count):

            def build(units: int, index: int = index) -> Example:
                rng = random.Random(f"{seed} {self.name} {index}")
                position = int((start + index * GOLDEN_RATIO) % 1 * units)
                return self._build(f"{self.name}/{context_length}/{seed}/{index}", rng, units, position, index)

            yield fill(tokenizer, build, context_length=context_length, smallest=self.smallest)

    @abstractmethod
    def _build(self, name: str, rng: random.Random, units: int, position: int, index: int) -> Example: ...


class _NoiseTask(InfiniteBenchTask):
    """One line with a number in lines of noise; the first number of the answer counts."""

    task: ClassVar[str]
    wanted: ClassVar[str]
    max_new_tokens: ClassVar[int]

    @staticmethod
    @abstractmethod
    def _digits(rng: random.Random) -> str: ...

    def _build(self, name: str, rng: random.Random, units: int, position: int, index: int) -> Example:
        digits = self._digits(rng)
        lines = [NOISE] * units
        needle = f"The {self.wanted} is {digits}. Remember it. {digits} is the {self.wanted}."
        lines.insert(position, needle)
        body = "\n".join(lines)
        return Example(
            id=name,
            context=f"There is an important info hidden inside a lot of irrelevant text. {self.task}\n\n{body}\n\n",
            question=f"What is the {self.wanted}?",
            answer_prefix=f"The {self.wanted} is",
            references=(digits,),
            max_new_tokens=self.max_new_tokens,
            info={
                "haystack": "noise",
                "haystack_units": units,
                "needle": needle,
                "depth": round(100 * position / units, 2),
            },
        )

    def score(self, prediction: str, example: Example) -> float:
        """1 if the first run of digits in the prediction is the asked one, else 0."""
        found = re.search(r"[0-9]+", prediction)
        return float(found is not None and found.group() == example.references[0])


class Passkey(_NoiseTask):
    """Five digits in noise."""

    name = "infinitebench_passkey"
    summary = "∞-Bench, scaled: find five digits in repeated noise sentences"
    task = "Find it and memorize it. I will quiz you about the important information."
    wanted = "pass key"
    max_new_tokens = 6

    @staticmethod
    def _digits(rng: random.Random) -> str:
        return "".join(rng.choices("0123456789", k=5))


class NumberString(_NoiseTask):
    """Ten digits in noise, five of them repeats of their neighbours."""

    name = "infinitebench_number_string"
    summary = "∞-Bench, scaled: find ten digits with repeats in repeated noise sentences"
    task = "Find it. I will quiz you about the important information there."
    wanted = "sequence of digits"
    max_new_tokens = 12

    @staticmethod
    def _digits(rng: random.Random) -> str:
        digits = rng.choices("0123456789", k=5)
        while len(digits) < 10:
            place = rng.randrange(len(digits))
            digits.insert(place, digits[place])
        return "".join(digits)


class KVRetrieval(InfiniteBenchTask):
    """The value of one key in a JSON object of UUIDs."""

    name = "infinitebench_kv_retrieval"
    summary = "∞-Bench, scaled: find the value of a key in a JSON object of UUIDs"

    def _build(self, name: str, rng: random.Random, units: int, position: int, index: int) -> Example:
        drawn = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2 * units)]
        pairs = dict(zip(drawn[::2], drawn[1::2], strict=True))
        key = drawn[2 * position]
        return Example(
            id=name,
            context=(
                "Extract the value corresponding to the specified key in the JSON object below.\n\n"
                f"JSON data:\n{json.dumps(pairs)}\n\n"
            ),
            question=f'Key: "{key}"',
            answer_prefix="The value associated with the specified key is:",
            references=(pairs[key],),
            max_new_tokens=50,
            info={"haystack": "uuid pairs", "haystack_units": units, "depth": round(100 * position / units, 2)},
        )

    def score(self, prediction: str, example: Example) -> float:
        """1 if the value is among the words of the prediction, else 0."""
        return float(example.references[0] in re.sub(r"[\n:\"'.,?!{}]", " ", prediction).split())


class MathFind(InfiniteBenchTask):
    """One of the extreme numbers or the median of a list, the seven kinds of question in turn."""

    name = "infinitebench_math_find"
    summary = "∞-Bench, scaled: find the largest, smallest or median number of a list"
    smallest = 16
    kinds: ClassVar[tuple[str, ...]] = (
        "largest number",
        "second largest number",
        "third largest number",
        "smallest number",
        "second smallest number",
        "third smallest number",
        "median number",
    )

    def _build(self, name: str, rng: random.Random, units: int, position: int, index: int) -> Example:
        kind = self.kinds[index % len(self.kinds)]
        low, high = 0, 99
        # The end that is asked for varies, or every long list would have the same answer.
        if "smallest" in kind or (kind == "median number" and rng.random() > 0.5):
            low = rng.randint(0, 19)
        else:
            high = rng.randint(79, 99)
        numbers = [rng.randint(low, high) for _ in range(units)]
        if kind == "median number":
            answer = statistics.median(numbers)
        else:
            rank = ("second" in kind) + 2 * ("third" in kind)
            answer = sorted(set(numbers), reverse="largest" in kind)[rank]
        return Example(
            id=name,
            context=f"What is the {kind} in the following list?\n\n{numbers}\n\n",
            question="You should answer with only one number, no other words.",
            answer_prefix=f"The {kind} of the list is:",
            references=(f"{answer:g}",),
            max_new_tokens=3,
            info={"haystack": "integers", "haystack_units": units, "kind": kind},
        )

    def score(self, prediction: str, example: Example) -> float:
        """1 if the first number in the prediction is the asked one, else 0."""
        found = re.search(r"[0-9]+(\.[0-9]+)?", prediction)
        return float(found is not None and float(found.group()) == float(example.references[0]))


class CodeRun(InfiniteBenchTask):
    """The value of a function that calls others, 2 to 10 deep, among Python functions that add or subtract."""

    name = "infinitebench_code_run"
    summary = "∞-Bench, scaled: compute a chain of Python function calls"
    smallest = 10
    call_depths: ClassVar[tuple[int, ...]] = (2, 4, 6, 8, 10)

    def _build(self, name: str, rng: random.Random, units: int, position: int, index: int) -> Example:
        depth = self.call_depths[index % len(self.call_depths)]
        width = units // depth
        numbers = rng.sample(range(1, 2 * units + 1), depth * width)
        layers = [numbers[start : start + width] for start in range(0, len(numbers), width)]
        steps: dict[int, tuple[int | None, int]] = {}
        for place, layer in enumerate(layers):
            for number in layer:
                called = rng.choice(layers[place + 1]) if place + 1 < depth else None
                steps[number] = called, rng.randint(-12, 17)
        lines = []
        for number in sorted(steps):
            called, added = steps[number]
            value = "x" if called is None else f"func_{called}(x)"
            change = f" {'-' if added < 0 else '+'} {abs(added)}" if added else ""
            lines.append(f"def func_{number}(x):\n    return {value}{change}\n")
        asked, argument = rng.choice(layers[0]), rng.randint(-10, 10)
        result, follow = argument, asked
        for _ in range(depth):
            called, added = steps[follow]
            result += added
            follow = called or follow
        call = f"func_{asked}({argument})"
        code = "\n".join(lines)
        return Example(
            id=name,
            context=f"There is a function called func_{asked} in the following Python code.\n\n{code}\n\n",
            question=f"Please compute the exact value of {call}.",
            answer_prefix=f"The value of {call} is",
            references=(str(result),),
            max_new_tokens=5,
            info={"haystack": "functions", "haystack_units": len(steps), "call_depth": depth},
        )

    def score(self, prediction: str, example: Example) -> float:
        """1 if the last word of the prediction is the asked integer, else 0."""
        parts = re.sub(r"[\n.`'\":]", " ", prediction).split()
        return float(
            bool(parts)
            and re.fullmatch(r"[+-]?[0-9]+", parts[-1]) is not None
            and int(parts[-1]) == int(example.references[0])
        )
