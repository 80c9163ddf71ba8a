"""The one error that a user is meant to read, and the sentence for what cannot be written."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path


class KVBenchError(Exception):
    """Bad input or an unusable environment: one sentence that names the value, what was expected and what to do."""


class NoRoomError(KVBenchError):
    """A disk is full or closed, which says nothing of a model or a policy."""


def unwritable(path: Path, error: OSError | str, option: str = "--output") -> str:
    """Say why nothing can be written to `path`, given with `option`, and what to do."""
    code = error.errno if isinstance(error, OSError) else None
    reason = error if isinstance(error, str) else error.strerror or error
    file = next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None)
    if code in (errno.ENOTDIR, errno.EEXIST) and file is not None:
        return f"{file} is a file: give {option} a folder."
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path} may not be written to ({reason}): choose another {option}."
    return f"Cannot write to {path}: {reason}. Free some space or choose another {option}."


def check_output(path: Path, option: str = "--output") -> None:
    """Raise KVBenchError where no folder `path` can be made or written to; nothing is made."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that no file can have, a loop of links, a closed folder
        raise KVBenchError(
            f"The folder of {option} cannot be used ({getattr(error, 'strerror', None) or error}): choose another."
        ) from None
    there = next((part for part in (path, *path.absolute().parents) if os.path.lexists(part)), path)
    if not there.is_dir():
        raise KVBenchError(f"{there} is {'a file' if there.exists() else 'a broken link'}: give {option} a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise KVBenchError(f"{there} may not be written to: choose another {option}.")


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, on one line of at most so many characters."""
    return " ".join(str(error).split())[:most]


def sentence(error: BaseException) -> str:
    """An error as one line; one that kvbench did not foresee with its type and place."""
    if isinstance(error, KVBenchError):
        return str(error)
    if out_of_memory(error):
        why = f" ({error})" if str(error) else ""
        return f"Out of memory{why}: use a shorter --context-length, a smaller --model, or --prefill-chunk 1024."
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {one_line(error, 500)}{where}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, the device's or the host's."""
    if isinstance(error, MemoryError):
        return True
    known = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, RuntimeError) and known
