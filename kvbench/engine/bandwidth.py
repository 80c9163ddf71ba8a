"""A device's bandwidths, measured once in a process, and the floor that they put under a decoding step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

DEVICE_BYTES, HOST_BYTES = 2**32, 2**29
"""Sizes of the copies on a GPU: beyond every cache."""
CPU_BYTES = 2**28
LEAST_BYTES = 2**28
"""Smaller copies would come from a GPU's cache."""
REPEATS = 10


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second: a copy within the device, read and written bytes counted, and one from pinned host memory."""

    device: float
    host: float

    def floor_s(self, reads: Mapping[str, int]) -> float:
        """The seconds that a step takes at least which reads so many bytes of `weights`, `device` and `host`."""
        return (reads["weights"] + reads["device"]) / self.device + reads["host"] / self.host


def bandwidth(device: torch.device) -> Bandwidth | None:
    """A device's bandwidths; None on a GPU with too little free memory to measure them.

    On a CPU both are those of a large copy in memory, by as many threads as torch uses.
    """
    if device.type == "cuda":
        return _gpu(torch.cuda.current_device() if device.index is None else device.index)
    return _cpu(torch.get_num_threads())


def event_seconds(action: Callable[[], object], count: int = REPEATS) -> float:
    """The median time of an action on the current GPU, by device events."""
    action()
    found = []
    for _ in range(count):
        start, end = timer(), timer()
        start.record()
        action()
        end.record()
        end.synchronize()
        found.append(elapsed_s(start, end))
    return statistics.median(found)


def timer() -> torch.cuda.Event:
    """An event on the GPU that can be timed."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def elapsed_s(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Seconds between two events that have passed."""
    return float(start.elapsed_time(end)) / 1e3


_GPUS: dict[int, Bandwidth] = {}


def _gpu(number: int) -> Bandwidth | None:
    if number not in _GPUS:
        device = torch.device("cuda", number)
        size = min(DEVICE_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
        if size < LEAST_BYTES:
            return None
        with torch.cuda.device(device):
            source = torch.ones(size, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            pinned = torch.ones(min(HOST_BYTES, size), dtype=torch.uint8).pin_memory()
            _GPUS[number] = Bandwidth(
                2 * size / event_seconds(lambda: target.copy_(source)),
                pinned.nbytes / event_seconds(lambda: target[: pinned.nbytes].copy_(pinned, non_blocking=True)),
            )
            del source, target, pinned
            torch.cuda.empty_cache()
    return _GPUS[number]


@cache
def _cpu(threads: int) -> Bandwidth:
    """`threads` is torch's number, and so a key of the cache."""
    source = torch.ones(CPU_BYTES, dtype=torch.uint8)
    target = torch.ones_like(source)
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        target.copy_(source)
        found.append(time.perf_counter() - began)
    rate = 2 * source.nbytes / statistics.median(found)
    return Bandwidth(rate, rate)
