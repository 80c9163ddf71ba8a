"""Pinned memory of the host: a GPU copies to it without waiting, and its kernels read it in place."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor

SLAB = 2**30
"""Bytes that are pinned at a time; torch rounds what it pins up to a power of two, so pieces are cut from a slab."""
TOUCHING = 8
"""Threads that touch the pages of a slab before it is pinned."""
_ALIGNMENT = 256


class Pool:
    """Pieces of `size` bytes of pinned memory; once one is asked for, a thread prepares the next.

    Pinning is slow (0.66 s for each GiB on an H200's host, 0.2 s where threads touch the pages first), and a prompt's
    layers ask for one piece after another. A piece whose last tensor is gone is handed out again.
    """

    def __init__(self, size: int, pin: Callable[[int], mmap.mmap]) -> None:
        self._size, self._pin = size, pin
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()
        self._ahead: Future[mmap.mmap] | None = None

    def take(self) -> Tensor:
        """A piece, uint8 [size], not initialised."""
        with self._lock:
            memory = self._free.pop() if self._free else None
            ahead, found = self._ahead, memory is None
            if found:
                self._ahead = None
        if memory is None:
            memory = self._pin(self._size) if ahead is None else ahead.result()
        elif torch.cuda.is_available():
            torch.cuda.synchronize()  # what was copied to or from it before
        if found:
            self._ahead = _later(lambda: self._pin(self._size))
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return torch.from_numpy(array)


def _later(work: Callable[[], mmap.mmap]) -> Future[mmap.mmap]:
    """Do the work in a thread that does not hold up the interpreter's end."""
    future: Future[mmap.mmap] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="kvbench-pin", daemon=True).start()
    return future


def pin_pages(size: int) -> mmap.mmap:
    """`size` bytes of the host's memory, pinned; RuntimeError where CUDA refuses."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    share = -(-size // TOUCHING)

    def touch(part: int) -> None:
        ctypes.memset(address + part * share, 0, max(min(share, size - part * share), 0))

    with ThreadPoolExecutor(TOUCHING) as threads:
        list(threads.map(touch, range(TOUCHING)))
    portable = 1
    status = torch.cuda.cudart().cudaHostRegister(address, size, portable)  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(status))
    return memory


class Slabs:
    """Cuts tensors from slabs of pinned memory; a slab goes back to its pool once its last tensor is gone."""

    def __init__(self, size: int = SLAB, pin: bool = True) -> None:
        self._size, self._pin = size, pin
        self._pool = Pool(size, pin_pages)
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        needed = math.prod(shape) * dtype.itemsize
        if self._used + needed > self._slab.shape[0]:
            self._slab = self._new(needed)
            self._used = 0
        piece = self._slab[self._used : self._used + needed].view(dtype).view(tuple(shape))
        self._used += -(-needed // _ALIGNMENT) * _ALIGNMENT
        return piece

    def _new(self, needed: int) -> Tensor:
        if self._pin and needed <= self._size and hasattr(mmap, "MAP_ANONYMOUS"):
            return self._pool.take()
        return torch.empty(max(self._size, needed), dtype=torch.uint8, pin_memory=self._pin)


_slabs = Slabs()


def pins(device: torch.device) -> bool:
    """Whether memory that `device` is to read is pinned."""
    return device.type == "cuda" and torch.cuda.is_available()


def host_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor in the host's memory, pinned where `device`, which is to read it, is a GPU (`pins`)."""
    return _slabs.empty(shape, dtype) if pins(device) else torch.empty(tuple(shape), dtype=dtype)


def copy_to_host(tokens: Tensor, room: int) -> Tensor:
    """Copy `tokens` [B, G, t, d] of a GPU to pinned memory [B, G, t + room, d], without waiting for the copy.

    The current stream does it. Whoever runs it on a stream of its own sees to it that the tokens stay until then.
    """
    rows, groups, count, dim = tokens.shape
    whole = host_empty((rows, groups, count + room, dim), tokens.dtype, tokens.device)
    for row in range(rows):
        for group in range(groups):  # pieces without gaps on both sides, which are copied directly
            whole[row, group, :count].copy_(tokens[row, group], non_blocking=True)
    return whole


_copying: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def beside(*tensors: Tensor) -> Iterator[None]:
    """Copy `tensors` of a GPU in the block on a stream of its own, after what the current one has been given so far."""
    device = tensors[0].device
    stream = _copying.get(device) or _copying.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    for tensor in tensors:
        tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def event(timing: bool = False) -> torch.cuda.Event:
    """A CUDA event."""
    found: torch.cuda.Event = torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]
    return found


def wait(arrived: torch.cuda.Event | None) -> None:
    """Wait for what the device did before the event; no event where it does everything at once."""
    if arrived is not None:
        arrived.synchronize()


def seconds_of(work: Callable[[], object], on: Tensor, times: int = 20) -> float:
    """Seconds that the device of `on` spends on the work, the mean of some calls after a first one."""
    work()
    if not on.is_cuda:
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times
    start, end = event(timing=True), event(timing=True)
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / times
