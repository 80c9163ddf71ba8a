"""Published files of benchmarks: from the user's folder, or from a hub dataset that the user names."""

import fnmatch
import hashlib
import os
import random
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

from pydantic import Field

from kvbench.contract.errors import KVBenchError, one_line
from kvbench.contract.extras import need
from kvbench.contract.reading import parse_json, plain, read_bytes, reading
from kvbench.contract.task import Example, Task, TaskOptions
from kvbench.tasks.prompts import prompt_length

LARGEST = 2**32
"""Bytes that a member of an archive may unpack to."""


class FileOptions(TaskOptions):
    """Where the published files are."""

    path: str = Field(default="", description="Folder of the published files, or one of them; otherwise KVBENCH_DATA.")
    hub: str = Field(
        default="", description="Hub dataset (owner/name) to fetch them from; nothing is fetched without it."
    )


def data_folder() -> Path | None:
    """Give the folder that KVBENCH_DATA names, or None where it is not set; raises KVBenchError where it is missing."""
    name = os.environ.get("KVBENCH_DATA")
    if not name:
        return None
    if not Path(name).is_dir():
        raise KVBenchError(f"KVBENCH_DATA names {name}, which is not a folder: create it, or unset KVBENCH_DATA.")
    return Path(name)


@dataclass(frozen=True)
class Published:
    """The content of a published file, its rows or for a JSON file whatever it holds, known by its name and sha256.

    `place` is where it was found.
    """

    name: str
    sha256: str
    content: Any = field(compare=False)
    place: str = field(compare=False)


def load(options: FileOptions, patterns: Sequence[str], what: str) -> Published:
    """Read the first file that matches one of `patterns` (globs below the folder, also inside .zip files there).

    Raises KVBenchError, naming `what` is sought and where to put it, where there is none or it cannot be read.
    """
    if options.path and options.hub:
        raise KVBenchError(f"Both path={options.path} and hub={options.hub} were given: give one of them.")
    if options.hub:
        folder: Path | None = _fetch(options.hub, patterns)
    elif options.path:
        folder = Path(options.path).expanduser()
        if folder.is_file() and folder.suffix != ".zip":
            return _read(folder, "", folder.stat().st_mtime_ns)
        if not folder.exists():
            raise KVBenchError(f"There is no folder or file {folder}: give an existing one as path.")
    else:
        folder = data_folder()
    found = _find(folder, patterns) if folder else None
    if found is None and options.hub:
        raise KVBenchError(
            f"The hub dataset {options.hub} has no file {patterns[0]} (this task needs {what}): check the name."
        )
    if found is None:
        where = f"{folder}" + ("" if options.path else " (KVBENCH_DATA)")
        if folder is None:
            where = "a folder that KVBENCH_DATA names, or that you give with --task-option path=FOLDER"
        raise KVBenchError(
            f"This task needs {what}, which is not part of kvbench: put the file {patterns[0]} into {where}."
        )
    file, member = found
    return _read(file, member, file.stat().st_mtime_ns)


def _find(folder: Path, patterns: Sequence[str]) -> tuple[Path, str] | None:
    for pattern in patterns:
        for file in [*sorted(folder.glob(pattern)), *sorted(folder.rglob(pattern))]:
            if file.is_file():
                return file, ""
    damaged: list[KVBenchError] = []
    for archive in [folder] if folder.is_file() else sorted(folder.glob("*.zip")):
        try:
            members = _members(archive)
        except KVBenchError as error:
            damaged.append(error)
            continue
        for pattern in patterns:
            for member in members:
                if fnmatch.fnmatch(member, pattern) or fnmatch.fnmatch(member, f"*/{pattern}"):
                    return archive, member
    if damaged:
        raise damaged[0]
    return None


def _members(archive: Path) -> list[str]:
    with reading(_unreadable(archive)), zipfile.ZipFile(archive) as opened:
        return sorted(opened.namelist())


def _unreadable(file: Path) -> Callable[[str], str]:
    return lambda reason: f"{file} cannot be read ({reason}): fetch it again."


def _fetch(hub: str, patterns: Sequence[str]) -> Path:
    """Give the folder of a hub dataset's snapshot that holds the files of these names, fetched where they are not."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, and seldom needed

    wanted = [*patterns, *(f"*/{pattern}" for pattern in patterns), "data.zip"]
    try:
        return Path(snapshot_download(hub, repo_type="dataset", allow_patterns=wanted))
    except Exception as error:  # the hub client raises whatever its network layer does
        reason = one_line(error)
        raise KVBenchError(
            f"The hub dataset {hub} could not be fetched ({type(error).__name__}: {reason}): check its name and the "
            "network, or give a folder of its files with --task-option path=FOLDER."
        ) from error


@lru_cache(maxsize=2)  # a file may take hundreds of MB
def _read(file: Path, member: str, _mtime: int) -> Published:
    name = member or file.name
    with reading(_unreadable(file)):
        if member:
            with zipfile.ZipFile(file) as archive:
                if archive.getinfo(member).file_size > LARGEST:
                    raise ValueError(f"{member} unpacks to more than {LARGEST >> 30} GiB")
                data = archive.read(member)
        else:
            data = read_bytes(file)
        content = _parse(name, data)
    return Published(Path(name).name, hashlib.sha256(data).hexdigest(), content, str(file / member))


def _parse(name: str, data: bytes) -> Any:
    if name.endswith(".parquet"):
        pyarrow = need("pyarrow", f"Reading {name}")
        need("pyarrow.parquet", f"Reading {name}")
        return pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    text = data.decode("utf-8-sig")
    if not name.endswith(".jsonl"):
        return parse_json(text, ours=False)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(parse_json(line, ours=False))
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
    return rows


class PublishedTask(Task):
    """A task made of a published file."""

    Options: ClassVar[type[FileOptions]] = FileOptions
    patterns: ClassVar[tuple[str, ...]]
    """Names of the file, as globs below the folder; the first is the one to tell users of."""
    published: ClassVar[str]
    """What the file is, and where it is published."""

    def data(self) -> dict[str, str]:
        """Name the published file and its hash."""
        found = self._load()
        return {"haystack": found.name, "haystack_sha256": found.sha256}

    def _load(self) -> Published:
        return load(cast("FileOptions", self.options), self.patterns, self.published)


class FileTask(PublishedTask):
    """Examples from the rows of a published file, in an order drawn by the seed; each row gives one example or more.

    An example that is longer than the context length loses the middle of its context, as in the published harnesses;
    its `info` then says how many tokens (`truncated_tokens`).
    """

    def examples(self, tokenizer: Any, *, context_length: int, count: int, seed: int) -> Iterator[Example]:
        """Yield as many examples as asked for, or all there are."""
        found = self._load()
        if not (isinstance(found.content, list) and found.content):
            raise KVBenchError(f"{found.place} holds no rows: expected {self.published}.")
        order = random.Random(f"{seed} {self.name}").sample(range(len(found.content)), len(found.content))
        left = count
        for number in order:
            if left <= 0:
                return
            try:
                made = self.build(found.content[number], f"{self.name}/{context_length}/{number}")
                for example in made:
                    _check(example)
            except KVBenchError:
                raise
            except Exception as error:  # of any kind: it comes from the row
                raise KVBenchError(
                    f"Row {number + 1} of {found.place} is not as published ({type(error).__name__}: "
                    f"{plain(str(error))}): expected {self.published}."
                ) from error
            for example in fit(tokenizer, made[:left], context_length):
                yield replace(example, info={"haystack": found.name, **example.info})
            left -= len(made)

    @abstractmethod
    def build(self, row: Any, name: str) -> list[Example]:
        """Make the examples of a row, whose ids begin with `name`; several share one context."""


def _check(example: Example) -> None:
    """Raise TypeError where a row gave something else than text for what the model reads or is compared with."""
    for text in (example.context, example.question, example.answer_prefix, *example.references):
        if not isinstance(text, str):
            raise TypeError(f"{plain(repr(text))} is no text")


def fit(tokenizer: Any, examples: Sequence[Example], context_length: int) -> list[Example]:
    """Cut the middle out of the context that `examples` share until each fits `context_length` with its answer.

    What is kept is half from the prompt's beginning and half from its end, as LongBench and ∞-Bench do it; template,
    question and answer prefix stay whole. Raises KVBenchError where they and the answer alone do not fit.
    """
    sizes = [prompt_length(tokenizer, example) + example.max_new_tokens for example in examples]
    if max(sizes) <= context_length:
        return list(examples)
    longest = examples[sizes.index(max(sizes))]
    context = longest.context
    offsets = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    excess = max(sizes) - context_length
    while True:
        kept = len(offsets) - excess
        if kept <= 0:
            raise KVBenchError(
                f"A context of {context_length} tokens is too small for {longest.id}: its question and its answer "
                f"({longest.max_new_tokens} tokens) take {max(sizes) - len(offsets)} by themselves; ask for a longer "
                "context length."
            )
        after = (max(sizes) - longest.max_new_tokens - len(offsets)) // 2  # of the question and the template
        head = min(max(kept // 2 + after, 0), kept)
        cut = context[: offsets[head - 1][1] if head else 0]
        cut += context[offsets[len(offsets) - (kept - head)][0] :] if kept > head else ""
        shortened = [
            replace(example, context=cut, info={**example.info, "truncated_tokens": excess}) for example in examples
        ]
        longest_now = max(prompt_length(tokenizer, example) + example.max_new_tokens for example in shortened)
        if longest_now <= context_length:
            return shortened
        excess += longest_now - context_length  # the seam, or a token of several pieces
