"""Generation: batches and prompts computed once give the tokens of single, undisturbed generations."""

import dataclasses
import time

import pytest
import torch
from language import loaded_model
from test_results import Short
from tiny import ARCHITECTURES, tiny_model, tokens

import kvbench
from kvbench.contract.budget import Budget
from kvbench.engine.generation import generate, generate_batch
from kvbench.engine.prefill import prefill
from kvbench.engine.prompt import PrefilledLayers
from kvbench.engine.survey import survey
from kvbench.plugins import registry
from kvbench.runs import examples, runner

pytestmark = pytest.mark.transformers

POLICIES = {
    "full": {}, "streaming_llm": {}, "snapkv": {"window": 8}, "quest": {"page_size": 4},
    "flat": {"sinks": 2, "window": 8}, "retrieval": {"sinks": 2, "window": 8},
}  # fmt: skip
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (40, 61, 61, 50)]
LIMITS = [9, 4, 12, 1]


def attach(model, policy):
    return kvbench.attach(model, policy=policy, budget=None if policy == "full" else 24, options=POLICIES[policy])


def plain(model, prompt, steps):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("policy", "chunk"), [*((policy, None) for policy in POLICIES), ("full", 17), ("quest", 17)])
def test_a_batch_gives_the_tokens_of_its_prompts_alone(policy, chunk):
    model = tiny_model()
    with attach(model, policy) as session:
        alone = [generate(session, p, max_new_tokens=n) for p, n in zip(PROMPTS, LIMITS, strict=True)]
        batch = generate_batch(session, PROMPTS, max_new_tokens=LIMITS, prefill_chunk=chunk)
    assert [one.tokens for one in batch] == [one.tokens for one in alone]
    assert [len(one.step_s) for one in batch] == [n - 1 for n in LIMITS]
    if policy == "full":
        assert [one.tokens for one in batch] == [plain(model, p, n) for p, n in zip(PROMPTS, LIMITS, strict=True)]


def test_a_batch_row_ends_at_a_stop_token_and_the_others_go_on():
    model = tiny_model()
    with attach(model, "full") as session:
        free = generate_batch(session, PROMPTS, max_new_tokens=[8] * 4)
        stop = free[0].tokens[3]
        stopped = generate_batch(session, PROMPTS, max_new_tokens=[8] * 4, stop={stop})
    for before, after in zip(free, stopped, strict=True):
        ends = before.tokens.index(stop) if stop in before.tokens else 8
        assert after.tokens == before.tokens[:ends]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_computed_once_serves_every_policy(architecture):
    model = tiny_model(architecture)
    done = prefill(model, PROMPTS)
    governed = POLICIES if architecture == "llama" else ["full", "snapkv", "quest"]
    for policy in ["full"] if architecture == "mistral" else governed:
        with attach(model, policy) as session:
            own = generate_batch(session, PROMPTS, max_new_tokens=LIMITS)
            shared = generate_batch(session, PROMPTS, max_new_tokens=LIMITS, prefilled=done)
        assert [one.tokens for one in shared] == [one.tokens for one in own]
        assert shared[0].prefill_s == pytest.approx(done.seconds, abs=0.01)
        assert [one.bytes for one in shared] == [one.bytes for one in own]


@pytest.mark.parametrize("window", [None, 8])
def test_a_context_that_was_there_before_is_not_computed_again_and_changes_nothing(window):
    model, context = tiny_model(), tokens(1, 50)[0].tolist()
    questions = [tokens(1, length, seed=length)[0].tolist() for length in (7, 12)]
    first, second = ([*context, *question] for question in questions)
    before = prefill(model, [first], query_window=window, context=50)
    fresh = prefill(model, [second], query_window=window, context=50)
    again = prefill(model, [second], query_window=window, context=50, before=before)
    assert (before.reused, fresh.reused, again.reused) == (0, 0, 50)
    assert torch.equal(fresh.logits, again.logits)
    for number, layer in fresh.layers.items():
        for name in ("keys", "values", "queries"):
            assert torch.equal(getattr(layer, name)[:, :, -8:], getattr(again.layers[number], name)[:, :, -8:])
    with attach(model, "snapkv") as session:
        answers = [generate(session, second, max_new_tokens=6, prefilled=done).tokens for done in (fresh, again)]
    assert answers[0] == answers[1]
    other = prefill(model, [[3, *second[1:]]], query_window=window, context=50, before=before)
    assert other.reused == 0


@pytest.mark.parametrize("allocator", ["ada", "pyramid"])
def test_an_allocator_finds_in_a_shared_prompt_what_it_looks_at(allocator):
    model = tiny_model()
    done = prefill(model, PROMPTS, query_window=64)
    budget = Budget(tokens=24, allocator=allocator)
    with kvbench.attach(model, policy="snapkv", budget=budget, options=POLICIES["snapkv"]) as session:
        own = generate_batch(session, PROMPTS, max_new_tokens=LIMITS)
        shared = generate_batch(session, PROMPTS, max_new_tokens=LIMITS, prefilled=done)
    assert [one.tokens for one in shared] == [one.tokens for one in own]


def test_a_question_goes_through_the_policy_after_a_shared_prompt():
    model, ids = tiny_model(), PROMPTS[1]
    done = prefill(model, [ids[:50]])
    for policy in POLICIES:
        with attach(model, policy) as session:
            own = generate(session, ids, prompt_tokens=50, max_new_tokens=6)
            shared = generate(session, ids, prompt_tokens=50, max_new_tokens=6, prefilled=done)
        assert shared.tokens == own.tokens


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setitem(registry().classes["task"], "short", Short)
    return loaded_model()


def run(loaded, path, policies=("snapkv", "full"), **changes):
    request = runner.Request("full", {}, None, "short", {}, 128, 5, 1, probe_examples=1)
    requests = [
        dataclasses.replace(
            request, policy=policy, policy_options=POLICIES[policy],
            budget=None if policy == "full" else Budget(ratio=0.3), **changes,
        )
        for policy in policies
    ]  # fmt: skip
    return runner.execute([runner.plan(r, loaded) for r in requests], loaded, path, lambda *_: None)


def answers(runs):
    return [{row["id"]: (row["prediction"], row["score"]) for row in done.rows} for done in runs]


def test_runs_in_batches_and_with_a_shared_prefill_give_the_answers_of_plain_runs(loaded, tmp_path):
    expected = run(loaded, tmp_path / "plain")
    hashes = {done.config.hash for done in expected}
    for changes in ({"batch_size": 3}, {"batch_size": 2, "share_prefill": True}):
        found = run(loaded, tmp_path / "other", **changes)
        assert answers(found) == answers(expected)
        for done in found:
            assert done.status == "complete"
            assert done.config.hash not in hashes
            assert (done.metrics["peak_memory_bytes"] is None) == bool(changes.get("share_prefill"))
            assert done.metrics["ttft_s"]["prefill"] > 0
            assert done.metrics["probed_examples"] == 1


@pytest.fixture
def passes(loaded, monkeypatch):
    """The lengths of all first calls over a prompt; warm-ups, the model's survey and its checks are left out."""
    found = []

    def note(model, args, kwargs):
        past, ids = kwargs.get("past_key_values"), args[0] if args else kwargs["input_ids"]
        if past is None or past.get_seq_length() == 0:
            found.append(ids.shape[1])

    monkeypatch.setattr(runner, "_warm_up", lambda *_: None)
    monkeypatch.setattr(runner, "_prove", lambda runs, *_: {each.config.hash: [] for each in runs})
    survey(loaded.model)  # done once for a model
    handle = loaded.model.register_forward_pre_hook(note, with_kwargs=True)
    yield found
    handle.remove()


@pytest.mark.parametrize("question", ["aware", "agnostic"])
def test_each_prompt_is_computed_once_for_policies_and_probes_and_every_peak_is_measured(
    loaded, tmp_path, passes, question
):
    expected = run(loaded, tmp_path / "own", share_prefill=False, question=question)
    assert len(passes) == 2 * 5 + 2  # and one more for the probes of each policy
    passes.clear()
    found = run(loaded, tmp_path / "shared", question=question)
    # A question that comes after its prompt: exact attention takes both together where it computes them itself, which
    # nobody else can take over; it does so for its probes, and once for its peak memory.
    assert len(passes) == (5 if question == "aware" else 7)
    assert answers(found) == answers(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.config.share_prefill, theirs.config.share_prefill) == (True, False)
        assert ours.metrics["recall_at_k"] == theirs.metrics["recall_at_k"]
        # Spare room differs with the calls that a cache grew by.
        assert ours.metrics["bytes"] == pytest.approx(theirs.metrics["bytes"], rel=0.01)
        assert all(row["peak_memory_bytes"] for row in theirs.rows)
        measured = [row["id"] for row in ours.rows if row["peak_memory_bytes"]]
        assert len(measured) == 1
        assert ours.metrics["peak_memory_bytes"] > 10**7
        assert all(row["prefill_s"] > 0 for row in ours.rows)
    own = [[place for place, row in enumerate(done.rows) if row["peak_memory_bytes"]] for done in found]
    assert own == ([[0], [1]] if question == "aware" else [[0], [4]])


def test_with_more_policies_than_examples_every_peak_is_still_measured(loaded, tmp_path, passes):
    found = run(loaded, tmp_path, policies=("snapkv", "quest", "streaming_llm"), examples=2, probe_examples=0)
    assert len(passes) == 3
    assert all(done.metrics["peak_memory_bytes"] for done in found)


def test_a_run_alone_computes_its_prompts_itself_and_a_full_disk_lets_everyone_do_so(
    loaded, tmp_path, passes, monkeypatch
):
    (alone,) = run(loaded, tmp_path / "alone", policies=("quest",), probe_examples=0)
    assert (len(passes), all(row["peak_memory_bytes"] for row in alone.rows)) == (5, True)
    expected = run(loaded, tmp_path / "room")
    passes.clear()
    monkeypatch.setattr("kvbench.runs.sharing.spool_room", lambda: 1000)
    found = run(loaded, tmp_path / "none")
    assert len(passes) == 2 * 5 + 2
    assert answers(found) == answers(expected)
    assert all(row["peak_memory_bytes"] for done in found for row in done.rows)


def test_a_policy_that_fails_on_a_shared_prompt_is_left_out_and_the_others_go_on(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("kvbench.strategies.evicting.snapkv.window_attention", lambda *_: 1 / 0)
    left_out = []
    configs = [
        runner.plan(runner.Request(policy, POLICIES[policy], Budget(ratio=0.3), "short", {}, 128, 2, 1), loaded)
        for policy in ("snapkv", "quest")
    ]
    (done,) = runner.execute(configs, loaded, tmp_path, lambda *_: None, lambda *told: left_out.append(told))
    assert (done.config.policy, done.status, len(done.rows)) == ("quest", "complete", 2)
    ((failed, error),) = left_out
    assert (failed.policy, "failed in prefill" in str(error)) == ("snapkv", True)
    (folder,) = tmp_path.glob("snapkv-*")
    assert '"status": "failed"' in (folder / "run.json").read_text()


def test_what_is_recorded_takes_none_of_the_measured_time(loaded, tmp_path, monkeypatch):
    note = PrefilledLayers.note
    monkeypatch.setattr(PrefilledLayers, "note", lambda *given: (time.sleep(0.3), note(*given)))
    monkeypatch.setattr(runner, "_warm_up", lambda *_: None)
    found = run(loaded, tmp_path, examples=2)
    layers = loaded.model.config.num_hidden_layers
    for row in (row for done in found for row in done.rows):
        assert max(row["prefill_s"], row["index_s"]) < 0.3 * layers


def test_a_run_stopped_inside_a_batch_ends_in_the_same_examples(loaded, tmp_path, monkeypatch):
    changes = {"batch_size": 2, "share_prefill": True}
    expected = run(loaded, tmp_path / "undisturbed", **changes)
    append, calls = runner.Run.append, []

    def failing(self, row):
        calls.append(row)
        if len(calls) in (2, 5, 8):
            raise KeyboardInterrupt
        append(self, row)

    monkeypatch.setattr(runner.Run, "append", failing)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(loaded, tmp_path / "stopped", **changes)
    found = run(loaded, tmp_path / "stopped", **changes)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.path / "examples.jsonl").read_bytes() == (theirs.path / "examples.jsonl").read_bytes()


def test_policies_that_draw_for_a_whole_batch_run_one_by_one(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(registry().find("policy", "snapkv"), "batched", False)
    sizes = []
    generate = examples.generate_batch
    monkeypatch.setattr(
        examples, "generate_batch", lambda s, prompts, **k: (sizes.append(len(prompts)), generate(s, prompts, **k))[1]
    )
    run(loaded, tmp_path, policies=("snapkv",), batch_size=4)
    assert set(sizes) == {1}
    run(loaded, tmp_path, policies=("quest",), batch_size=4)
    assert max(sizes) == 4


def test_the_warm_up_of_a_run_searches_and_inserts_so_that_no_measured_step_loads_their_code(loaded, monkeypatch):
    index, done = registry().find("index", "roargraph"), []
    for step in ("_build", "_search", "_insert"):
        plain = getattr(index, step)
        monkeypatch.setattr(
            index, step, lambda self, *given, step=step, plain=plain: (done.append(step), plain(self, *given))[1]
        )
    request = runner.Request("retrieval", {}, Budget(ratio=0.3), "short", {}, 512, 1, 1)
    runner._warm_up(runner.plan(request, loaded), loaded, {})
    assert {"_build", "_search", "_insert"} == set(done)
