"""Runs at scale: stretched contexts, batches and chunks by memory that may run out, quantised and spread models."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from language import loaded_model
from test_cli import model_folder  # noqa: F401  a fixture
from test_results import Short
from tiny import tiny_model, tokens
from transformers import AutoModelForCausalLM, LlamaConfig

import kvbench
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.engine.generation import generate
from kvbench.models import load_model
from kvbench.models.places import placed
from kvbench.models.quantised import check_quantised, weights_format
from kvbench.plugins import registry
from kvbench.runs import estimate, runner, sizing
from kvbench.runs.sweep import plan_sweep

PROMPT = tokens(1, 61)[0].tolist()


@pytest.mark.parametrize(("scaling", "context"), [("yarn:4", 100), ("yarn", 2048)])
def test_a_stretched_model_answers_as_plain_transformers_with_the_same_configuration(
    model_folder, scaling, context  # noqa: F811
):  # fmt: skip
    loaded = load_model(str(model_folder), device="cpu", context_length=context, rope_scaling=scaling)
    assert loaded.rope_scaling == ("yarn:4" if scaling == "yarn:4" else "yarn:2")
    limit = loaded.max_context
    plain = AutoModelForCausalLM.from_pretrained(
        model_folder, max_position_embeddings=limit,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": limit / 1024,
            "original_max_position_embeddings": 1024,
        },
    )  # fmt: skip
    prompt = [token % 90 + 3 for token in range(80)]
    expected = plain.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 80:]
    unstretched = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        ids = torch.tensor([prompt])
        assert not torch.allclose(unstretched(ids).logits, plain(ids).logits, atol=1e-3), "short contexts change, too"
    for policy in ("full", "quest", "infllm", "shadowkv"):  # the last two rotate keys themselves
        takes = registry().find("policy", policy).takes_budget
        with kvbench.attach(loaded.model, policy=policy, budget=Budget(ratio=1.0) if takes else None) as session:
            assert generate(session, prompt, max_new_tokens=8).tokens == expected.tolist()


@pytest.mark.parametrize("text", ["ntk", "yarn:1", "yarn:x", "yarn:", "yarn:1e9"])
def test_another_scaling_is_one_sentence(text):
    with pytest.raises(KVBenchError, match="is not known: give yarn"):
        load_model("smollm2-135m", rope_scaling=text)


def test_a_run_states_its_scaling_and_a_sweep_stretches_each_length_by_itself(
    kvbench, model_folder, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setitem(registry().classes["task"], "short", Short)
    common = ("run", "--model", model_folder, "--policy", "full", "--task", "short", "--context-length", 128,
              "--examples", 1, "--probe-examples", 0, "--output", tmp_path / "out")  # fmt: skip
    code, out, _ = kvbench(*common, "--rope-scaling", "yarn:2")
    assert (code, "rope scaling yarn:2" in " ".join(out.split())) == (0, True)
    code, out, _ = kvbench(*common, "--rope-scaling", "yarn", "--json")  # the context needs none
    assert json.loads(out)["runs"][0]["config"]["rope_scaling"] is None
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"policies: [full]\nmodels: [{{name: {model_folder}, rope_scaling: yarn}}]\ntasks: [short]\nexamples: 1\n"
        "context_lengths: [512, 2048, 4096]\n"
    )
    planned = [one.config for one in plan_sweep(file)]
    assert [one.rope_scaling for one in planned] == [None, "yarn:2", "yarn:4"]
    assert len({one.model_fingerprint for one in planned}) == 3


# -- sizes by memory ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    return loaded_model()


@pytest.fixture
def execute(monkeypatch, loaded, tmp_path):
    monkeypatch.setitem(registry().classes["task"], "short", Short)
    request = runner.Request("full", {}, None, "short", {}, 128, 9, 1, probe_examples=1)

    def run(place, policies=("full", "streaming_llm"), failed=None, **changes):
        configs = [
            runner.plan(
                dataclasses.replace(
                    request, policy=policy, budget=None if policy == "full" else Budget(tokens=80), **changes
                ),
                loaded,
            )
            for policy in policies
        ]
        return runner.execute(configs, loaded, tmp_path / place, lambda *_: None, failed)

    return run


def exhausted(monkeypatch, fails):
    """Let prompts of examples fail as PyTorch's allocator does, where `fails(rows, tokens)`; gives the calls."""
    calls = []
    from kvbench.engine import generation, prefill

    forward, extend, inside = prefill.forward, runner.extend, []

    def watched(*arguments):  # not the conformance checks
        inside.append(True)
        try:
            extend(*arguments)
        finally:
            inside.pop()

    monkeypatch.setattr(runner, "extend", watched)

    def short(session, ids, mask, start, chunk=None):
        if not inside:
            return forward(session, ids, mask, start, chunk)
        rows, size = len(ids), min(chunk or ids.shape[1], ids.shape[1])
        calls.append((rows, size))
        if fails(rows, size):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return forward(session, ids, mask, start, chunk)

    monkeypatch.setattr(generation, "forward", short)
    monkeypatch.setattr(prefill, "forward", short)
    return calls


@pytest.mark.parametrize("share", [True, False])
def test_where_memory_runs_out_the_batch_is_halved_and_nothing_is_lost(execute, monkeypatch, share):
    expected = execute("undisturbed", batch_size="auto", share_prefill=share)
    assert all(run.metrics["batch"] == {"smallest": 1, "largest": 8} for run in expected)  # the probed one alone
    calls = exhausted(monkeypatch, lambda rows, tokens: rows > 2)
    runs = execute("short", batch_size="auto", share_prefill=share)
    for run, other in zip(runs, expected, strict=True):
        assert (run.status, run.config.hash) == ("complete", other.config.hash)
        assert [(row["id"], row["prediction"]) for row in run.rows] == [
            (row["id"], row["prediction"]) for row in other.rows
        ]
        assert run.metrics["batch"] == {"smallest": 1, "largest": 2}
        assert run.metrics["out_of_memory"] == 2  # with 8 and with 4
        assert len({row["id"] for row in run.rows}) == 9
        assert any("Memory ran out with 8 examples at once" in note for note in run.notes)
    assert sum(rows > 2 for rows, _ in calls) == (2 if share else 4), "what failed once is not tried again"


def test_where_memory_runs_out_with_one_example_the_chunk_is_halved(execute, monkeypatch):
    monkeypatch.setattr(sizing, "SMALLEST_CHUNK", 16)
    calls = exhausted(monkeypatch, lambda rows, tokens: tokens > 40)
    runs = execute("chunks", batch_size=1, prefill_chunk="auto", examples=2)
    assert all(run.status == "complete" for run in runs)
    chunk = runs[0].metrics["prefill_chunk"]["largest"]
    assert 20 < chunk <= 40
    assert sum(tokens > 40 for _, tokens in calls) <= 2
    failures = []
    exhausted(monkeypatch, lambda rows, tokens: True)
    left = execute("never", prefill_chunk="auto", examples=1, failed=lambda config, error: failures.append(error))
    assert (left, [type(error).__name__ for error in failures]) == ([], ["OutOfMemoryError"] * 2)


def test_batches_and_chunks_fill_the_free_memory_and_no_more(execute, loaded, monkeypatch):
    row = sizing.HOLDINGS * 120 * 768 + sizing.chunk_bytes(loaded.model, 120, 120)
    monkeypatch.setattr(sizing, "free_memory", lambda loaded: int(3.5 * row / sizing.ROOM))
    (run,) = execute("three", policies=("full",), batch_size="auto", probe_examples=0)
    assert 3 <= run.metrics["batch"]["largest"] <= 6
    chunks = []
    for room in (1e5, 1e6, 1e9):
        monkeypatch.setattr(sizing, "free_memory", lambda loaded, room=room: room)
        chunks.append(sizing.Sizing(run.config.model_copy(update={"prefill_chunk": "auto"}), loaded).chunk(1, 4000))
    assert chunks[0] == sizing.SMALLEST_CHUNK <= chunks[1]
    assert chunks[2] is None  # all at once
    assert (
        execute("alone", policies=("full",), batch_size="auto", question="agnostic", examples=1)[0].config.batch_size
        == 1
    )


# -- quantised and spread weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq 4-bit"),
        ({"quant_method": "awq", "bits": 4}, "awq 4-bit"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes 4-bit nf4",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        (None, None),
    ],
)
def test_quantised_weights_have_a_name(given, name):
    config = LlamaConfig(**({} if given is None else {"quantization_config": given}))
    assert weights_format(config) == name


def test_a_library_that_is_missing_is_one_sentence_before_the_work(
    kvbench, model_folder, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    import shutil

    from transformers.quantizers import quantizer_gptq

    monkeypatch.setattr(quantizer_gptq, "is_optimum_available", lambda *_: False)
    folder = shutil.copytree(model_folder, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dataset": "c4"}
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err = kvbench(
        "run", "--model", folder, "--policy", "full", "--context-length", 512, "--output", tmp_path / "out"
    )
    told = " ".join(err.split())
    assert (code, "The weights of" in told, "gptq 4-bit" in told, "optimum" in told) == (2, True, True, True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(KVBenchError, match="cannot be read here"):
        check_quantised("x", LlamaConfig(quantization_config=config["quantization_config"]), torch.device("cpu"))


def test_a_map_of_devices_is_told_by_runs_of_layers():
    model = tiny_model()
    assert placed(model) is None
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.layers.2": 1,
                           "model.norm": 1, "lm_head": "cpu"}  # fmt: skip
    assert placed(model) == {
        "model.embed_tokens": "cuda:0", "model.layers.0-1": "cuda:0", "model.layers.2": "cuda:1",
        "model.norm": "cuda:1", "lm_head": "cpu",
    }  # fmt: skip


def test_a_map_on_a_machine_without_a_gpu_is_the_cpu(model_folder):  # noqa: F811
    loaded = load_model(str(model_folder), device="cpu", device_map="auto")
    assert (loaded.device_map, loaded.placed, loaded.model.device.type) == ("auto", None, "cpu")
    with pytest.raises(KVBenchError, match="The device map balanced is not known"):
        load_model(str(model_folder), device_map="balanced")


def test_resident_bytes_are_told_by_device(monkeypatch):
    from fake_devices import FakeDevices, spread
    from test_devices import PLACES, padded, session

    from kvbench import kernels

    ids, mask = padded()
    found = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(synchronize=lambda: None))
    with kernels.using("torch"), FakeDevices():
        for places in (PLACES, dict.fromkeys(PLACES, "cuda:0")):
            model = tiny_model()
            spread(model, places)
            with session(model, "snapkv") as attached, torch.no_grad():
                model(ids.to("cuda:0"), attention_mask=mask.to("cuda:0"))
                found.append((attached.cache.device_bytes(), attached.cache.bytes()["resident"]))
    (by_device, resident), (alone, _) = found
    assert set(by_device) == {"cuda:0", "cuda:1"} and alone == {}
    assert sum(by_device.values()) == resident
    assert by_device["cuda:0"] > by_device["cuda:1"] > 0  # two layers and one


def test_short_measurements_are_carried_on_by_their_law():
    prefill = estimate._fit([(n, 0.1 + 2e-4 * n + 3e-8 * n**2) for n in (128, 256, 512, 1024)])
    assert prefill(16384) == pytest.approx(0.1 + 2e-4 * 16384 + 3e-8 * 16384**2, rel=1e-6)
    assert estimate._fit([(512, 2.0)])(512) == pytest.approx(2.0)
    assert estimate._line((512, 1024), (0.01, 0.012))(2048) == pytest.approx(0.016)
    assert estimate._line((512, 1024), (0.012, 0.01))(4096) == 0.01, "a step that got faster is noise"
    assert estimate._grows((512, 1024), (1.0, 4.0))(4096) == pytest.approx(64)
    assert estimate._grows((512, 1024), (1.0, 9.0))(2048) == pytest.approx(36), "never more than quadratic"
    assert estimate._grows((512, 1024), (0.0, 0.0))(4096) == 0
