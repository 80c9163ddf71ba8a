"""End to end on the embedded trained model."""

import json
import sys

import pytest
import torch

import kvbench
from kvbench import cli
from kvbench.models import load_model
from kvbench.tasks import encode

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def loaded():
    return load_model("smollm2-135m")


def test_full_gives_the_tokens_of_plain_transformers(loaded):
    from kvbench.plugins import registry

    task = registry().make("task", "niah_multikey_1")
    example = next(iter(task.examples(loaded.tokenizer, context_length=512, count=1, seed=1)))
    ids = torch.tensor([encode(loaded.tokenizer, example).input_ids])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    plain = loaded.model.generate(ids, **arguments)
    with kvbench.attach(loaded.model, policy="full"):
        ours = loaded.model.generate(ids, **arguments)
    assert torch.equal(plain, ours)
    for policy in ("quest", "flat"):
        with kvbench.attach(loaded.model, policy=policy, budget=1.0):
            assert torch.equal(plain, loaded.model.generate(ids, **arguments))


def test_run_finds_needles_and_measures_what_the_policies_promise(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv",
        ["kvbench", "run", "--policy", "flat,retrieval,streaming_llm", "--budget", "pyramid",
         "--context-length", "1024", "--examples", "1", "--probe-examples", "1", "--output", str(tmp_path), "--json"],
    )  # fmt: skip
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main()
    flat, retrieval, streaming, full = (entry["metrics"] for entry in json.loads(capsys.readouterr().out)["runs"])
    assert full["accuracy"]["mean"] == 1
    assert full["recovered_mass"] == pytest.approx(1)
    assert flat["recall_at_k"] == 1
    assert flat["scanned_fraction"] == 1
    assert 0.9 < retrieval["recall_at_k"] <= 1
    assert streaming["recall_at_k"] < retrieval["recall_at_k"] - 0.2
    assert streaming["recovered_mass"] < retrieval["recovered_mass"] <= flat["recovered_mass"] + 0.01 < 1
    for metrics in (flat, retrieval, streaming):
        assert metrics["attended_tokens"] == pytest.approx(0.1 * metrics["context_tokens"], abs=2)
    assert retrieval["ttft_s"]["index"] > 0
    assert retrieval["bytes"]["index"] > 0
    assert flat["bytes"]["offloaded"] > flat["bytes"]["resident"] > 0
