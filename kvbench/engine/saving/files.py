"""The file of a saved state: safetensors, with the tree and all checksums in its metadata, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import check_regular, parse_json, plain, reading, reason
from kvbench.engine.saving.identify import About

FORMAT = "kvbench-state"
VERSION = "1"


class Head(BaseModel):
    """What a file says beside its tensors: whose state it is, the tree, the views and each tensor's SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: About
    tree: Any
    views: list[dict[str, Any]]
    sums: dict[str, str]


def write(path: Path, about: About, tree: Any, views: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """Write a state to a file beside `path`, wait for the disk, and put it in `path`'s place; KVBenchError."""
    head = Head(about=about, tree=tree, views=views, sums=_sums(tensors))
    text = json.dumps(head.model_dump(mode="json"), separators=(",", ":"))
    metadata = {"format": FORMAT, "version": VERSION, "state": text, "sha256": _sha256(text.encode())}
    temporary = path.with_name(f".{path.name}~{socket.gethostname()}~{os.getpid()}~{secrets.token_hex(4)}")
    try:
        temporary.mkdir()  # a folder: safetensors writes to a file with a name of its own, and renames it
        save_file(dict(tensors), str(temporary / "state"), metadata=metadata)
        _settle(temporary / "state")
        (temporary / "state").replace(path)
        _settle(path.parent)
    except (OSError, SafetensorError) as error:
        raise KVBenchError(
            f"The state cannot be written to {path} ({reason(error)}): free some space or choose another path."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class StateFile:
    """A file that `write` wrote, open for reading: another one that takes its place meanwhile changes nothing."""

    def __init__(self, path: Path) -> None:
        """Read what the file says of its state; KVBenchError for one that `write` did not write, or a damaged one."""
        self.path = path
        with reading(lambda reason: f"{path} is no saved state that can be read ({reason}): save it again."):
            check_regular(path)
            opened: Any = safe_open(str(path), framework="pt")
            self._file = opened.__enter__()
            metadata = self._file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise KVBenchError(f"{path} is no saved state of kvbench: give a file that session.save wrote.")
            if metadata.get("version") != VERSION:
                raise KVBenchError(
                    f"{path} is a saved state of version {plain(repr(metadata.get('version')))}, and this kvbench "
                    f"reads version {VERSION}: read the prompt again and save anew."
                )
            if _sha256(metadata["state"].encode()) != metadata["sha256"]:
                raise damaged(path, "its description has another checksum")
            self.head = Head.model_validate(parse_json(metadata["state"]))

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, in memory of their own, each with the checksum that `head` has; KVBenchError."""
        sums = self.head.sums
        with reading(lambda reason: str(damaged(self.path, reason))):
            if set(self._file.keys()) != set(sums):
                raise damaged(self.path, "a tensor is missing")
            tensors = {name: _own(self._file.get_tensor(name)) for name in sums}
            for name, found in _sums(tensors).items():
                if found != sums[name]:
                    raise damaged(self.path, f"tensor {plain(name)} has another checksum")
            return tensors


def temporaries(folder: Path) -> Iterator[tuple[Path, str, int]]:
    """The folders in which states are being written, or were by a process that ended: with its host and number."""
    for path in folder.glob(".*~*~*~*"):
        parts = path.name.split("~")
        if len(parts) == 4 and parts[2].isdigit():
            yield path, parts[1], int(parts[2])


def damaged(path: Path, reason: str) -> KVBenchError:
    """The error for a file that is not as it was written."""
    return KVBenchError(f"{path} is damaged ({reason}): read the prompt again and save anew.")


def _own(tensor: Tensor) -> Tensor:
    """A copy that no file backs."""
    return torch.empty_like(tensor).copy_(tensor)


def _sums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of all tensors' bytes, on several threads."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(tensors, threads.map(_tensor_sum, tensors.values()), strict=True))


def _tensor_sum(tensor: Tensor) -> str:
    return _sha256(tensor.flatten().view(torch.uint8).numpy().data) if tensor.numel() else _sha256(b"")


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _settle(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; a folder where the system can."""
    flags = os.O_RDONLY
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)
