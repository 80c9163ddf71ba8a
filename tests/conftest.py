"""Shared settings of the tests."""

import sys

import pytest
import torch

from kvbench import cli


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    """Tiny models run faster on one thread, and tests beside each other do not fight for cores."""
    torch.set_num_threads(1)


@pytest.fixture
def kvbench(monkeypatch, capfd):
    """Run the command; give its exit code, stdout and stderr."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["kvbench", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return command
