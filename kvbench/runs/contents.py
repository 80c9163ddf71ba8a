"""What a finished run's folder holds: its files and their hashes, which `run.json` records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from kvbench.contract.errors import KVBenchError, unwritable

UNHASHED = ("run.json", ".run.json", ".lock")
"""What a run's folder holds beside its results."""


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of results in a run's folder, by its path there."""
    try:
        return {
            name: _sha256(folder / name)
            for name in contents(folder)
            if name not in UNHASHED and not (folder / name).is_symlink()
        }
    except OSError as error:
        raise KVBenchError(unwritable(folder, error)) from None


def contents(folder: Path) -> Iterator[str]:
    """The paths of all that a folder holds and that is no folder, links to folders included; no link is followed."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
