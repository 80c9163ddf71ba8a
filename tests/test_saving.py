"""A context that is saved and loaded goes on bit for bit as it would have without the detour, with every policy."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
import zoo
from prepared import Prepared
from saving_process import go_on, read, settings
from saving_process import save as save_and_go_on
from test_plugins import installed
from test_session import padded_batch
from tiny import ALIKE, every_policy, of_each_kind, shared_model, tiny_model, tokens

import kvbench
from kvbench.contract.errors import KVBenchError
from kvbench.engine.generation import generate_batch
from kvbench.plugins import registry

pytestmark = pytest.mark.transformers

HERE = Path(__file__).parent
POLICIES = list(every_policy())
CACHED = [name for name in POLICIES if registry().find("policy", name).cached and name not in ALIKE]


def elsewhere(python, what, folder, policies):
    """What `saving_process` says of policies in another process."""
    done = python.run(HERE / "saving_process.py", what, folder, *policies)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("policy", of_each_kind(CACHED))
def test_a_loaded_context_goes_on_bit_for_bit(policy, tmp_path):
    """Rows of unequal length, after more steps than the window holds; one row goes on in another process below."""
    model = shared_model()
    with kvbench.attach(model, **settings(policy)) as session:
        ids, mask = read(session, *padded_batch(), steps=14)
        session.save(tmp_path / "state")
        held = session.cache.bytes()
        expected, _ = go_on(model, session.cache, ids, mask, 12)
        after = session.cache.bytes()
    with kvbench.attach(model, **settings(policy)) as session:
        cache = session.load(tmp_path / "state")
        assert torch.equal(session.ids, ids[:, :-1])
        assert torch.equal(session.mask, mask[:, :-1])
        assert cache.bytes() == held
        assert torch.equal(go_on(model, cache, ids, mask, 12)[0], expected)
        assert cache.bytes() == after


def test_so_it_does_in_another_process(tmp_path):
    for policy in CACHED:
        save_and_go_on(tmp_path, policy)
    with closing(Prepared()) as python:
        assert elsewhere(python, "resume", tmp_path, CACHED) == dict.fromkeys(CACHED, True)


# What takes other ways: ragged heads, budgets of each row, storages of others, layers left exact.
OTHERS = {
    "ragged": {"policy": "snapkv", "options": {"window": 8}, "budget": kvbench.Budget(tokens=24, allocator="ada")},
    "ragged and evicting": {"policy": "h2o", "budget": kvbench.Budget(tokens=24, allocator="ada")},
    "ragged selections": {
        "policy": "retrieval", "options": {"sinks": 2, "window": 8},
        "budget": kvbench.Budget(tokens=24, allocator="ada"),
    },
    "compressed again and again": {
        "policy": "snapkv", "options": {"window": 8}, "budget": kvbench.Budget(tokens=24, compress_every=8)
    },
    "compressed by running scores": {"policy": "h2o", "budget": kvbench.Budget(tokens=24, compress_every=8)},
    "measured": {"policy": "streaming_llm", "budget": kvbench.Budget(tokens=24, allocator="squeeze")},
    "composed": {
        "policy": "quest+kivi", "options": {"quest.page_size": 4, "kivi.group": 8, "kivi.residual": 8}, "budget": 24
    },
    "composed static set": {"policy": "h2o+kivi", "options": {"kivi.group": 8, "kivi.residual": 8}, "budget": 24},
    "composed ragged set": {
        "policy": "snapkv+kivi", "options": {"snapkv.window": 8, "kivi.group": 8, "kivi.residual": 8},
        "budget": kvbench.Budget(tokens=24, allocator="ada"),
    },
    "composed after the prompt": {
        "policy": "kvzip+kivi", "budget": 24,
        "options": {"kvzip.instruction": "", "kvzip.continuation": "", "kivi.group": 8, "kivi.residual": 8},
    },
    "compressed": {
        "policy": "snapkv", "options": {"window": 8}, "budget": kvbench.Budget(tokens=24, compress_every=8)
    },
    "compressed and ragged": {
        "policy": "h2o", "budget": kvbench.Budget(tokens=24, allocator="ada", compress_every=4)
    },
    "few late tokens": {"policy": "kivi", "options": {"group": 8, "residual": 8}},
    "dense": {"policy": "infinigen", "budget": 24, "dense_layers": 1},
}  # fmt: skip
MODELS = {
    "latents": ("deepseek_v3", {"policy": "snapkv", "options": {"window": 4}, "budget": 12}),
    "ragged latents": (
        "deepseek_v3",
        {"policy": "snapkv", "options": {"window": 4}, "budget": kvbench.Budget(tokens=12, allocator="ada")},
    ),
    "an index over latents": ("deepseek_v3", {"policy": "hnsw", "options": {"sinks": 2, "window": 4}, "budget": 12}),
    "shared keys": ("gemma3n_text", {"policy": "quest", "options": {"page_size": 4}, "budget": 12}),
    "linear attention": ("qwen3_next", {"policy": "quest", "options": {"page_size": 4}, "budget": 12}),
    "both in a layer": ("falcon_h1", {"policy": "tova", "budget": 12}),
    "sinks without values": ("gpt_oss", {"policy": "tova", "budget": 12}),
    "sliding windows": ("gemma3_text", {"policy": "retroinfer", "options": {"sinks": 2, "window": 4}, "budget": 12}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_so_do_ragged_heads_rows_of_their_own_and_compositions(name, tmp_path):
    resumed(shared_model(), OTHERS[name], padded_batch(), tmp_path / "state")


@pytest.mark.parametrize("name", MODELS)
def test_so_do_models_whose_layers_hold_something_else(name, tmp_path):
    kind, given = MODELS[name]
    resumed(zoo.tiny(kind), given, padded_batch((30, 37)), tmp_path / "state")


def resumed(model, given, prompt, path):
    with kvbench.attach(model, **given) as session:
        ids, mask = read(session, *prompt)
        session.save(path)
        expected, _ = go_on(model, session.cache, ids, mask, 20)
    with kvbench.resume(model, path) as session:
        assert torch.equal(go_on(model, session.cache, ids, mask, 20)[0], expected)
    return expected


@pytest.mark.parametrize("policy", ["streaming_llm", "h2o", "quest", "flat", "kivi", "full"])
def test_a_loaded_context_goes_on_in_steps_of_fixed_shapes_too(policy, tmp_path):
    model, prompts = shared_model(), [tokens(1, 60)[0].tolist(), tokens(1, 41)[0].tolist()]
    with kvbench.attach(model, **settings(policy)) as session:
        expected = generate_batch(session, prompts, max_new_tokens=[12] * 2, decoding="fixed")
        generate_batch(session, prompts, max_new_tokens=[1] * 2)
        session.save(tmp_path / "state")
    with kvbench.resume(model, tmp_path / "state") as session, torch.inference_mode():
        found = [[one.tokens[0]] for one in expected]
        decoder = session.fixed(torch.tensor(found)[:, 0], 11, graph=False)
        for _ in range(11):
            decoder.step()
            found = [[*row, token] for row, token in zip(found, decoder.tokens[:, 0].tolist(), strict=True)]
        assert found == [one.tokens for one in expected]
        with pytest.raises(KVBenchError, match="steps of fixed shapes, which hold its tokens in a form of their own"):
            session.save(tmp_path / "other")


def test_generate_goes_on_with_a_question(tmp_path):
    model, prompt, question = shared_model(), tokens(1, 60), tokens(1, 9, seed=3)
    more = {"max_new_tokens": 12, "do_sample": False}
    with kvbench.attach(model, policy="quest", budget=24) as session:
        model(prompt)
        session.save(tmp_path / "state")
        whole = torch.cat([prompt, question], dim=1)
        expected = model.generate(whole, past_key_values=session.cache, **more)
    for _ in range(2):  # many times
        with kvbench.resume(model, tmp_path / "state") as session:
            whole = torch.cat([session.ids, question], dim=1)
            assert torch.equal(model.generate(whole, past_key_values=session.cache, **more), expected)


def test_an_index_reads_the_keys_of_the_store_after_loading_too(tmp_path):
    model = shared_model()
    with kvbench.attach(model, **settings("ivf")) as session:
        read(session, *padded_batch())
        session.save(tmp_path / "state")
        size = (tmp_path / "state").stat().st_size
        held = session.cache.bytes()
    with kvbench.resume(model, tmp_path / "state") as session:
        for cached in session.cache.governed:
            for layer in cached.by_lane:
                assert layer.state["index"].keys.array.ctypes.data == layer.store.aside_keys.data_ptr()
    assert size < 1.5 * sum(held.values()) + 100_000  # the description


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path):
    with kvbench.attach(shared_model(), policy="quest", options={"page_size": 4}, budget=24) as session:
        read(session, tokens(1, 60), None)
        session.save(tmp_path / "state")
    return tmp_path / "state"


def refusal(state, model=None, **given):
    """What loading says; the session goes on as it was."""
    given = {"policy": "quest", "options": {"page_size": 4}, "budget": 24, **given}
    model = model or shared_model()
    with kvbench.attach(model, **given) as session:
        read(session, tokens(1, 30), None)
        cache = session.cache
        with pytest.raises(KVBenchError) as error:
            session.load(state)
        assert session.cache is cache
        model(tokens(1, 1), past_key_values=cache)
    told = str(error.value)
    assert "\n" not in told
    assert str(state) in told
    return told


def test_what_belongs_to_something_else_is_refused_by_name(state):
    assert "was saved from another model" in refusal(state, tiny_model(seed=1))
    assert "was saved from another model" in refusal(
        state, tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    )
    assert "with policy 'quest', and this session has 'snapkv'" in refusal(
        state, policy="snapkv", options={"window": 8}
    )
    assert "page_size=4, and this session has 8" in refusal(state, options={"page_size": 8})
    assert "a budget of tokens=24, and this session has ratio=0.5" in refusal(state, budget=0.5)
    assert "dense_layers=0, and this session has 1" in refusal(state, dense_layers=1)
    assert "budget 'uniform', and this session has 'pyramid'" in refusal(
        state, budget=kvbench.Budget(tokens=24, allocator="pyramid")
    )

    class Quest(registry().find("policy", "quest")):
        pass

    told = refusal(state, policy=Quest(Quest.Options(page_size=4)), options=None)
    assert "was saved by other code of policy 'quest'" in told


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_damaged_state_is_refused(state, place):
    data = bytearray(state.read_bytes())
    data[int(place * len(data))] ^= 4
    state.write_bytes(data)
    assert refusal(state)


def test_a_cut_or_foreign_file_is_refused(state, tmp_path):
    whole = state.read_bytes()
    for count in (0, 5, 400, len(whole) - 1):
        state.write_bytes(whole[:count])
        assert "no saved state that can be read" in refusal(state)
    for other in ("nothing", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        assert "no saved state that can be read" in refusal(tmp_path / other)
    index = registry().make("index", "flat")
    index.build(torch.randn(1, 20, 8))
    index.save(tmp_path / "index")
    assert "is no saved state of kvbench" in refusal(tmp_path / "index")


def test_there_is_something_to_save_only_after_the_prompt(tmp_path):
    model = shared_model()
    with kvbench.attach(model, policy="quest", budget=24, prompt_tokens=60) as session:
        with pytest.raises(KVBenchError, match="nothing to save yet"):
            session.save(tmp_path / "state")
        model(tokens(1, 20))
        with pytest.raises(KVBenchError, match="20 of the 60 tokens that were announced"):
            session.save(tmp_path / "state")
    with kvbench.attach(model, policy="full_no_cache") as session:
        for act in (session.save, session.load):
            with pytest.raises(KVBenchError, match="keeps no cache"):
                act(tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_a_state_that_cannot_be_written_leaves_the_old_one(state, monkeypatch):
    before = state.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with kvbench.resume(shared_model(), state) as session:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(KVBenchError, match=r"cannot be written to .* \(No space left on device\): free some"):
            session.save(state)
        monkeypatch.undo()
        with pytest.raises(KVBenchError, match=r"cannot be written to /nowhere"):
            session.save("/nowhere/state")
    assert state.read_bytes() == before
    assert list(state.parent.iterdir()) == [state]


def test_probes_that_watch_the_prompt_are_refused_and_others_go_on(state):
    watched = kvbench.attach(shared_model(), **settings("quest"), probes=["recall"])
    with watched, pytest.raises(KVBenchError, match="Probe 'recall' watches the prompt"):
        watched.load(state)

    class Steps(kvbench.Probe):
        name, summary, count = "steps", "Counts decoding steps of the first layer.", 0

        def select(self, layer, queries, budget):
            selection = yield
            self.count += layer.ordinal == 0
            return selection

        def result(self):
            return {"steps": self.count}

    probe = Steps()
    with kvbench.resume(shared_model(), state, probes=[probe]) as session:
        go_on(shared_model(), session.cache, torch.cat([session.ids, session.ids[:, :1]], dim=1), None, 3)
    assert probe.count == 3


# -- a third party's policies ----------------------------------------------------------------------------------------


SCRIBBLES = (
    "Policy 'scribbles' (kvbench_saving_plugins) changed its attribute 'seen' after the session began, and what a "
    "policy keeps on itself is not saved: keep it in layer.state, or define save_state and load_state."
)
LAMBDAS = (
    "Policy 'lambdas' (kvbench_saving_plugins) keeps an object of type function in layer.state of layer 0['rank'], "
    "which cannot be saved: keep tensors, arrays, numbers, texts, random generators, lists and dicts there, derive "
    "its class from kvbench.Saveable, or define save_state and load_state."
)


def test_installed_policies_are_saved_without_code_or_say_why_not(tmp_path):
    python, packages = installed(HERE / "saving_plugins", tmp_path)
    with closing(Prepared(python)) as python:
        told = elsewhere(python, "save", tmp_path, ["notes", "diary", "scribbles", "lambdas"])
        assert told == {"notes": None, "diary": None, "scribbles": SCRIBBLES, "lambdas": LAMBDAS}
        assert elsewhere(python, "resume", tmp_path, ["notes", "diary"]) == {"notes": True, "diary": True}
        code = tmp_path / "source" / "kvbench_saving_plugins.py"
        code.write_text(code.read_text().replace("kept = 3", "kept = 4"))
        subprocess.run([sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-build-isolation", "--upgrade",
                        "--target", packages, tmp_path / "source"], check=True)  # fmt: skip
        assert "was saved by other code of policy 'notes'" in elsewhere(python, "resume", tmp_path, ["notes"])["notes"]
