"""Texts that haystacks are made of: noise, essays from the user's data folder, or Python's own documentation."""

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvbench.errors import KVBenchError

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


def data_folder() -> Path | None:
    """Give the folder that KVBENCH_DATA names, or None where it is not set; raises KVBenchError where it is missing."""
    name = os.environ.get("KVBENCH_DATA")
    if not name:
        return None
    if not Path(name).is_dir():
        raise KVBenchError(f"KVBENCH_DATA names {name}, which is not a folder: create it, or unset KVBENCH_DATA.")
    return Path(name)


def data_file(name: str, what: str) -> Path:
    """Give the file `name` in KVBENCH_DATA; raises KVBenchError, naming `what` it is, where it is not there."""
    folder = data_folder()
    if folder is None or not (folder / name).is_file():
        where = "a folder that KVBENCH_DATA names" if folder is None else f"{folder} (KVBENCH_DATA)"
        raise KVBenchError(f"This task needs {what}, which is not part of kvbench: put the file {name} into {where}.")
    return folder / name


def essays() -> Text:
    """Give RULER's essays from KVBENCH_DATA, or else the text of Python's own documentation.

    Essays: `PaulGrahamEssays.json` (an object with the member `text`) or a folder `PaulGrahamEssays` of .txt files.
    Otherwise: `pydoc_data.topics`, which comes with Python; its name says so, and its hash varies by Python version.
    """
    folder = data_folder()
    if folder and (file := folder / "PaulGrahamEssays.json").is_file():
        return _essays_json(file, file.stat().st_mtime_ns)
    if folder and (files := tuple(sorted((folder / "PaulGrahamEssays").glob("*.txt")))):
        return _text("paul_graham_essays", "\n".join(file.read_text("utf-8") for file in files))
    return _python_documentation()


@cache
def _essays_json(file: Path, _mtime: int) -> Text:
    try:
        content = json.loads(file.read_text("utf-8"))["text"]
    except (ValueError, KeyError, TypeError):
        content = None
    if not isinstance(content, str) or not content.strip():
        raise KVBenchError(f'{file} is not a JSON object with the essays as one string in "text": write it like that.')
    return _text("paul_graham_essays", content)


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
