"""What a benchmark of indexes has measured so far, so that one that was stopped goes on after it."""

from __future__ import annotations

import json
import os
import platform
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvbench.contract.errors import KVBenchError, unwritable
from kvbench.contract.reading import read_json
from kvbench.plugins import registry
from kvbench.runs.environment import processor

SCHEMA = 1
FOLDER = ".parts"


def environment() -> dict[str, Any]:
    """What indexes are measured on."""
    import numba  # noqa: PLC0415 - slow

    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("kvbench", "faiss-cpu", "numba", "numpy", "torch")},
        "processor": processor(),
        "build_threads": numba.get_num_threads(),
        "search_threads": 1,
    }


class Parts:
    """The rows of each index on each layer in a file of their own, written whole or not at all.

    They count again only where the index's code, the packages, the processor and the threads are the same.
    """

    def __init__(self, folder: Path) -> None:
        """In `folder`, of one configuration's results."""
        self._folder = folder / FOLDER
        self._here = environment()

    def read(self, layer: int, place: int, name: str) -> list[dict[str, Any]] | None:
        """The rows of index `name`, the `place`-th, on a layer; None where they are not there, or of other code."""
        try:
            found = read_json(self._file(layer, place))
        except (OSError, ValueError):
            return None
        rows = found.pop("rows", None) if isinstance(found, dict) else None
        return rows if isinstance(rows, list) and found == self._about(name) else None

    def write(self, layer: int, place: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Keep rows; KVBenchError where they cannot be written."""
        file = self._file(layer, place)
        temporary = file.with_name(f".{file.name}-{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as stream:
                json.dump({**self._about(name), "rows": rows}, stream, allow_nan=False)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise KVBenchError(unwritable(self._folder, error)) from None

    def remove(self) -> None:
        """Forget all, once the results are written."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, layer: int, place: int) -> Path:
        return self._folder / f"{layer:03d}-{place:02d}.json"

    def _about(self, name: str) -> dict[str, Any]:
        code = registry().identity("index", name).model_dump(mode="json")
        return {"schema": SCHEMA, "index": name, "code": code, "environment": self._here}
