"""The disk cache of compiled kernels.

numba's own keeps an index of numbered data files and writes the index first: a process that is killed in between, or
meets a full disk, or is overtaken by another one leaves an index that names another kernel's machine code, or that of
the source before an edit, which the next process runs. Here each kernel has a file of its own, named by all that its
code depends on, written whole or not at all, and read only where its checksum and its key are right.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, NullCache
from numba.core.serialize import dumps


@cache
def digest_of(folder: Path) -> str:
    """SHA-256 of a folder's Python files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def kernel_cache(function: Callable[..., Any]) -> FunctionCache | NullCache:
    """Give the cache of a function; one that keeps nothing, with a warning, where no folder can be written to."""
    try:
        return _KernelCache(function)
    except (RuntimeError, OSError) as error:  # numba's for no folder, the system's for one that came and went
        _warn(f"the folder of {Path(function.__code__.co_filename).name} or the user's", str(error))
        return NullCache()


class _KernelCache(FunctionCache):
    """The compiled versions of one function, for as long as no file in its folder changes.

    numba watches the file of the compiled function alone; the key here covers those that it calls too.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._digest = digest_of(Path(function.__code__.co_filename).parent)
        self._cache_file = _Files(Path(self._cache_path), self._impl.filename_base, self._digest)

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), self._digest, numba.__version__, numba.config.BOUNDSCHECK)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Give a compiled version, or None where there is none that can be read."""
        with contextlib.suppress(OSError):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write a compiled version; where that fails, kernels are compiled anew by each process, with one warning."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn(str(self._cache_path), error.strerror or str(error))


class _Files:
    """One file for each key: a SHA-256, and what it is of."""

    def __init__(self, folder: Path, base: str, digest: str) -> None:
        self._folder, self._base, self._start = folder, base, f"{base}.{digest[:16]}"

    def _file(self, key: tuple[Any, ...]) -> Path:
        # Types are pickled with numbers of this process, so their names stand for them; `load` compares the keys.
        name = hashlib.sha256(repr([str(part) for part in (*key[0], *key[1:])]).encode()).hexdigest()
        return self._folder / f"{self._start}.{name[:16]}.nbc"

    def load(self, key: tuple[Any, ...]) -> Any:
        with contextlib.suppress(FileNotFoundError, ImportError, AttributeError):  # a module that is gone, too
            content = self._file(key).read_bytes()
            checksum, data = content[:32], content[32:]
            if hashlib.sha256(data).digest() == checksum:
                known, found = pickle.loads(data)  # noqa: S301 - as numba does: code of its own cache folder
                return found if known == key else None
        return None

    def save(self, key: tuple[Any, ...], found: Any) -> None:
        data = dumps((key, found))
        handle, name = tempfile.mkstemp(prefix=f"{self._base}.tmp.", dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            Path(name).replace(self._file(key))
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
        self._remove_older()

    def _remove_older(self) -> None:
        for file in self._folder.glob(f"{self._base}.*"):
            if file.suffix in (".nbi", ".nbc") and not file.name.startswith(f"{self._start}."):
                with contextlib.suppress(OSError):
                    file.unlink()


@cache
def _warn(folder: str, reason: str) -> None:
    warnings.warn(
        f"Compiled kernels cannot be kept in {folder} ({reason}), so each process compiles them anew, which takes up "
        "to a minute: free some space, or set NUMBA_CACHE_DIR to a folder that can be written to.",
        RuntimeWarning,
        stacklevel=2,
    )
