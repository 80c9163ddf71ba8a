"""What the contract carries beyond hooks at a decoding step, each shown by a third party's installed policy."""

import json
import sys
import threading
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from language import save_model
from prepared import Prepared
from test_plugins import installed
from test_session import generate, padded_batch
from tiny import shared_model, small_options, tiny_model, tokens
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import kvbench
from kvbench.contract import attend
from kvbench.contract.composition import compose
from kvbench.contract.errors import KVBenchError
from kvbench.engine.generation import generate as generate_once
from kvbench.engine.generation import generate_batch
from kvbench.engine.prefill import prefill
from kvbench.plugins import registry

PACKAGE = Path(__file__).parent / "contract_plugins"
sys.path.insert(0, str(PACKAGE))
import kvbench_contract_plugins as plugins  # noqa: E402


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    python = Prepared(installed(PACKAGE, tmp_path_factory.mktemp("environment"))[0])
    yield python
    python.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


def run(python, model, output, *arguments):
    done = python.kvbench(
        "run", "--model", model, "--context-length", 512, "--examples", 1, "--output", output, "--json",
        *arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {one["policy"]: one for one in json.loads(done.stdout)["runs"]}, done.stderr


def refused(python, model, output, *arguments):
    done = python.kvbench(
        "run", "--model", model, "--context-length", 512, "--examples", 1, "--output", output, *arguments
    )
    assert done.returncode == 2
    return " ".join(done.stderr.split())


def windowed(model, numbers, window, ids, mask=None, steps=20):
    """Plain transformers' tokens where, after the prompt, the layers `numbers` see the last `window` tokens only."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        if query.shape[2] == 1 and module.layer_idx in numbers:
            key, value = key[:, :, -window:], value[:, :, -window:]
            attention_mask = None if attention_mask is None else attention_mask[..., -window:]
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("windowed", attention)
    AttentionMaskInterface.register("windowed", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("windowed")
    try:
        return generate(model, ids, mask, steps=steps)
    finally:
        model.set_attn_implementation("sdpa")


# -- which layers a policy governs -----------------------------------------------------------------------------------


def test_a_policy_governs_the_layers_it_names_and_results_count_all(python, model, tmp_path):
    done, _ = run(python, model, tmp_path, "--policy", "every_other", "--tokens", 50)
    ours, full = done["every_other"], done["full"]
    kept = ours["metrics"]["attended_tokens"]
    context = full["metrics"]["attended_tokens"]
    assert kept == pytest.approx((50 + context) / 2)
    assert ours["metrics"]["density"] == pytest.approx((1 + 50 / context) / 2, rel=0.02)
    resident = ours["metrics"]["bytes"]["resident"] / full["metrics"]["bytes"]["resident"]
    assert 0.5 < resident < 0.75
    assert ours["metrics"].get("over_budget") is None


def test_dense_first_layers_are_a_setting_of_every_policy(python, model, tmp_path):
    done, _ = run(python, model, tmp_path, "--policy", "streaming_llm", "--tokens", 40, "--dense-layers", 2)
    ours, full = done["streaming_llm"], done["full"]
    assert (ours["config"]["dense_layers"], full["config"]["dense_layers"]) == (2, 0)
    context = full["metrics"]["attended_tokens"]
    assert ours["metrics"]["attended_tokens"] == pytest.approx((2 * 40 + 2 * context) / 4)
    assert "full-attention layers, so give 0 to 3" in refused(
        python, model, tmp_path, "--policy", "quest", "--dense-layers", 4
    )
    told = refused(python, model, tmp_path, "--policy", "quest", "-o", "dense_layers=2")
    assert "dense_layers is no option of policy 'quest' but a setting for every policy: use --dense-layers 2" in told


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize(("policy", "dense", "numbers"), [("every_other", 0, {1}), ("recent", 1, {1, 2})])
def test_ungoverned_layers_attend_as_plain_transformers_do(batch, policy, dense, numbers):
    ids, mask = (tokens(1, 60), None) if batch == "one" else padded_batch()
    model = tiny_model()
    expected = windowed(model, numbers, 12, ids, mask)
    made = plugins.EveryOther()
    if policy == "recent":
        made.governs = lambda place: True
    with kvbench.attach(model, policy=made, budget=12, dense_layers=dense) as session:
        assert session.numbers == sorted(numbers)
        assert torch.equal(generate(model, ids, mask), expected)


@pytest.mark.parametrize("policy", ["quest", "knorm", "infinigen", "snapkv"])
def test_dense_layers_from_a_shared_prefill_in_chunks_and_in_fixed_steps(policy):
    model = tiny_model(pad_token_id=None)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (40, 61, 61)]
    options, before = small_options(registry().find("policy", policy)), prefill(model, prompts)
    with kvbench.attach(model, policy=policy, budget=24, options=options, dense_layers=1) as session:
        plain = generate_batch(session, prompts, max_new_tokens=[15] * 3)
        chunked = generate_batch(session, prompts, max_new_tokens=[15] * 3, prefill_chunk=25)
        shared = generate_batch(session, prompts, max_new_tokens=[15] * 3, prefilled=before)
        assert [one.tokens for one in plain] == [one.tokens for one in chunked] == [one.tokens for one in shared]
        assert plain[0].bytes == shared[0].bytes
        if policy != "infinigen":
            fixed = generate_batch(session, prompts, max_new_tokens=[15] * 3, decoding="fixed")
            assert [one.tokens for one in fixed] == [one.tokens for one in plain]


def test_infinigen_predicts_from_a_dense_layer_before_it():
    model, prompt = tiny_model(), [tokens(1, 60)[0].tolist()]
    seen = []

    class Watching(registry().find("policy", "infinigen")):
        def select(self, layer, queries, budget):
            seen.append((layer.number, layer.previous is None, layer.hidden_before.shape))
            return super().select(layer, queries, budget)

    with kvbench.attach(model, policy=Watching(), budget=12, dense_layers=1) as session:
        generate_batch(session, prompt, max_new_tokens=[3])
    assert seen == [(1, True, (1, 1, 48)), (2, False, (1, 1, 48))] * 2


def test_budgets_are_shared_over_the_governed_layers_and_bytes_are_theirs():
    model = tiny_model(num_hidden_layers=6)
    token = 2 * 2 * 8 * 4  # keys and values of 2 heads of 8 float32 numbers
    ids = tokens(1, 60)
    for budget in (kvbench.Budget(tokens=20, allocator="pyramid"), kvbench.Budget(bytes=20 * token * 4)):
        with kvbench.attach(model, policy="snapkv", options={"window": 4}, budget=budget, dense_layers=2) as session:
            model(ids)
            assert session.cache.bytes()["resident"] == token * (2 * 60 + 4 * 20)


def test_a_policy_that_governs_nothing_is_refused():
    made = plugins.EveryOther()
    made.governs = lambda place: False
    with pytest.raises(KVBenchError, match="governs none of the 3 layers that it was offered"):
        kvbench.attach(tiny_model(), policy=made, budget=12)
    with pytest.raises(KVBenchError, match="dense_layers is 3: LlamaForCausalLM has 3 full-attention layers"):
        kvbench.attach(tiny_model(), policy="quest", budget=12, dense_layers=3)


# -- the prompt's attention ------------------------------------------------------------------------------------------


def block_sparse(model, ids, mask=None, steps=20, block=16, dense=0):
    """Plain transformers' tokens with the plugin's pattern as an attention mask of the prompt, in float64."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        new, tokens = query.shape[2], key.shape[2]
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, 1).double(), value.repeat_interleave(share, 1).double()
        logits = query.double() @ key.transpose(-1, -2) * kwargs["scaling"]
        pads = torch.zeros(len(ids), dtype=torch.long) if mask is None else (mask == 0).sum(-1)
        mine = (torch.arange(tokens - new, tokens) - pads[:, None])[:, None, :, None]
        theirs = (torch.arange(tokens) - pads[:, None])[:, None, None]
        seen = (theirs >= 0) & (theirs <= mine)
        if new > 1 and module.layer_idx >= dense:
            seen &= (theirs < block) | (mine // block - theirs // block <= 1)
        weights = logits.masked_fill(~seen, -1e30).softmax(-1)
        return (weights @ value).transpose(1, 2).to(query.dtype), None

    AttentionInterface.register("block_sparse", attention)
    AttentionMaskInterface.register("block_sparse", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("block_sparse")
    try:
        return generate(model, ids, mask, steps=steps)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("dense", [0, 1])
def test_a_policy_computes_the_prompts_attention(batch, dense):
    ids, mask = (tokens(1, 75), None) if batch == "one" else padded_batch((60, 75, 52))
    model = tiny_model()
    expected = block_sparse(model, ids, mask, dense=dense)
    assert not torch.equal(expected, generate(model, ids, mask))
    with kvbench.attach(model, policy=plugins.BlockSparse(plugins.BlockSparse.Options(dense=dense))) as session:
        assert torch.equal(generate(model, ids, mask), expected)
        calls = [layer.state.get("calls") for cached in session.cache.governed for layer in cached.by_lane]
        assert set(calls) == ({1} if not dense else {None, 1})
        shown = torch.ones_like(ids) if mask is None else mask
        prompts = [row[there.bool()].tolist() for row, there in zip(ids, shown, strict=True)]
        chunked = generate_batch(session, prompts, max_new_tokens=[20] * len(prompts), prefill_chunk=25)
        assert [one.tokens for one in chunked] == expected.tolist()
        assert all(one.state["calls"] > 1 for one in session.cache.governed[-1].by_lane)


def test_a_policy_of_the_prompt_takes_over_no_shared_prompt_and_answers_in_shape():
    model, prompt = tiny_model(), tokens(1, 40)[0].tolist()
    before = prefill(model, [prompt])
    with (
        kvbench.attach(model, policy=plugins.BlockSparse()) as session,
        pytest.raises(KVBenchError, match="computes the prompt's attention itself"),
    ):
        session.resume(before)

    class Short(plugins.BlockSparse):
        def attend_prompt(self, layer, queries, keys, values):
            return queries[:, :, 1:]

    with kvbench.attach(model, policy=Short()), pytest.raises(KVBenchError, match=r"expected a tensor \[1, 6, 40, 8\]"):
        model(torch.tensor([prompt]))

    class Exact(plugins.BlockSparse):
        exact = True

    with pytest.raises(KVBenchError, match="defines attend_prompt and is exact"):
        kvbench.attach(model, policy=Exact())


def test_runs_say_whose_the_prompts_attention_is(python, model, tmp_path):
    done, _ = run(python, model, tmp_path, "--policy", "block_sparse,snapkv", "--tokens", 100, "--share-prefill")
    ours, full = done["block_sparse"], done["full"]
    assert [done[name]["config"]["prompt_attention"] for name in ("block_sparse", "snapkv", "full")] == [
        "policy", "exact", "exact",
    ]  # fmt: skip
    assert not ours["config"]["share_prefill"] and full["config"]["share_prefill"]
    assert ours["metrics"]["density"] == 1.0
    checks = {check["name"]: check for report in ours["conformance"] for check in report["checks"]}
    assert checks["two runs are equal"]["status"] == "passed"
    assert "the prompt's attention is sparse" in checks["exact when covering"]["detail"]
    shown = python.kvbench(
        "run", "--policy", "block_sparse", "--model", model, "--context-length", 512, "--examples", 1,
        "--output", tmp_path,
    ).stdout  # fmt: skip
    assert "the prompt's attention of block_sparse is the policy's own" in " ".join(shown.split())


# -- blocks of queries -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def turns(model, session, ids, mask, sizes):
    """Logits of all tokens after the prompt, which come in calls of `sizes` tokens."""
    prompt, found = ids.shape[1] - sum(sizes), []
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    past, start = None, 0
    for stop in (prompt, *(prompt + sum(sizes[: turn + 1]) for turn in range(len(sizes)))):
        extra = {} if mask is None else {
            "attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]
        }  # fmt: skip
        out = model(ids[:, start:stop], past_key_values=past, use_cache=True, **extra)
        past, start = out.past_key_values, stop
        found.append(out.logits)
    return torch.cat(found[1:], dim=1)


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize(
    ("policy", "allocator"),
    [("snapkv", "uniform"), ("snapkv", "ada"), ("expected_attention", "ada"), ("top_in_blocks", "uniform")],
)
def test_a_block_of_tokens_is_one_call_and_equals_token_by_token(policy, allocator, batch, monkeypatch):
    monkeypatch.setenv("KVBENCH_CHECK", "1")
    ids, mask = (tokens(1, 75), None) if batch == "one" else padded_batch((60, 75, 60))
    model, budget = tiny_model(pad_token_id=None), kvbench.Budget(tokens=20, allocator=allocator)
    if policy == "top_in_blocks":
        made = plugins.TopInBlocks
    else:
        cls = registry().find("policy", policy)
        made = lambda: cls(cls.Options(**small_options(cls)))  # noqa: E731

    def take(sizes, probes=()):
        with kvbench.attach(model, policy=made(), budget=budget, probes=probes) as session:
            logits = turns(model, session, ids, mask, sizes)
            return logits, [layer for cached in session.cache.governed for layer in cached.by_lane]

    singly, _ = take([1] * 16)
    together, layers = take([7, 1, 8])
    torch.testing.assert_close(together, singly, rtol=1e-4, atol=1e-4)
    if policy == "top_in_blocks":
        assert {tuple(layer.state["blocks"]) for layer in layers} == {(7, 1, 8)}
        probed, layers = take([7, 1, 8], probes=["density"])  # a probe that takes one token at a time
        assert {tuple(layer.state["blocks"]) for layer in layers} == {(1,) * 16}
        torch.testing.assert_close(probed, singly, rtol=1e-4, atol=1e-4)


def test_a_large_block_is_attended_in_parts_and_weights_sum_to_one(monkeypatch):
    ids, model = tokens(1, 75), tiny_model()
    seen = []

    class Weighing(plugins.TopInBlocks):
        def attend(self, layer, queries, selection):
            result = attend.attend(layer, queries, selection, with_weights=True)
            seen.append(result.weights.sum(-1))
            assert result.lse.shape == queries.shape[:3]
            return result

    found = []
    for most in (2**26, 3 * 6 * 75):
        monkeypatch.setattr(attend, "MOST_LOGITS", most)
        with kvbench.attach(model, policy=Weighing(), budget=20) as session:
            found.append(turns(model, session, ids, None, [10]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    for sums in seen:
        torch.testing.assert_close(sums, torch.ones(1, 6, 10))


def test_the_loop_stays_for_policies_that_do_not_take_blocks():
    ids, model = tokens(1, 75), tiny_model()
    options = small_options(registry().find("policy", "h2o"))
    with kvbench.attach(model, policy="h2o", budget=20, options=options) as session:
        assert not session.blocks
        together = turns(model, session, ids, None, [16])
        torch.testing.assert_close(turns(model, session, ids, None, [1] * 16), together, rtol=1e-4, atol=5e-5)
    with kvbench.attach(model, policy="snapkv", budget=20, options={"window": 4}) as session:
        assert session.blocks


def test_a_blocks_ids_of_the_wrong_shape_are_named():
    class Wrong(plugins.TopInBlocks):
        def select(self, layer, queries, budget):
            return kvbench.Selection(super().select(layer, queries, budget).ids[:, :, 1:])

    with (
        kvbench.attach(tiny_model(), policy=Wrong(), budget=20) as session,
        pytest.raises(KVBenchError, match="heads and 7 queries, or one set"),
    ):
        turns(session.model, session, tokens(1, 75), None, [7])


# -- a selection under way while the static set is attended to --------------------------------------------------------


class AtOnce(plugins.Searching):
    """Selects in the serial order, before the static set's attention."""

    def begin_select(self, layer, queries, budget):
        done = Future()
        done.set_result(self.select(layer, queries, budget))
        return done


class Afterwards(plugins.Searching):
    """Selects in the serial order, after the static set's attention would have been."""

    def begin_select(self, layer, queries, budget):
        return None


@pytest.mark.parametrize("batch", ["one", "padded"])
def test_a_selection_begun_on_a_thread_gives_the_bits_of_the_serial_order(batch, monkeypatch):
    monkeypatch.setenv("KVBENCH_CHECK", "1")
    ids, mask = (tokens(1, 75), None) if batch == "one" else padded_batch((60, 75, 60))
    model, found = tiny_model(pad_token_id=None), {}
    for name, policy, probes in (
        ("overlapped", plugins.Searching, ()), ("at once", AtOnce, ()), ("afterwards", Afterwards, ()),
        ("probed", plugins.Searching, ["recall"]), ("without", plugins.TopInBlocks, ["recall"]),
    ):  # fmt: skip
        with kvbench.attach(model, policy=policy(), budget=20, probes=probes) as session:
            found[name] = turns(model, session, ids, mask, [1] * 12 + [3])
            assert all(layer.begun is None for cached in session.cache.governed for layer in cached.by_lane)
    plain = found.pop("without")
    assert all(torch.equal(one, found["overlapped"]) for one in found.values())
    torch.testing.assert_close(found["overlapped"], plain, rtol=1e-4, atol=1e-4)


def test_the_static_set_is_attended_to_while_the_search_runs(monkeypatch):
    """Each search waits for the static set's attention, which would never come in the serial order."""
    events, attended = [], threading.Event()

    class Waiting(plugins.Searching):
        def select(self, layer, queries, budget):
            assert attended.wait(20), "the static set's attention waits for the search"
            attended.clear()
            events.append(("search", threading.current_thread() is threading.main_thread()))
            return super().select(layer, queries, budget)

    def noted(layer, queries):
        found = attend.attend_static(layer, queries)
        events.append(("static", threading.current_thread() is threading.main_thread()))
        attended.set()
        return found

    monkeypatch.setattr("kvbench.engine.governor.attend_static", noted)
    with kvbench.attach(tiny_model(), policy=Waiting(), budget=20) as session:
        turns(session.model, session, tokens(1, 75), None, [1] * 3)
    assert events == [("static", True), ("search", False)] * 9


def test_faults_of_a_selection_under_way_are_named():
    class Failing(plugins.Searching):
        def select(self, layer, queries, budget):
            raise ValueError("no index")

    class Wrong(plugins.Searching):
        def begin_select(self, layer, queries, budget):
            return self.select(layer, queries, budget)

    class Broken(plugins.Searching):
        def begin_select(self, layer, queries, budget):
            raise ValueError("no thread")

    ids, model = tokens(1, 75), tiny_model()
    for policy, told in (
        (Failing, "'searching' .* failed in select at layer 0: ValueError: no index"),
        (Broken, "'searching' .* failed in begin_select at layer 0: ValueError: no thread"),
        (Wrong, "begin_select gave a Selection; expected something with a method `result`"),
    ):
        with kvbench.attach(model, policy=policy(), budget=20) as session, pytest.raises(KVBenchError, match=told):
            turns(model, session, ids, None, [1])

    class Half(kvbench.KVCachePolicy):
        name, summary, takes_budget = "half", "Begins and never selects.", False

        def begin_select(self, layer, queries, budget):
            return None

    with pytest.raises(KVBenchError, match="defines begin_select without select"):
        kvbench.attach(model, policy=Half())


def test_an_overlapping_policy_runs_from_the_command_line(python, model, tmp_path):
    done, _ = run(python, model, tmp_path, "--policy", "searching,top_in_blocks", "--tokens", 100)
    ours, other = done["searching"]["metrics"], done["top_in_blocks"]["metrics"]
    assert ours["recall_at_k"] == other["recall_at_k"] == 1.0
    assert ours["bytes"]["offloaded"] > 0 and other["bytes"]["offloaded"] == 0
    checks = {
        check["name"]: check["status"] for report in done["searching"]["conformance"] for check in report["checks"]
    }
    assert checks["two runs are equal"] == checks["exact when covering"] == "passed"


# -- one policy's choice in another's storage ------------------------------------------------------------------------


def test_a_selection_meets_what_the_other_policy_holds():
    """quest+halves is quest over keys and values that went through float16."""
    model, ids = tiny_model(), tokens(1, 75)
    quest = registry().find("policy", "quest")

    class Rounded(quest):
        def prefill(self, layer, queries, keys, values):
            super().prefill(layer, queries, keys, values)
            for part in (layer.store.aside.keys, layer.store.aside.values):
                part.copy_(part.half())

        def insert(self, layer, keys, values):
            before = layer.store.aside.length
            super().insert(layer, keys, values)
            for part in (layer.store.aside.keys[:, :, before:], layer.store.aside.values[:, :, before:]):
                part.copy_(part.half())

    both = compose(quest, plugins.Halves)
    found = {}
    for name, made in (("rounded", Rounded(quest.Options(page_size=4))), ("both", both(both.Options(page_size=4)))):
        with kvbench.attach(model, policy=made, budget=24) as session:
            found[name] = turns(model, session, ids, None, [1] * 15), session.cache.bytes()
    torch.testing.assert_close(found["both"][0], found["rounded"][0], rtol=1e-5, atol=1e-5)
    assert found["both"][1]["resident"] < 0.62 * found["rounded"][1]["resident"]


@pytest.mark.parametrize("policy", ["quest", "retrieval", "infinigen", "oracle_topk"])
def test_kivi_holds_what_other_policies_select_and_everything_selected_is_kivi_itself(policy):
    model, ids = tiny_model(), tokens(1, 75)
    kivi = {"bits": 2, "group": 8, "residual": 8}
    options = {**small_options(registry().find("policy", policy))}
    with kvbench.attach(model, policy=policy, budget=24, options=options) as session:
        generate_batch(session, [ids[0].tolist()], max_new_tokens=[20])
        plain = session.cache.bytes()
    given = {policy: options, **{f"kivi.{key}": value for key, value in kivi.items()}}
    with kvbench.attach(model, policy=f"{policy}+kivi", budget=24, options=given) as session:
        (made,) = generate_batch(session, [ids[0].tolist()], max_new_tokens=[20])
        stores = session.cache.stores()
        assert {type(store.aside).__name__ for store in stores} == {"KIVIBuffer"}
        tier = "offloaded" if plain["offloaded"] else "resident"
        assert made.bytes[tier] < 0.7 * plain[tier]
        assert made.bytes["index"] == plain["index"] or policy == "retrieval"


def test_compositions_from_the_command_line(python, model, tmp_path):
    done, _ = run(
        python, model, tmp_path, "--policy", "quest+halves,quest", "--tokens", 100, "-o", "quest.page_size=8", "-o",
        "page_size=8", "-o", "halves.kind=bfloat16", "--probe-examples", 0,
    )  # fmt: skip
    ours, plain = done["quest+halves"], done["quest"]
    assert ours["config"]["policy_options"] == {"quest": {"page_size": 8}, "halves": {"kind": "bfloat16"}}
    assert ours["config"]["plugins"]["policy"]["distribution"] == "kvbench+kvbench-contract-plugins"
    assert ours["metrics"]["bytes"]["resident"] < 0.6 * plain["metrics"]["bytes"]["resident"]
    assert ours["metrics"]["bytes"]["index"] == plain["metrics"]["bytes"]["index"]
    assert ours["status"] == "complete"
    for policy, options, told in (
        ("full+kivi", [], "'full' neither selects nor evicts tokens that 'kivi' could hold"),
        ("quest+snapkv", [], "'snapkv' has no storage for other policies' tokens"),
        ("quest+kivi+kivi", [], "has 3 parts: one that selects and one that holds"),
        ("quest+nothing", [], "Unknown policy 'nothing'"),
        ("quest+kivi", ["-o", "kivi.bit=2"], "kivi.bits"),
    ):
        assert told in refused(python, model, tmp_path, "--policy", policy, "--tokens", 100, *options)


def test_an_option_of_both_parts_must_say_whose_it_is():
    both = compose(registry().find("policy", "quest"), plugins.HalvesOfPages)
    with pytest.raises(KVBenchError, match=r"is one of both quest and halves_of_pages: say quest.page_size or"):
        both.Options(page_size=4)
    made = both.Options(**{"quest.page_size": 4, "halves_of_pages.page_size": 2})
    assert (made.quest.page_size, made.halves_of_pages.page_size) == (4, 2)


def test_the_static_set_in_other_storage_from_the_command_line(python, model, tmp_path):
    done, _ = run(
        python, model, tmp_path, "--policy", "recent_halves,streaming_llm,snapkv+kivi,snapkv+halves,snapkv", "--tokens",
        200, "-o", "sinks=4", "-o", "residual=32",
    )  # fmt: skip
    held = {name: one["metrics"]["bytes"]["resident"] for name, one in done.items()}
    assert held["recent_halves"] < 0.65 * held["streaming_llm"]
    assert held["snapkv+halves"] < 0.65 * held["snapkv"]
    assert held["snapkv+kivi"] < 0.65 * held["snapkv"]
    assert {one["status"] for one in done.values()} == {"complete"}
    assert done["snapkv+kivi"]["metrics"]["density"] == done["snapkv"]["metrics"]["density"]


# -- compression while decoding --------------------------------------------------------------------------------------


def test_a_small_plugin_compresses_its_answers(python, model, tmp_path):
    """The budget exceeds the prompt, and the answer's tokens are compressed, too."""
    done, _ = run(
        python, model, tmp_path, "--policy", "longest_values,snapkv", "--tokens", 440,
        "--compress-every", 16, "-o", "window=8", "--budget", "uniform",
    )  # fmt: skip
    for name in ("longest_values", "snapkv"):
        ours = done[name]
        assert ours["config"]["budget"]["compress_every"] == 16
        assert ours["metrics"]["answer_bytes"]["peak"] >= ours["metrics"]["answer_bytes"]["mean"] > 0
        assert ours["metrics"].get("over_budget") is None
        (row,) = [json.loads(line) for line in (Path(ours["folder"]) / "examples.jsonl").read_text().splitlines()]
        held = row["held_tokens"]
        assert len(held) == row["generated_tokens"] - 1 > 64
        assert held[0] < 440 and max(held) == 440 + 16
        after = [now for before, now in pairwise(held) if now != before + 1]
        assert after == [441] * len(after) and len(after) >= 2
    assert done["full"]["config"]["budget"] is None
    for arguments, told in (
        (["--policy", "quest", "--compress-every", 16], "Policy 'quest' does not compress while decoding"),
        (["--policy", "snapkv", "--compress-every", 32], "--compress-every 32 is smaller than the window of 64 tokens"),
        (["--policy", "h2o", "--compress-every", 0], "--compress-every 0 is not a positive number of tokens"),
        (["--policy", "h2o", "--compress-every", -3], "--compress-every -3 is not a positive number of tokens"),
    ):
        assert told in refused(python, model, tmp_path, "--tokens", 100, *arguments)


def test_policies_by_layer_and_allocators_on_top_from_the_command_line(python, model, tmp_path):
    done, _ = run(
        python, model, tmp_path, "--policy", "longest_values@0-1~quest,quest+halves", "--tokens", 100, "--budget",
        "ada", "-o", "page_size=8",
    )  # fmt: skip
    ours = done["longest_values@0-1~quest"]
    assert ours["config"]["policy_options"] == {"longest_values": {}, "quest": {"page_size": 8}}
    assert ours["config"]["plugins"]["policy"]["distribution"] == "kvbench-contract-plugins+kvbench"
    assert {one["config"]["budget"]["allocator"] for name, one in done.items() if name != "full"} == {"ada"}
    assert {one["status"] for one in done.values()} == {"complete"}
    assert ours["metrics"].get("over_budget") is None
    assert ours["metrics"]["bytes"]["index"] < done["quest+halves"]["metrics"]["bytes"]["index"]
    assert "must say which layers" in refused(python, model, tmp_path, "--policy", "snapkv~quest", "--tokens", 100)


# -- a selection that names blocks -----------------------------------------------------------------------------------


def test_pages_are_attended_to_in_place_by_their_numbers(python, model, tmp_path):
    with kvbench.attach(shared_model(), policy=plugins.PagesByMean(), budget=24) as session:
        prompt = tokens(1, 61)[0].tolist()
        hooks, fixed = (generate_once(session, prompt, max_new_tokens=14, decoding=way) for way in ("eager", "fixed"))
    assert (hooks.mode, fixed.mode) == ("eager", "fixed")
    assert fixed.tokens == hooks.tokens
    done, _ = run(
        python,
        model,
        tmp_path,
        "--policy",
        "pages_by_mean",
        "--tokens",
        100,
        "--decoding",
        "fixed",
        "--no-baseline",
        "--probe-examples",
        0,
    )
    ours = done["pages_by_mean"]
    assert ours["metrics"]["mode"] == "fixed"
    assert {"selection", "budget", "exact when covering"} <= {
        check["name"] for report in ours["conformance"] for check in report["checks"] if check["status"] == "passed"
    }
