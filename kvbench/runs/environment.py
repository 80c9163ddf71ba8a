"""What a run's numbers are measured on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("kvbench", "torch", "transformers", "faiss-cpu", "numba", "numpy", "pluggy", "pydantic", "scipy")


def environment(device: str, device_name: str, threads: int, memory_method: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version(package) for package in PACKAGES},
        "device": device,
        "device_name": device_name,
        "threads": threads,
        "peak_memory_method": memory_method,
    }


def processor() -> str:
    """This machine's processor, by name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
