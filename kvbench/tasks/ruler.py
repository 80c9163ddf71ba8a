"""RULER's needle-in-a-haystack tasks (Hsieh et al. 2024, arXiv:2404.06654)."""

import random
import re
import uuid
from collections.abc import Container, Iterator
from itertools import cycle, islice
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field, field_validator

from kvbench.contract.task import Example, Task, TaskOptions
from kvbench.tasks.files import FileOptions
from kvbench.tasks.metrics import string_match_all
from kvbench.tasks.prompts import fill
from kvbench.tasks.texts import NOISE, Text, essays, words

DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""40 evenly spaced depths in percent."""

Release = Annotated[
    Literal["2025", "2024"], BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)
]
"""Which of RULER's wordings."""


class ReleaseOptions(TaskOptions):
    """Which of RULER's wordings to use."""

    release: Release = Field(
        default="2025",
        description="RULER's wording: the present one (since May 2025), or the one before.",
    )

    def prefix(self, text: str) -> str:
        """The answer prefix as the release has it: the present one puts a space before it."""
        return f" {text}" if self.release == "2025" else text


class RulerFileOptions(FileOptions, ReleaseOptions):
    """RULER's wording, and where the essays are."""


NEEDLE = "One of the special magic {values} for {key} is: {value}."


class NeedleTask(Task):
    """Needles «One of the special magic numbers for KEY is: VALUE.» in a haystack, and a question about some of them.

    Subclasses set the haystack and the numbers of needles. The examples' `info` gives the haystack, the asked needles'
    depths in percent, and the sentence of the first asked needle.
    """

    reference = "RULER, arXiv:2404.06654"
    Options: ClassVar[type[BaseModel]] = RulerFileOptions
    haystack: ClassVar[Literal["noise", "essays", "needles"]] = "essays"
    key_type: ClassVar[Literal["words", "uuids"]] = "words"
    value_type: ClassVar[Literal["numbers", "uuids"]] = "numbers"
    keys: int = 1
    values_per_key: ClassVar[int] = 1
    queries: ClassVar[int] = 1

    def data(self) -> dict[str, str]:
        """Name the haystack's text and its hash."""
        if self.haystack != "essays":
            return {"haystack": self.haystack}
        text = self._essays()
        return {"haystack": text.name, "haystack_sha256": text.sha256}

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield examples; haystacks are lines of noise or needles, or the first words of the essays."""
        for index in range(count):
            yield fill(
                tokenizer,
                lambda units, index=index: self._build(units, context_length, seed, index),  # type: ignore[misc]
                context_length=context_length,
                smallest=self.keys * self.values_per_key,
            )

    def score(self, prediction: str, example: Example) -> float:
        """Share of the asked values that occur in the prediction."""
        return string_match_all(prediction, example.references)

    def _essays(self) -> Text:
        return essays(self.options) if isinstance(self.options, FileOptions) else essays()

    def _build(self, units: int, context_length: int, seed: int, index: int, request: int = 0) -> Example:
        """Make example `index` with `units` of haystack; its requests differ in the keys that are asked for."""
        # A string seeds the same stream in every process and Python version.
        rng = random.Random(f"{seed} {self.name} {index}")
        keys: dict[str, list[str]] = {}
        for _ in range(self.keys):
            keys[self._new_key(rng, keys)] = [_draw(rng, self.value_type) for _ in range(self.values_per_key)]
        asked = rng.sample(list(keys), self.keys)[request : request + self.queries]
        needles = [(key, self._needle(key, value)) for key, values in keys.items() for value in values]
        rng.shuffle(needles)

        if self.haystack == "essays":
            text = " ".join(islice(cycle(self._essays().words), units))
            parts = re.split(r"(?<=[.!?])\s+", text)
            depths = self._depths(rng, index, len(needles))
            positions = [int(len(parts) * depth / 100) for depth in depths]
        else:
            positions = sorted(rng.sample(range(units), len(needles)))
            depths = [100 * position / units for position in positions]
            if self.haystack == "noise":
                parts = [NOISE] * units
            else:
                parts = [self._needle(self._new_key(rng, keys), _draw(rng, self.value_type)) for _ in range(units)]
        for position, (_, needle) in reversed(list(zip(positions, needles, strict=True))):
            parts.insert(position, needle)

        one = self.queries * self.values_per_key == 1
        noun = self.value_type[:-1] if one else self.value_type
        are, are_all = ("is", "is") if one else ("are", "are all")
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        body = (" " if self.haystack == "essays" else "\n").join(parts)
        asked_depths = [depth for depth, (key, _) in zip(depths, needles, strict=True) if key in asked]
        info: dict[str, str | int | float] = {
            **self.data(),
            "haystack_units": units,
            "needle": next(needle for key, needle in needles if key == asked[0]),
            "depth": round(asked_depths[0], 2),
        }
        if len(asked_depths) > 1:
            info["depths"] = ", ".join(f"{depth:.4g}" for depth in asked_depths)
        return Example(
            id=f"{self.name}/{context_length}/{seed}/{index}" + (f".{request}" if request else ""),
            context=(
                f"{'A' if one else 'Some'} special magic {noun} {are} hidden within the following "
                f"text. Make sure to memorize it. I will quiz you about the {noun} afterwards.\n{body}\n"
            ),
            question=f"What {are_all} the special magic {noun} for {query} mentioned in the provided text?",
            answer_prefix=cast("ReleaseOptions", self.options).prefix(
                f"The special magic {noun} for {query} mentioned in the provided text {are}"
            ),
            references=tuple(value for key in asked for value in keys[key]),
            max_new_tokens=128,
            info=info,
            thinking_prefix=self.thinking_prefix,
        )

    def _new_key(self, rng: random.Random, taken: Container[str]) -> str:
        while (key := _draw(rng, self.key_type)) in taken:
            pass
        return key

    def _depths(self, rng: random.Random, index: int, count: int) -> list[float]:
        """Draw the depths of an example's needles in essays, in percent and in ascending order."""
        return [*sorted(rng.sample(DEPTHS, count))]

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(values=self.value_type, key=key, value=value)


def _draw(rng: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"


class NiahSingle1(NeedleTask):
    """One number in lines of noise."""

    name = "niah_single_1"
    summary = "RULER: find one number in repeated noise sentences"
    Options = ReleaseOptions
    haystack = "noise"


class NiahSingle2(NeedleTask):
    """One number in essays."""

    name = "niah_single_2"
    summary = "RULER: find one number in essays"


class NeedleGrid(NeedleTask):
    """One number in essays at each of the chosen depths in turn; runs at several lengths make the grid."""

    name = "needle_grid"
    summary = "One number in essays at chosen depths in turn: depth by length with a run for each length"
    reference = "RULER, arXiv:2404.06654; github.com/gkamradt/LLMTest_NeedleInAHaystack"

    class Options(RulerFileOptions):
        """Where the needles are, and the essays."""

        depths: tuple[Annotated[float, Field(ge=0, le=100)], ...] = Field(
            (0, 25, 50, 75, 100), min_length=1, description="Depths in percent, separated by commas, taken in turn."
        )

        @field_validator("depths", mode="before")
        @classmethod
        def _split(cls, value: object) -> object:
            return value.split(",") if isinstance(value, str) else value

    def _depths(self, rng: random.Random, index: int, count: int) -> list[float]:
        depths = cast("NeedleGrid.Options", self.options).depths
        return [depths[index % len(depths)]]


class NiahSingle3(NeedleTask):
    """One UUID in essays."""

    name = "niah_single_3"
    summary = "RULER: find one UUID in essays"
    value_type = "uuids"


class NiahMultikey1(NeedleTask):
    """One of four numbers in essays."""

    name = "niah_multikey_1"
    summary = "RULER: find one of four numbers in essays"
    keys = 4


class NiahMultikey2(NeedleTask):
    """One number in a haystack of needles."""

    name = "niah_multikey_2"
    summary = "RULER: find one number in a haystack made of needles"
    Options = ReleaseOptions
    haystack = "needles"


class NiahMultikey3(NeedleTask):
    """One UUID by its UUID in a haystack of needles."""

    name = "niah_multikey_3"
    summary = "RULER: find one UUID by a UUID in a haystack made of needles"
    Options = ReleaseOptions
    haystack = "needles"
    key_type = "uuids"
    value_type = "uuids"


class NiahMultivalue(NeedleTask):
    """Four numbers of one key in essays."""

    name = "niah_multivalue"
    summary = "RULER: find all four numbers of one key in essays"
    values_per_key = 4


class NiahMultiquery(NeedleTask):
    """Four keys asked at once in essays."""

    name = "niah_multiquery"
    summary = "RULER: find the numbers of four keys in essays"
    keys = 4
    queries = 4
