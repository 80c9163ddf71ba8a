"""Every Triton kernel compiles for a GPU, which the interpreter that the other tests use does not show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvbench.kernels

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")


def launched() -> set[str]:
    """Names of the kernels that the sources launch."""
    folder = Path(kvbench.kernels.__path__[0])
    sources = [file.read_text("utf-8") for file in folder.glob("*.py")]
    kernels = {name for source in sources for name in re.findall(r"^@jit\ndef (\w+)", source, re.MULTILINE)}
    return {name for name in kernels if any(re.search(rf"^\s+{name}\[", source, re.MULTILINE) for source in sources)}


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, str(SCRIPT)],
        check=False,
        capture_output=True,
        text=True,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=SCRIPT.parent,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert len(launched()) > 15
    assert launched() <= set(found.stdout.split()), found.stdout
