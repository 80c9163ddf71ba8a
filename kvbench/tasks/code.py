"""Long answers to short prompts: a module written out by a rule, and the classes of ClassEval."""

import random
import re
from collections.abc import Iterator
from typing import Any, cast

from pydantic import Field

from kvbench.contract.task import Example, Task
from kvbench.tasks.files import FileOptions, FileTask
from kvbench.tasks.metrics import check_installed, edit_similarity
from kvbench.tasks.prompts import fill


class LongCode(Task):
    """A Python module of many functions, written out by a rule that the short prompt gives with three of them.

    The functions' constants come from the prompt, in turn: the answer needs it to its end. The prompt and the right
    answer fill the context, and the model may generate a tenth more tokens than the right answer takes.
    """

    name = "long_code"
    summary = "Short prompt, long output: write a Python module of many functions by a rule"
    shown, constants = 3, 8

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield examples with as many functions as fit."""
        for index in range(count):

            def build(functions: int, index: int = index) -> Example:
                rng = random.Random(f"{seed} {self.name} {index}")
                constants = rng.sample(range(1000, 10_000), self.constants)
                sign = rng.choice("+-*")
                last = self.shown + functions
                code = [
                    f'def step_{n}(x):\n    """Step {n} of {last}."""\n    return step_{n - 1}(x) {sign} '
                    f"{constants[(n - 1) % self.constants]}\n"
                    for n in range(1, last + 1)
                ]
                code[0] = code[0].replace("step_0(x)", "x")
                begun, rest = "\n".join(code[: self.shown]), "\n" + "\n".join(code[self.shown :])
                size = len(tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"])
                return Example(
                    id=f"{self.name}/{context_length}/{seed}/{index}",
                    context=(
                        f"Write a Python module with the functions step_1 to step_{last}. step_1(x) returns x {sign} "
                        f"the first constant, and every other function returns the result of the one before it {sign} "
                        "the next constant. The constants are, in turn and then again from the first: "
                        f"{', '.join(map(str, constants))}.\n"
                    ),
                    question=f"Write out all {last} functions, without any other text.",
                    answer_prefix=f"```python\n{begun}",
                    references=(rest.strip(),),
                    max_new_tokens=size + size // 10,
                    info={"haystack": "functions", "haystack_units": functions, "answer_tokens": size},
                    thinking_prefix=self.thinking_prefix,
                )

            yield fill(tokenizer, build, context_length=context_length)

    def score(self, prediction: str, example: Example) -> float:
        """Share of the functions that are written right, letter by letter, wherever they stand."""
        wanted = example.references[0].split("\n\n")
        written = {part.strip() for part in re.split(r"\n\s*\n|```", prediction)}
        return sum(function.strip() in written for function in wanted) / len(wanted)


class ClassEval(FileTask):
    """A whole Python class from its skeleton; the score is the edit similarity to the published solution.

    ClassEval's own score, pass@k, runs the answer's code, which kvbench never does: the two are not comparable.
    """

    name = "classeval"
    summary = "ClassEval: complete a Python class, scored by edit similarity (needs its published file)"
    reference = "ClassEval, arXiv:2308.01861"
    patterns = ("ClassEval_data.json", "data/test-*.parquet")
    published = "ClassEval's data (hub dataset FudanSELab/ClassEval)"

    class Options(FileOptions):
        """Where the published file is, and how long an answer may be."""

        max_new_tokens: int = Field(1024, ge=1, description="Most tokens to generate.")

    def data(self) -> dict[str, str]:
        """Name the published file and its hash."""
        check_installed("edit_similarity")
        return super().data()

    def build(self, row: Any, name: str) -> list[Example]:
        """Make the example of a row, with the published prompt for whole classes."""
        return [
            Example(
                id=f"{name}/{row['task_id']}",
                context=f"Please complete the class {row['class_name']} in the following code.\n{row['skeleton']}",
                question="",
                answer_prefix="",
                references=(row["solution_code"],),
                max_new_tokens=cast("ClassEval.Options", self.options).max_new_tokens,
            )
        ]

    def score(self, prediction: str, example: Example) -> float:
        """Edit similarity of the first code block, or else of the whole answer, to the solution."""
        block = re.search(r"```\w*\n(.*?)(```|\Z)", prediction, re.DOTALL)
        return edit_similarity((block.group(1) if block else prediction).strip(), example.references)
