"""Peak memory of a stretch of code: the device's on a GPU, the process's on a CPU."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import psutil
import torch

from kvbench.models import LoadedModel

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def method(device: torch.device) -> str:
    """How peak memory is measured here: `cuda allocator`, `kernel high-water mark` or `sampled resident size`."""
    if device.type == "cuda":
        return "cuda allocator"
    try:
        _CLEAR.write_text("5")
    except OSError:
        return "sampled resident size"
    return "kernel high-water mark"


def release() -> None:
    """Give freed memory back to the system, so that one peak does not include another's leftovers."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.system() == "Linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the process's own C library, where it has this
        if trim is not None:
            trim(0)


@contextmanager
def quick_release() -> Iterator[None]:
    """Spare `release` what is there before the block: modules and weights, which take it a fifth of a second a time.

    Where the process has frozen objects already, they stay so, and nothing is done.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def gpus_of(loaded: LoadedModel) -> list[torch.device]:
    """The GPUs that hold parts of a model, in order."""
    found = {parameter.device for parameter in loaded.model.parameters() if parameter.device.type == "cuda"}
    return sorted(found, key=str)


def capacity(device: torch.device) -> int:
    """Bytes of memory that the device has in all: the GPU's, or the machine's up to this process's cgroup limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


class PeakMemory:
    """Measures the peak inside a `with` block, as `bytes` once it is left.

    On a CPU that is the process's resident memory, weights included: Linux's high-water mark, reset at entry, or, where
    the kernel offers none, the largest of samples taken every 5 ms.
    """

    bytes: int

    def __init__(self, device: torch.device, gpus: Sequence[torch.device] = ()) -> None:
        """Of a model that lies on several `gpus`, `bytes` is the sum of their peaks, and `by_device` has each."""
        self.device, self.method = device, method(device)
        self._gpus = gpus if len(gpus) > 1 else [device]
        self.by_device: dict[str, int] = {}
        self._stop = threading.Event()

    def __enter__(self) -> PeakMemory:
        if self.method == "cuda allocator":
            for gpu in self._gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
        elif self.method == "kernel high-water mark":
            _CLEAR.write_text("5")
        else:
            self.bytes = psutil.Process().memory_info().rss
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.method == "cuda allocator":
            peaks = {str(gpu): torch.cuda.max_memory_allocated(gpu) for gpu in self._gpus}
            self.bytes, self.by_device = sum(peaks.values()), peaks if len(peaks) > 1 else {}
        elif self.method == "kernel high-water mark":
            found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
            assert found is not None
            self.bytes = int(found[1]) * 1024
        else:
            self._stop.set()
            self._sampler.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, process.memory_info().rss)
