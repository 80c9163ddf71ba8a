"""Shared settings and fixtures of the tests."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported; kernels still run as torch code unless a test asks for Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kvbench import cli


def pytest_addoption(parser):
    """Add the switch that rewrites the table of operations."""
    parser.addoption("--update-operations", action="store_true", help="write tests/operations.json anew")


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


@pytest.fixture(scope="session")
def real_vectors(tmp_path_factory):
    """Vectors of one middle layer of the embedded model on real text: 9 query and 3 key/value heads of dimension 64."""
    from drive import Vectors

    from kvbench.capture.record import capture, plan_capture, read_text
    from kvbench.models import load_model

    loaded, text = load_model("smollm2-135m"), read_text("default")
    config = plan_capture(loaded, text, context_length=280, decode_tokens=24, layers="14")
    layer = capture(config, loaded, text, tmp_path_factory.mktemp("capture") / "small").layer(14)
    parts = [torch.cat([getattr(layer.prompt, name), getattr(layer.decode, name)], dim=1)[None].float()
             for name in ("queries", "keys", "values")]  # fmt: skip
    return Vectors(*parts, prompt=256)
