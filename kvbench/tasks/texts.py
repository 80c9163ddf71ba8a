"""Texts that haystacks are made of: noise, essays from the user's data folder, or Python's own documentation."""

import hashlib
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import reading
from kvbench.tasks.files import FileOptions, Published, data_folder, load

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's noise sentence."""


@dataclass(frozen=True)
class Text:
    """A text as words (whitespace collapsed), its name, and the sha256 of the words joined by spaces."""

    name: str
    sha256: str
    words: tuple[str, ...]


@cache
def words(*kinds: str) -> tuple[str, ...]:
    """Give the sorted words of wonderwords' lists; kinds: noun, adjective, verb."""
    from wonderwords import Defaults, RandomWord  # noqa: PLC0415 - only the tasks made of words need it

    lists = {"noun": Defaults.NOUNS, "adjective": Defaults.ADJECTIVES, "verb": Defaults.VERBS}
    source = RandomWord(**{kind: lists[kind] for kind in kinds})
    return tuple(sorted({word for kind in kinds for word in source.filter(include_categories=[kind])}))


def essays(options: FileOptions | None = None) -> Text:
    """Give RULER's essays from where the options say or KVBENCH_DATA, or else the text of Python's own documentation.

    Essays: `PaulGrahamEssays.json` (an object with the member `text`), a folder `PaulGrahamEssays` of .txt files, or a
    table with a column `text`, as hub datasets have it. Otherwise: `pydoc_data.topics`, which comes with Python; its
    name says so, and its hash varies by Python version.
    """
    options = options or FileOptions()
    folder = Path(options.path).expanduser() if options.path else None if options.hub else data_folder()
    has_json = folder is not None and (folder / _ESSAYS[0]).is_file()
    if folder and not has_json and (files := tuple(sorted((folder / "PaulGrahamEssays").glob("*.txt")))):
        return _essay_files(files, tuple(file.stat().st_mtime_ns for file in files))
    if not (options.path or options.hub or has_json):
        return _python_documentation()
    found = load(options, _ESSAYS, "RULER's essays")
    return _essay_rows(f"{options.hub} {found.name}" if options.hub else "paul_graham_essays", found)


_ESSAYS = ("PaulGrahamEssays.json", "data/train-*.parquet", "*.parquet", "*.jsonl")


@cache
def _essay_files(files: tuple[Path, ...], _mtimes: tuple[int, ...]) -> Text:
    return _text("paul_graham_essays", "\n".join(map(_read, files)))


def _read(file: Path) -> str:
    with reading(lambda reason: f"{file} cannot be read ({reason}): fetch it again."):
        return file.read_text("utf-8")


@cache
def _essay_rows(name: str, found: Published) -> Text:
    rows = [found.content] if isinstance(found.content, dict) else found.content
    try:
        joined = "\n".join(row["text"] for row in rows)
    except (KeyError, TypeError, IndexError, AttributeError):
        joined = ""
    if not joined.strip():
        raise KVBenchError(
            f'{found.place} is neither a JSON object with the essays as one string in "text" nor a table with such a '
            "column: write it like that."
        )
    return _text(name, joined)


@cache
def _python_documentation() -> Text:
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 - some systems package Python without it
    except ImportError:
        raise KVBenchError(
            "This Python comes without pydoc_data.topics, the text used in place of RULER's essays: set KVBENCH_DATA "
            "to a folder with PaulGrahamEssays.json."
        ) from None
    name = f"pydoc_data.topics of Python {platform.python_version()}"
    return _text(name, "\n".join(topics[topic] for topic in sorted(topics)))


def _text(name: str, content: str) -> Text:
    parts = tuple(content.split())
    return Text(name, hashlib.sha256(" ".join(parts).encode()).hexdigest(), parts)
