"""The boundary around foreign data: whatever is wrong with a file becomes one sentence that names it."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from kvbench.contract.errors import KVBenchError

DEPTH = 64
"""Levels of lists and objects within each other that a file may have."""
LONGEST = 300
"""Characters of a foreign text that a sentence quotes."""


@contextmanager
def reading(told: Callable[[str], str]) -> Iterator[None]:
    """Raise what goes wrong in the block as KVBenchError, in the sentence that `told` makes of the reason.

    For blocks that only read and check foreign data: there every error is the data's.
    """
    try:
        yield
    except KVBenchError:
        raise
    except Exception as error:  # parsers raise whatever they meet
        raise KVBenchError(told(reason(error))) from error


@contextmanager
def validating(told: Callable[[str], str]) -> Iterator[None]:
    """As `reading`, for pydantic's errors alone: for what a user's values make, beside code that may fail otherwise."""
    try:
        yield
    except ValidationError as error:
        raise KVBenchError(told(reason(error))) from error


def reason(error: BaseException) -> str:
    """Say in a few words, on one line, what an error found wrong with foreign data."""
    match error:
        case OSError():
            found = error.strerror or str(error)
        case RecursionError():
            found = "it is nested too deeply"
        case MemoryError():
            found = "it does not fit into memory"
        case UnicodeDecodeError():
            found = f"it is not UTF-8: {error.reason} at byte {error.start}"
        case ValidationError():
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            found = f"{place}: {first['msg']}" if place else first["msg"]
        case KeyError():
            found = f"it lacks {error.args[0] if error.args else 'a part'}"
        case EOFError():
            found = "it ends too early"
        case zipfile.BadZipFile() | zlib.error() | NotImplementedError():
            found = f"the archive is damaged or of another kind: {error}"
        case ValueError():
            found = str(error) or type(error).__name__
        case _:
            found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return plain(found)


def plain(text: str) -> str:
    """A foreign text for a sentence: one line of printable characters, cut where it is long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text[: 4 * LONGEST].split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def shown(path: str | Path) -> str:
    """A path as text that can be written and printed, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_bytes(file: Path) -> bytes:
    """Read a regular file whole; OSError for anything else, such as a pipe, which could keep a reader waiting."""
    check_regular(file)
    return file.read_bytes()


def check_regular(file: str | Path) -> None:
    """Raise OSError for what is there no regular file."""
    mode = os.stat(file).st_mode  # noqa: PTH116 - on a loop of links Path.stat differs between versions
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(file))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(file))


def read_json(file: Path) -> Any:
    """The content of a JSON file that kvbench wrote, as `parse_json` takes it; OSError or ValueError."""
    return parse_json(read_bytes(file))


def parse_json(data: bytes | str, *, ours: bool = True) -> Any:
    """Parse JSON in UTF-8; ValueError for lone surrogates, no valid text, and for deeper nesting than any file needs.

    In what kvbench wrote (`ours`), NaN, infinity and whole numbers beyond 64 bits are errors too.
    """
    text = data if isinstance(data, str) else data.decode("utf-8-sig")
    try:
        content = json.loads(text, parse_constant=_no_constant if ours else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check(content, ours)
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON knows")


def _check(content: Any, ours: bool) -> None:
    waiting: list[tuple[Any, int]] = [(content, 0)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, str):
            check_text(node)
        elif isinstance(node, (dict, list)):
            if depth == DEPTH:
                raise ValueError("it is nested too deeply")
            if isinstance(node, dict):
                waiting += [(key, depth) for key in node]
            waiting += [(value, depth + 1) for value in (node.values() if isinstance(node, dict) else node)]
        elif ours and isinstance(node, float) and not math.isfinite(node):
            raise ValueError("a number is too large")
        elif ours and isinstance(node, int) and not -(2**63) <= node < 2**64:
            raise ValueError("a whole number has more than 64 bits")


def check_text(text: str) -> None:
    """Raise ValueError for a text that is none: half of a surrogate pair, which no tokenizer or file takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"a text has half of a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start}"
            ) from None
