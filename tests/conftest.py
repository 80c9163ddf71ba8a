"""Shared settings and fixtures of the tests."""

import gc
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported; kernels still run as torch code unless a test asks for Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import language

from kvbench import cli
from kvbench.plugins import registry


def pytest_addoption(parser):
    """Add the switch that rewrites the table of operations."""
    parser.addoption("--update-operations", action="store_true", help="write tests/operations.json anew")
    parser.addoption(
        "--policy-kinds", action="store_true",
        help="of the tests that hold for every policy, only those of one policy for each way of using transformers",
    )  # fmt: skip


KINDS = {
    "full", "full_no_cache", "streaming_llm", "snapkv", "h2o", "expected_attention", "duo_attention", "kvzip", "quest",
    "flat", "infllm", "infinigen", "shadowkv", "kivi",
}  # fmt: skip
"""Evicting by place, by the prompt's queries and by running scores, by head, by replays of the prompt; selecting pages,
tokens and blocks; rotation undone; hidden states and the model's weights; storage in codes."""

LONG = (
    "test_types", "test_triton_compiles", "test_real", "test_contract_plugins", "test_sweep", "test_results",
    "test_triton_kernels", "test_fixed", "test_indexes", "test_saving", "test_reading", "test_report",
)  # fmt: skip
"""Files that take long: they come first, so that no worker waits for another's last file at the end."""


def pytest_collection_modifyitems(config, items):
    """Put long files first; with --policy-kinds, leave out policies that ask nothing else of transformers."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
    if config.getoption("--policy-kinds"):
        here = [item for item in items if _policy(item) in KINDS | {None}]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(here)])
        items[:] = here


def _policy(item):
    """The policy that a test is about: None where it is about no single one of the built-in ones."""
    given = item.callspec.params.get("policy") if hasattr(item, "callspec") else None
    return given if isinstance(given, str) and given in registry().classes["policy"] else None


def pytest_collection_finish():
    """Spare the collector of garbage what is imported: tests and runs collect, a fifth of a second a time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    """Tiny models run faster on one thread, and tests beside each other do not fight for cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    """What the user who runs the tests set for tasks from files is not theirs."""
    monkeypatch.delenv("KVBENCH_DATA", raising=False)


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer trained here, that tests leave as it is."""
    return language.make_tokenizer()


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
