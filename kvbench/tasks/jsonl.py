"""Examples from a user's file: a task without code."""

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import parse_json, read_bytes, reading
from kvbench.contract.task import Example, Task, TaskOptions
from kvbench.tasks.metrics import METRICS, check_installed
from kvbench.tasks.prompts import prompt_length

Metric = Literal[
    "string_match_all", "string_match_part", "exact_match", "f1", "rouge_l", "rouge_lsum", "bleu", "chrf",
    "edit_similarity",
]  # fmt: skip


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    input: str = Field(min_length=1)
    outputs: list[str] = Field(min_length=1)
    context: str = ""
    answer_prefix: str = ""
    metric: Metric | None = None
    max_new_tokens: int | None = Field(None, ge=1)

    @field_validator("outputs", mode="before")
    @classmethod
    def _one_output(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class JsonLines(Task):
    """The lines of a JSONL file, in order: `input`, `outputs`, and where wanted `context`, `answer_prefix`, `metric`.

    With `context`, that is the context and `input` the question; without it `input` is all context. Nothing is cut: a
    line that is too long for the context length is an error, and shorter ones stay as they are.
    """

    name = "jsonl"
    summary = "Examples from your own JSONL file with input and outputs (--task-option path=FILE)"

    class Options(TaskOptions):
        """The file, and what its lines leave open: the metric and the most tokens to generate."""

        path: str = Field("", description="The file.")
        metric: Metric = Field("string_match_all", description="Metric of the lines that name none.")
        max_new_tokens: int = Field(128, ge=1, description="Most tokens to generate, for lines that do not say.")

    @property
    def _options(self) -> "JsonLines.Options":
        return cast("JsonLines.Options", self.options)

    def data(self) -> dict[str, str]:
        """Name the file and its hash."""
        file = self._file()
        # What is wrong with a line, or is not installed, is told before a model is loaded.
        lines = _read(file, file.stat().st_mtime_ns)
        for metric in sorted({line.metric or self._options.metric for _, line in lines}):
            check_installed(metric)
        return {"haystack": file.name, "haystack_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield the first `count` lines; the seed changes nothing."""
        file = self._file()
        for number, line in _read(file, file.stat().st_mtime_ns)[:count]:
            example = Example(
                id=f"{self.name}/{file.stem}/{number}",
                context=line.context or line.input,
                question=line.input if line.context else "",
                answer_prefix=line.answer_prefix,
                references=tuple(line.outputs),
                max_new_tokens=line.max_new_tokens or self._options.max_new_tokens,
                info={"haystack": file.name, "line": number, "metric": line.metric or self._options.metric},
                thinking_prefix=self.thinking_prefix,
            )
            if (size := prompt_length(tokenizer, example) + example.max_new_tokens) > context_length:
                raise KVBenchError(
                    f"Line {number} of {file} takes {size} tokens with its answer ({example.max_new_tokens}), more "
                    f"than the context length of {context_length}: ask for a longer one, or shorten the line."
                )
            yield example

    def score(self, prediction: str, example: Example) -> float:
        """Score by the line's metric, or else the option's."""
        return METRICS[str(example.info["metric"])](prediction, example.references)

    def _file(self) -> Path:
        if not self._options.path:
            raise KVBenchError("The task jsonl needs a file: give it with --task-option path=FILE.jsonl.")
        file = Path(self._options.path).expanduser()
        if not file.is_file():
            raise KVBenchError(f"There is no file {file}: give the task jsonl an existing file as path.")
        return file


@cache
def _read(file: Path, _mtime: int) -> list[tuple[int, _Line]]:
    with reading(lambda reason: f"{file} cannot be read ({reason}): give the task jsonl a text file."):
        try:
            texts = read_bytes(file).decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError as error:
            raise KVBenchError(
                f"{file} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8."
            ) from None
    lines = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            lines.append((number, _Line.model_validate(parse_json(text, ours=False))))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the line"
            raise KVBenchError(
                f"Line {number} of {file} is not an example ({place}: {first['msg']}): expected an object such as "
                '{"input": "…", "outputs": ["…"]}.'
            ) from None
        except ValueError as error:
            raise KVBenchError(f"Line {number} of {file} is not JSON ({error}): expected one object a line.") from None
    if not lines:
        raise KVBenchError(f'{file} holds no examples: expected lines such as {{"input": "…", "outputs": ["…"]}}.')
    return lines
