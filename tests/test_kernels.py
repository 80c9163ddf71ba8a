"""Compiled code on disk is never older than its sources."""

import subprocess
import sys

KERNELS = """
from kvbench.indexes.compiled import kernel

@kernel
def helper(x: int) -> int:
    return x + {number}
"""
CALLER = """
import helpers
from kvbench.indexes.compiled import kernel

helper = helpers.helper

@kernel
def call(x: int) -> int:
    return helper(x)

print(call(1), sum(call.stats.cache_hits.values()))
"""


def test_a_change_in_a_called_file_recompiles_the_caller(tmp_path):
    (tmp_path / "caller.py").write_text(CALLER)

    def run(number):
        (tmp_path / "helpers.py").write_text(KERNELS.format(number=number))
        command = [sys.executable, "-c", "import caller"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()

    assert run(1) == ["2", "0"]
    assert run(1) == ["2", "1"]
    assert run(5) == ["6", "0"]
