"""Reads what a user gave, on the command line or in Python: names, numbers, sizes; one sentence for each fault."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kvbench.contract.errors import KVBenchError

if TYPE_CHECKING:
    from pydantic import ByteSize


def listed(values: str | Sequence[str] | None) -> list[str]:
    """Names separated by commas, of an option given once or again and again; each once, in order."""
    given = [values] if isinstance(values, str) else values or ()
    if wrong := [value for value in given if not isinstance(value, str)]:
        raise KVBenchError(f"{wrong[0]!r} is no name: give names, or one text with commas between them.")
    return list(dict.fromkeys(name.strip() for value in given for name in value.split(",") if name.strip()))


def allocation(text: str) -> tuple[str, dict[str, Any]]:
    """An allocator and a size: `pyramid`, `pyramid:512` (tokens), `pyramid:10%`, `pyramid:64MiB`, or a size alone."""
    if not isinstance(text, str):
        raise KVBenchError(
            f"--budget {text!r} is no text such as pyramid, pyramid:512 or 10%: give a number of tokens as tokens= "
            "(--tokens), a share as ratio= (--ratio)."
        )
    name, colon, size = (part.strip() for part in text.partition(":"))
    if not colon and name[:1].isdigit():
        name, size = "uniform", name
    elif not colon:
        return name, {}
    if re.fullmatch(r"[0-9]+", size) and int(size) > 0:
        return name, {"tokens": int(size)}
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?%", size) and 0 < float(size[:-1]) <= 100:
        return name, {"ratio": float(size[:-1]) / 100}
    if re.fullmatch(r"[0-9]+(\.[0-9]+)? ?[A-Za-z]*[Bb]", size):  # 512k would be tokens to some, bytes to others
        return name, {"bytes": byte_size("--budget", size)}
    raise KVBenchError(
        f"--budget {text} has a size that is none: give tokens (512), a share of the context (10%) or bytes (64MiB), "
        "as in pyramid:512, or an allocator alone."
    )


def whole_or(word: str, name: str, given: str | int | None) -> Any:
    """A positive whole number, `word`, or None for an option that was not given; `name` is the option's."""
    text = str(given).strip()
    if given is None or text == word:
        return given and word
    if not isinstance(given, bool) and re.fullmatch(r"[0-9]+", text) and 0 < int(text) < 2**31:
        return int(text)
    raise KVBenchError(f"{name} {given} is neither a positive whole number nor {word}.")


def joined(values: Sequence[str] | None) -> str | None:
    """What an option was given, once or again and again, as if it had been given once."""
    return ",".join(values) if values else None


def numbers(name: str, given: str | Iterable[int] | Sequence[str] | None) -> tuple[int, ...] | None:
    """Whole numbers, given as names are, or None for all; `name` is the option's, for the error."""
    if isinstance(given, list | tuple) and given and all(isinstance(part, str) for part in given):
        given = joined(given)
    if given is None or (isinstance(given, str) and given.strip() == "all"):
        return None
    parts: Any = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
    try:
        if any(isinstance(part, float | bool) for part in parts):
            raise ValueError
        return tuple(sorted({int(part) for part in parts}))
    except (ValueError, TypeError):
        raise KVBenchError(f"{name} {given} is not a list of whole numbers separated by commas.") from None


def byte_size(name: str, given: str | int | None) -> ByteSize | None:
    """A number of bytes with or without a unit (64MiB, 1.5GB); `name` is the option's, for the error."""
    if given is None:
        return None
    from pydantic import ByteSize, TypeAdapter, ValidationError  # noqa: PLC0415  --help stays quick

    try:
        size = TypeAdapter(ByteSize).validate_python(given)
    except ValidationError:
        size = ByteSize(0)
    if size < 1:
        raise KVBenchError(f"{name} {given} is not a number of bytes: give one such as 4000000 or 64MiB.")
    return size


def whole(name: str, given: Any, least: int) -> int:
    """A whole number from `least` on; `name` is the option's, for the error."""
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise KVBenchError(f"{name} {given} is not a whole number from {least} on.")
    return given


def one_of(name: str, given: Any, choices: Sequence[str]) -> Any:
    """One of a few words; `name` is the option's, for the error."""
    if given not in choices:
        known = f"neither '{choices[0]}' nor '{choices[1]}'" if len(choices) == 2 else f"none of {', '.join(choices)}"
        raise KVBenchError(f"{name} {given} is {known}.")
    return given
