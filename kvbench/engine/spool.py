"""Tensors in a temporary file: holding them takes none of the memory that is measured."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import psutil
import torch
from torch import Tensor

from kvbench.contract.errors import NoRoomError

SHARE = 4
"""A spool takes at most this part of the room on the disk, and of the memory, which a temporary folder may lie in."""


def spool_room() -> int:
    """Bytes that a spool may take now: a quarter of the temporary folder's free room and of the free memory."""
    return int(min(shutil.disk_usage(tempfile.gettempdir()).free, psutil.virtual_memory().available) // SHARE)


class Spool:
    """A file of tensors, without a name, gone with the object."""

    def __init__(self) -> None:
        with _room():
            self._file: Any = tempfile.TemporaryFile(prefix="kvbench-", buffering=0)  # noqa: SIM115  open as long as this
        self._size = 0

    def put(self, tensor: Tensor) -> Spooled:
        """Write a tensor [a, b, ...] and give where it lies; copies one [a, b] at a time to the host."""
        begin = self._size
        self._file.seek(begin)
        for part in tensor.flatten(0, 1) if tensor.numel() else ():
            data = _bytes(part.cpu().contiguous())
            with _room():
                while data:
                    data = data[self._file.write(data) :]
        self._size += tensor.numel() * tensor.element_size()
        return Spooled(self, begin, tuple(tensor.shape), tensor.dtype, tensor.device)

    def _read(self, begin: int, tensor: Tensor) -> None:
        self._file.seek(begin)
        data = _bytes(tensor)
        while data:
            count = self._file.readinto(data)
            if not count:
                raise OSError("a temporary file is shorter than what was written to it")
            data = data[count:]


@dataclass(frozen=True)
class Spooled:
    """Where a tensor lies."""

    spool: Spool
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def load(self) -> Tensor:
        """Read the tensor, to the device that it was on."""
        host = torch.empty(self.shape, dtype=self.dtype)
        if prod(self.shape):
            self.spool._read(self.begin, host)
        return host.to(self.device)


@contextmanager
def _room() -> Iterator[None]:
    """Raise what a full or closed disk raises as NoRoomError."""
    try:
        yield
    except OSError as error:
        raise NoRoomError(
            "The prompt that policies share is held in a temporary file, which cannot be written "
            f"({error.strerror or error}): free some space, or set TMPDIR to a folder that has some."
        ) from None


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
