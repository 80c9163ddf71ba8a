"""Pinned memory of the host: a GPU copies to it without waiting, and its kernels read it in place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SLAB = 2**30
"""Bytes that are pinned at a time; torch rounds what it pins up to a power of two, so pieces are cut from a slab."""
_ALIGNMENT = 256


class Slabs:
    """Cuts tensors from slabs of pinned memory; a slab goes back to torch's pool once its last tensor is gone."""

    def __init__(self, size: int = SLAB, pin: bool = True) -> None:
        self._size, self._pin = size, pin
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        needed = math.prod(shape) * dtype.itemsize
        if self._used + needed > self._slab.shape[0]:
            self._slab = torch.empty(max(self._size, needed), dtype=torch.uint8, pin_memory=self._pin)
            self._used = 0
        piece = self._slab[self._used : self._used + needed].view(dtype).view(tuple(shape))
        self._used += -(-needed // _ALIGNMENT) * _ALIGNMENT
        return piece


_slabs = Slabs()


def pins(device: torch.device) -> bool:
    """Whether memory that `device` is to read is pinned."""
    return device.type == "cuda" and torch.cuda.is_available()


def host_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor in the host's memory, pinned where `device`, which is to read it, is a GPU (`pins`)."""
    return _slabs.empty(shape, dtype) if pins(device) else torch.empty(tuple(shape), dtype=dtype)


def copy_to_host(tokens: Tensor, room: int) -> Tensor:
    """Copy `tokens` [B, G, t, d] of a GPU to pinned memory [B, G, t + room, d], without waiting for the copy."""
    rows, groups, count, dim = tokens.shape
    whole = host_empty((rows, groups, count + room, dim), tokens.dtype, tokens.device)
    for row in range(rows):
        for group in range(groups):  # pieces without gaps on both sides, which are copied directly
            whole[row, group, :count].copy_(tokens[row, group], non_blocking=True)
    return whole


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
