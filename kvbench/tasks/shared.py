"""Several requests about one context: needles that work offline, and SCBench's tasks from their published files.

SCBench (Li et al. 2024, arXiv:2412.10319) in its multi-request mode: every question is a request of its own, and none
sees the others or their answers. The examples of one context follow each other and have it in common word for word.
"""

import re
from collections.abc import Iterator
from typing import Any, ClassVar, cast

from pydantic import BaseModel, Field

from kvbench.contract.extras import need
from kvbench.contract.task import Example, Task
from kvbench.tasks.files import FileTask
from kvbench.tasks.infinitebench_files import choice_right
from kvbench.tasks.metrics import check_installed, f1_characters, rouge_lsum, string_match_all
from kvbench.tasks.prompts import fill
from kvbench.tasks.ruler import NeedleTask, RulerFileOptions

REFERENCE = "SCBench, arXiv:2412.10319"


class SharedNeedles(NeedleTask):
    """Numbers in essays, as in `niah_multikey_1`, each asked for by a request of its own."""

    name = "shared_needles"
    summary = "Several numbers in one context of essays, each asked for by a request of its own"
    reference = f"RULER, arXiv:2404.06654; {REFERENCE}"

    class Options(RulerFileOptions):
        """How many requests there are to a context, and where the essays are."""

        requests: int = Field(4, ge=1, le=40, description="Requests to each context.")

    def __init__(self, options: BaseModel | None = None) -> None:
        super().__init__(options)
        self.keys = cast("SharedNeedles.Options", self.options).requests

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield examples, those of one context one after another."""
        for index in range(-(-count // self.keys)):

            def build(units: int, index: int = index) -> list[Example]:
                return [self._build(units, context_length, seed, index, request) for request in range(self.keys)]

            def longest(units: int) -> Example:
                return max(build(units), key=lambda made: len(tokenizer(made.question + made.answer_prefix).input_ids))

            filled = fill(tokenizer, longest, context_length=context_length, smallest=self.keys)
            yield from build(int(filled.info["haystack_units"]))[: count - index * self.keys]


_SIMPLE = "{context}\n\n"
_KEY = "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n"
_BOOK = "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\n"

SCBENCH_TASKS: dict[str, tuple[str, str, str, int]] = {
    "kv": (_KEY, "{input}", "contains", 150),
    "prefix_suffix": (_SIMPLE, "{input}", "contains", 150),
    "vt": (_SIMPLE, "{input}", "all", 30),
    "repoqa": (
        "Based on the function description and code context, please retrieve and repeat the exact described function "
        "from the code context in a code block wrapped by ```:\n\n{context}\n\n",
        "{input}", "function", 1024,
    ),
    "qa_eng": (_BOOK, "Question: {input}\nAnswer:", "any", 40),
    "qa_chn": ("阅读以下书籍然后回答问题。\n\n{context}\n\n", "问题：{input}\n答案：", "characters", 40),
    "choice_eng": (
        "Read the book and answer the question.\n\n{context}\n\n",
        "Question: {input}\n{options}\n\nThe the correct answer is", "choice", 40,
    ),
    "many_shot": (_SIMPLE, "{input}", "any", 10),
    "mf": ("{first}\n\n{context}\n\n", "{what}\n\n{input}", "number", 5),
    "summary": (_SIMPLE, "{input}", "rouge", 200),
    "summary_with_needles": (_SIMPLE, "{input}", "", 0),
    "repoqa_and_kv": (_SIMPLE, "{input}", "", 0),
}  # fmt: skip
"""Prompt before the context and after it, metric and most new tokens of each task, as published; the last two mix two
kinds of question."""

_MIXED = {
    "scbench_summary": ("rouge", 800), "scbench_passkey": ("digits", 15), "scbench_repoqa": ("function", 1024),
    "scbench_kv": ("contains", 80),
}  # fmt: skip


class SCBench(FileTask):
    """One task of SCBench in multi-request mode, with its published prompt, answer length and metric."""

    reference = REFERENCE
    published = "SCBench's data (hub dataset microsoft/SCBench)"
    task: ClassVar[str]

    def data(self) -> dict[str, str]:
        """Name the published file and its hash."""
        metric = SCBENCH_TASKS[self.task][2]
        kinds = [metric] if metric else [kind for kind, _ in _MIXED.values()]
        for name in kinds:
            check_installed({"rouge": "rouge_lsum", "function": "function_right"}.get(name, name))
        return super().data()

    def build(self, row: Any, name: str) -> list[Example]:
        """Make the examples of a row: one for each of its questions."""
        before, after, metric, max_new_tokens = SCBENCH_TASKS[self.task]
        turns = row["multi_turns"]
        context = before.replace("{first}", turns[0]["input"])
        context = context.replace("{context}", row["context"] if row.get("context") else row["input"])
        examples = []
        for number, turn in enumerate(turns):
            question = after.replace("{input}", turn["input"])
            if "{options}" in question:
                listed = zip("ABCD", turn["options"], strict=True)
                question = question.replace("{options}", "\n".join(f"{letter}. {text}" for letter, text in listed))
            if "{what}" in question:
                asked = re.search(r"The (.+) is", turn["input"])
                question = question.replace("{what}", f"What is the {asked.group(1).lower()}?" if asked else "").strip()
            kind = _MIXED[turn["task"]] if not metric else (metric, max_new_tokens)
            answer = turn["answer"]
            references = tuple(str(part) for part in (answer if isinstance(answer, list) else [answer]))
            if not references:
                raise ValueError("no answer")
            if kind[0] == "choice":
                options, given = turn["options"], references[0]
                place = "ABCD".index(given) if given in tuple("ABCD") else options.index(given)
                references = (options[place], "ABCD"[place])
            examples.append(
                Example(
                    id=f"{name}.{number}", context=context, question=question, answer_prefix="",
                    references=references, max_new_tokens=kind[1], info={"metric": kind[0], "request": number},
                )
            )  # fmt: skip
        return examples

    def score(self, prediction: str, example: Example) -> float:
        """Score by the metric of the task, or of the kind of question where it mixes two."""
        references = example.references
        match example.info["metric"]:
            case "contains":
                return float(references[0] in prediction)
            case "all":
                return string_match_all(prediction, references)
            case "any":
                return float(any(reference.upper() in prediction.strip().upper() for reference in references))
            case "characters":
                return f1_characters(prediction, references)
            case "choice":
                return float(choice_right(prediction, references))
            case "number":
                found = re.search(r"[0-9]+(\.[0-9]+)?", prediction)
                return float(found is not None and float(found.group()) == float(references[0]))
            case "digits":
                found = re.search(r"[0-9]+", prediction)
                return float(found is not None and found.group() == references[0])
            case "function":
                return function_right(prediction, references[0])
            case _:
                return rouge_lsum(prediction, references)


def function_right(prediction: str, function: str) -> float:
    """1 where the first code block's smoothed sentence BLEU of white-space words against `function` is at least 0.8.

    This is RepoQA's criterion (arXiv:2406.06025) without its comparison to the other functions.
    """
    block = re.search(r"^```\w*\s*\n(.*?)^```", prediction.strip(), re.DOTALL | re.MULTILINE)
    words = (block.group(1) if block else prediction).split()
    if not words:
        return 0.0
    scores = need("nltk.translate.bleu_score", "The metric function_right")  # comes with rouge-score
    smoothed = scores.SmoothingFunction().method4
    return float(scores.sentence_bleu([function.split()], words, smoothing_function=smoothed) >= 0.8)


def _task(task: str) -> type[Task]:
    old = f"multi_turn_{task}"
    return type(
        f"SCBench_{task}",
        (SCBench,),
        {
            "__doc__": SCBench.__doc__,
            "__module__": __name__,
            "name": f"scbench_{task}",
            "summary": f"SCBench: {task}, each question of a context a request of its own (needs its published file)",
            "task": task,
            "patterns": (f"scbench_{task}.jsonl", f"scbench_{task}/*.parquet", f"{old}.jsonl", f"{old}/*.parquet"),
        },
    )


SCBENCH: list[type[Task]] = [_task(task) for task in SCBENCH_TASKS]
"""A task for each of SCBench's."""
