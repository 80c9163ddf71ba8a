"""What conformance checks found is kept for the next process, for as long as nothing that it depends on changes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from language import save_model
from test_conformance import Keeping, OverBudget

from kvbench.engine.conformance import checks
from kvbench.models import load_model
from kvbench.plugins import registry
from kvbench.runs.proofs import checker

POLICY = """
from kvbench.strategies.evicting.streaming_llm import StreamingLLM

class Mine(StreamingLLM):
    name, summary = "mine", "A policy of a file of its own."
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def process(monkeypatch, tmp_path, saved):
    """A function that begins as a new process does, and says what was checked and what remembered."""
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    ran = []
    for name in ("_model_checks", "_policy_checks"):
        right = getattr(checks.Conformance, name)

        def noted(self, *policy, right=right):
            ran.append(policy[0].name if policy else "model")
            return right(self, *policy)

        monkeypatch.setattr(checks.Conformance, name, noted)

    def check(policy="streaming_llm", options=None, anew=False, dtype=None, change=lambda loaded: loaded):
        checks._KNOWN.clear()
        ran.clear()
        loaded = change(load_model(str(saved), dtype=dtype))
        made = registry().make("policy", policy, options or {}) if isinstance(policy, str) else policy
        reports = checker(loaded, anew=anew).check(made)
        remembered = [report.policy or "model" for report in reports if report.remembered]
        assert sorted([*ran, *remembered]) == sorted(report.policy or "model" for report in reports)
        return list(ran), reports

    return check


def test_a_second_process_checks_nothing_and_says_since_when(process):
    ran, first = process()
    assert ran == ["model", "streaming_llm"]
    assert [report.remembered for report in first] == [None, None]
    ran, second = process()
    assert ran == []
    assert [replace(report, remembered=None) for report in second] == first
    assert all(report.remembered.startswith("20") for report in second)
    assert second[0].document()["remembered"] == second[0].remembered


def test_what_it_depends_on_is_checked_anew(process, saved, monkeypatch):
    process()
    assert process("quest")[0] == ["quest"]
    assert process(options={"sinks": 3})[0] == ["streaming_llm"]
    assert process(dtype="bfloat16")[0] == ["model", "streaming_llm"]
    assert process(anew=True)[0] == ["model", "streaming_llm"]
    assert process()[0] == []
    torch.set_num_threads(2)
    try:
        assert process()[0] == ["model", "streaming_llm"]
    finally:
        torch.set_num_threads(1)
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # its time alone: the fingerprint of large files looks at parts of them
    assert process()[0] == ["model", "streaming_llm"]
    assert process(change=lambda loaded: replace(loaded, fingerprint="another"))[0] == ["model", "streaming_llm"]
    assert process()[0] == []


def test_a_changed_plugin_is_checked_anew(process, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    for version, expected in ((1, ["model", "mine"]), (1, []), (2, ["mine"])):
        (tmp_path / "mine_policy.py").write_text(POLICY + f"# version {version}\n")
        sys.modules.pop("mine_policy", None)
        from mine_policy import Mine

        monkeypatch.setitem(registry().classes["policy"], "mine", Mine)
        assert process("mine")[0] == expected
        registry()._identities.pop(Mine)


def test_failures_unregistered_policies_and_models_without_a_name_are_not_kept(process, monkeypatch):
    monkeypatch.setitem(registry().classes["policy"], "keeping", OverBudget)
    assert process("keeping")[0] == ["model", "keeping"]
    ran, reports = process("keeping")
    assert ran == ["keeping"] and reports[1].failure
    assert process(Keeping())[0] == ["keeping"]
    assert process(Keeping())[0] == ["keeping"]
    unnamed = {"change": lambda loaded: replace(loaded, lasting=False)}
    assert process(**unnamed)[0] == process(**unnamed)[0] == ["model", "streaming_llm"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"about": 3, "report": {}}', "cut", "changed"])
def test_a_damaged_file_is_made_again(process, tmp_path, content):
    process()
    for file in (tmp_path / "cache" / "conformance").iterdir():
        text = file.read_text()
        damaged = text.replace('"seconds": ', '"seconds": "x') if content == "changed" else text[:-9]
        file.write_bytes(content if isinstance(content, bytes) else damaged.encode())
    assert process()[0] == ["model", "streaming_llm"]
    assert process()[0] == []


def test_a_place_that_takes_no_files_is_done_without(process, tmp_path):
    (tmp_path / "cache").write_text("")
    assert process()[0] == process()[0] == ["model", "streaming_llm"]


def test_run_json_says_that_a_proof_was_remembered(kvbench, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    proofs = []
    for number, more in enumerate(((), (), ("--fresh",))):
        checks._KNOWN.clear()
        given = ("--context-length", 512, "--examples", 1, "--seed", 10 + min(number, 1), *more)
        code, out, err = kvbench("run", "--policy", "streaming_llm", "--no-baseline", "--json", "--model", saved,
                                 "--output", tmp_path / "runs", *given)  # fmt: skip
        assert code == 0, err
        folder = json.loads(out)["runs"][0]["folder"]
        proofs.append(
            [report["remembered"] for report in json.loads(Path(folder, "run.json").read_text())["conformance"]]
        )
    assert proofs[0] == proofs[2] == [None, None]
    assert None not in proofs[1] and len(proofs[1]) == 2
