"""Types of the installed package, strictly, beside other tests: a command of its own would leave a core idle."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CONFIG = Path(__file__).parent.parent / "pyproject.toml"


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed: pip install 'kvbench[dev]'")
def test_the_package_is_typed(tmp_path):
    command = [sys.executable, "-m", "mypy", "-p", "kvbench", "--config-file", str(CONFIG), "--cache-dir", "cache"]
    # from elsewhere: in the checkout it would check that
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
