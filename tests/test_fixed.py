"""Steps of fixed shapes give what the hooks give, step by step: the same policy, written for a CUDA graph."""

import mmap

import pytest
import torch
from tiny import small_options, tiny_model, tokens

import kvbench
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.host import Pool, Slabs
from kvbench.contract.storage import KVStore, TokenBuffer
from kvbench.engine.generation import generate, generate_batch
from kvbench.kernels import support, using
from kvbench.plugins import registry
from kvbench.strategies.selecting.aside import best_of

pytestmark = pytest.mark.transformers

INDEXES = ("retrieval", "robust_vamana", "vamana", "cagra", "hnsw", "ivf", "ivfpq", "sq8")
SET_ASIDE = (
    "flat",
    "oracle_topk",
    "random",
    "pqcache",
    "retroinfer",
    "squeezed_attention",
    "shadowkv",
    "infinigen",
    "oracle_topp",
    "magicpig",
)
FIXED = (
    "full",
    "streaming_llm",
    "snapkv",
    "h2o",
    "tova",
    "keydiff",
    "knorm",
    "expected_attention",
    "quest",
    *SET_ASIDE,
)
OPTIONS = {
    "pqcache": {"subspaces": 4},  # with fewer of them keys have equal codes, and which of them are taken is open
    "retroinfer": {"cluster_size": 4, "estimated": 0.4},
    "shadowkv": {"rank": 9},
    "magicpig": {"bits": 3, "tables": 6},
    "squeezed_attention": {"clusters": 0.3},
}
STEPS = 14
"""More than the window of 8 and a page, a block or a cluster of 4 after it."""
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (40, 61, 61, 50)]


def attach(model, policy, budget=24, allocator="uniform"):
    found = registry().find("policy", policy)
    size = {"ratio": budget} if isinstance(budget, float) else {"tokens": budget}
    given = Budget(**size, allocator=allocator) if found.takes_budget else None
    return kvbench.attach(model, policy=policy, budget=given, options=small_options(found) | OPTIONS.get(policy, {}))


def logits(session, prompt, steps, decoding, batch=None):
    """What each step gives along one path of tokens."""
    seen = []
    original = session.model.lm_head.forward

    def note(hidden):
        out = original(hidden)
        seen.append(out[:, -1].detach().clone())
        return out

    session.model.lm_head.forward = note
    try:
        results = generate_batch(
            session, batch or [prompt], max_new_tokens=[steps] * len(batch or [prompt]), decoding=decoding
        )
    finally:
        session.model.lm_head.forward = original
    return results, seen


@pytest.mark.parametrize(
    ("policy", "allocator", "batch"),
    [
        *((policy, "uniform", "one") for policy in (*FIXED, "retrieval")),
        *((policy, "uniform", "unequal") for policy in (*FIXED, *INDEXES)),
        *((policy, "ada", "unequal") for policy in ("snapkv", "h2o", "streaming_llm", "quest", "ivf", *SET_ASIDE)),
    ],
)
@torch.inference_mode()
def test_fixed_steps_give_the_logits_of_the_hooks(policy, allocator, batch):
    model = tiny_model(pad_token_id=None)  # a token of zeros would make all scores equal
    batch = PROMPTS[:1] if batch == "one" else PROMPTS
    with attach(model, policy, allocator=allocator) as session:
        hooks, expected = logits(session, None, STEPS, "eager", batch)
        fixed, found = logits(session, None, STEPS, "fixed", batch)
    assert [one.tokens for one in fixed] == [one.tokens for one in hooks]
    assert {one.mode for one in fixed} == {"fixed"} and {one.mode for one in hooks} == {"eager"}
    assert len(found) == len(expected) == STEPS
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4, msg=lambda text, step=step: f"{step}: {text}")


@pytest.mark.parametrize(
    ("policy", "options", "dense_layers"),
    [
        ("infinigen", {"alpha": 1.5, "partial_weight_ratio": 0.5}, 0),  # of fewer tokens some would be equally good
        ("infinigen", {"alpha": 2.0}, 1),  # the first governed layer has one before it
        ("oracle_topp", {"p": 0.5}, 0),
        ("oracle_topp", {"p": 0.9, "capped": False}, 0),
    ],
)
@torch.inference_mode()
def test_numbers_of_tokens_that_depend_on_the_data_are_those_of_the_hooks(policy, options, dense_layers):
    model = tiny_model(pad_token_id=None)
    session = kvbench.attach(model, policy=policy, budget=24, options=options, dense_layers=dense_layers)
    with session:
        hooks, expected = logits(session, None, 12, "eager", PROMPTS)
        fixed, found = logits(session, None, 12, "fixed", PROMPTS)
    assert [one.tokens for one in fixed] == [one.tokens for one in hooks]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    if policy == "infinigen":  # what the steps chose is less than the budget
        assert 0 < fixed[0].reads["host"] < len(PROMPTS) * 23 * (3 - dense_layers) * 2 * 2 * 8 * 4


@pytest.mark.skipif(support.triton is None or not support.interpreting(), reason="needs Triton's interpreter")
@pytest.mark.parametrize(
    ("policy", "options"),
    [("keydiff", {}), ("retroinfer", {"hot": 30}), ("infinigen", {}), ("turboquant", {"full_layers": 0})],
)
@torch.inference_mode()
def test_steps_with_interpreted_kernels_give_the_logits_of_the_hooks(policy, options):
    """Tensors as steps hand them over: views, strides, types."""
    model, found = tiny_model(pad_token_id=None, num_hidden_layers=2), registry().find("policy", policy)
    options = small_options(found) | OPTIONS.get(policy, {}) | options
    with kvbench.attach(model, policy=policy, budget=24, options=options) as session:
        _, expected = logits(session, None, 3, "eager", PROMPTS[:1])
        with using("triton"):
            _, steps = logits(session, None, 3, "fixed", PROMPTS[:1])
    for ours, theirs in zip(steps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("policy", ["pqcache", "retroinfer", "infinigen"])
@torch.inference_mode()
def test_a_hot_set_changes_nothing_but_where_tokens_come_from(policy):
    model = tiny_model(pad_token_id=None)
    options = small_options(registry().find("policy", policy)) | OPTIONS.get(policy, {}) | {"hot": 30}
    with kvbench.attach(model, policy=policy, budget=24, options=options) as session:
        hooks, expected = logits(session, None, 20, "eager", PROMPTS)
        fixed, found = logits(session, None, 20, "fixed", PROMPTS)
    assert [one.tokens for one in fixed] == [one.tokens for one in hooks]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    rate = fixed[0].hot_hit_rate
    assert 0 < rate < 1 and hooks[0].hot_hit_rate is None
    if policy != "infinigen":  # 14 tokens of each row and layer are chosen, for both heads
        assert fixed[0].reads["host"] == pytest.approx(len(PROMPTS) * 14 * 3 * 2 * 2 * 8 * 4 * (1 - rate), abs=3)
    with (
        kvbench.attach(model, policy=policy, budget=24, options=options | {"hot": 3}) as session,
        pytest.raises(KVBenchError, match=r"hot set of 3 tokens has no room for the \d+ tokens"),
    ):
        generate(session, PROMPTS[0], max_new_tokens=8, decoding="fixed")


@pytest.mark.parametrize("policy", ["quest", "h2o", "streaming_llm", "snapkv", "flat", "ivf", "pqcache", "retroinfer"])
def test_a_ratio_gives_rows_of_unequal_length_their_own_budgets(policy):
    model = tiny_model(pad_token_id=None)
    with attach(model, policy, 0.4) as session:
        hooks = generate_batch(session, PROMPTS, max_new_tokens=[12] * 4, decoding="eager")
        fixed = generate_batch(session, PROMPTS, max_new_tokens=[12] * 4, decoding="fixed")
    assert [one.tokens for one in fixed] == [one.tokens for one in hooks]


@pytest.mark.parametrize("policy", [*FIXED, "ivf"])
def test_a_covering_budget_is_exact_in_fixed_steps(policy):
    model = tiny_model(pad_token_id=None)
    ids = torch.tensor([PROMPTS[1]])
    exact = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    with attach(model, policy, 1.0) as session:
        found = generate(session, PROMPTS[1], max_new_tokens=12, decoding="fixed")
    assert found.tokens == exact[0, len(PROMPTS[1]) :].tolist()


def test_memory_with_room_for_the_steps_is_taken_over(monkeypatch):
    """As pinned memory has it on a GPU."""
    set_aside, rooms = KVStore.set_aside, []

    def with_room(self, *arguments, **options):
        set_aside(self, *arguments, **options)
        longer = [torch.nn.functional.pad(part, (0, 0, 0, 40)) for part in (self.aside_keys, self.aside_values)]
        rooms.append(longer[0])
        self._aside = TokenBuffer(*longer, length=self.aside_stop - self.aside_start)

    model = tiny_model(pad_token_id=None)
    with attach(model, "flat") as session:
        expected = generate(session, PROMPTS[1], max_new_tokens=20, decoding="eager")
        monkeypatch.setattr(KVStore, "set_aside", with_room)
        found = generate(session, PROMPTS[1], max_new_tokens=20, decoding="fixed")
    assert found.tokens == expected.tokens
    assert all(bool(room[:, :, 51 : 51 + 19].any(-1).all()) for room in rooms)  # the steps wrote to it


def test_the_best_of_long_rows_are_those_of_short_ones(monkeypatch):
    found, counts = torch.randn(2, 3, 200), torch.tensor([[0, 4, 7], [2, 30, 9]], dtype=torch.int32)
    found[1, 1, 20:] = -torch.inf
    expected = best_of(found, counts, 30)
    monkeypatch.setattr("kvbench.strategies.selecting.aside.IN_REGISTERS", 100)
    assert best_of(found, counts, 30).sort().values.tolist() == expected.sort().values.tolist()
    assert (expected >= 0).sum(-1).tolist() == [[0, 4, 7], [2, 20, 9]]


def test_slabs_are_cut_in_pieces_that_overlap_nowhere():
    slabs = Slabs(1024, pin=False)
    pieces = [slabs.empty((3, 5), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32) * 3]
    pieces.append(slabs.empty((4, 500), torch.float32))
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    assert all(bool((piece == number).all()) for number, piece in enumerate(pieces))
    assert {piece.untyped_storage().nbytes() for piece in pieces} == {1024, 8000}


def test_a_piece_of_pinned_memory_is_handed_out_again_once_its_last_tensor_is_gone():
    made = []

    def pages(size):
        made.append(mmap.mmap(-1, size))
        return made[-1]

    pool = Pool(4096, pages)
    first, second = pool.take(), pool.take()
    first.fill_(1)
    second.fill_(2)
    part = first[10:20]
    address = first.data_ptr()
    del first
    third = pool.take()
    assert address not in (second.data_ptr(), third.data_ptr())
    assert (part == 1).all()
    del part
    again = pool.take()
    assert again.data_ptr() == address
    assert (second == 2).all()
    assert len(made) in (3, 4)  # the next is prepared ahead


def test_an_error_of_pinning_ahead_reaches_the_one_who_needs_it():
    def pages(size):
        if len(made):
            raise RuntimeError("no more")
        made.append(mmap.mmap(-1, size))
        return made[-1]

    made = []
    pool = Pool(4096, pages)
    kept = pool.take()
    with pytest.raises(RuntimeError, match="no more"):
        pool.take()
    assert kept.shape == (4096,)


def test_a_second_generation_begins_anew_and_the_model_is_restored():
    model = tiny_model(pad_token_id=None)
    with attach(model, "quest") as session:
        first = generate(session, PROMPTS[0], max_new_tokens=8, decoding="fixed")
        again = generate(session, PROMPTS[0], max_new_tokens=8, decoding="eager")
    assert first.tokens == again.tokens
    ids = torch.tensor([PROMPTS[0]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)


def test_what_has_no_fixed_step_says_why():
    class Plain(kvbench.KVCachePolicy):
        name, summary = "plain", "Selects nothing."

        def select(self, layer, queries, budget):
            return kvbench.Selection()

    model = tiny_model(pad_token_id=None)
    with (
        kvbench.attach(model, policy=Plain(), budget=24) as session,
        pytest.raises(KVBenchError, match="'plain' cannot decode in fixed steps here: policy 'plain' has no"),
    ):
        generate(session, PROMPTS[0], max_new_tokens=8, decoding="fixed")
    with pytest.raises(KVBenchError, match="no full-attention"):
        attach(tiny_model("mistral"), "snapkv")
    with attach(model, "quest") as session, pytest.raises(KVBenchError, match=r"CUDA graph needs a GPU, and .* cpu"):
        generate(session, PROMPTS[0], max_new_tokens=8, decoding="graph")


def test_a_policy_that_chooses_otherwise_does_not_step_as_its_base_does():
    class Worst(registry().find("policy", "oracle_topk")):
        name = "worst"

        def choose(self, layer, queries, wanted):
            return super().choose(layer, -queries, wanted)

    model = tiny_model(pad_token_id=None)
    with (
        kvbench.attach(model, policy=Worst(), budget=Budget(tokens=24)) as session,
        pytest.raises(KVBenchError, match="policy 'worst' has no step of fixed shapes"),
    ):
        generate(session, PROMPTS[0], max_new_tokens=8, decoding="fixed")


def test_fixed_steps_state_what_they_hold_and_must_read():
    model = tiny_model(pad_token_id=None)
    for policy in FIXED:
        with attach(model, policy) as session:
            session.prompt_tokens = None
            ids = torch.tensor([PROMPTS[1]])
            with torch.inference_mode():
                model(ids)
                decoder = session.fixed(torch.tensor([5]), 8, graph=False)
        assert not isinstance(decoder, str)
        token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dimensions, bytes
        weights = sum(weight.nbytes for weight in model.parameters()) - model.model.embed_tokens.weight.nbytes
        reads = decoder.reads(len(PROMPTS[1]))
        held = decoder.bytes()
        assert reads["weights"] == weights
        if policy in SET_ASIDE:
            check_tiers(policy, held, reads, token)
            continue
        assert reads["host"] == 0
        if policy == "full":
            assert reads["device"] == 61 * token and held["resident"] == 69 * token
        elif policy == "quest":
            pages = 18  # for 61 tokens and 8 more
            assert held == {"resident": pages * 4 * token, "offloaded": 0, "index": pages * token}
            assert reads["device"] == pytest.approx(pages * token * 61 / 72 + 24 * token, abs=3)
        else:
            assert reads["device"] == 24 * token


def reads_of(policy, prompts):
    with attach(tiny_model(pad_token_id=None), policy) as session:
        found = generate_batch(session, prompts, max_new_tokens=[12] * len(prompts), decoding="fixed")[0].reads
    return {tier: found[tier] for tier in ("device", "host")}


@pytest.mark.parametrize("policy", [*FIXED, "retrieval", "ivf", "infllm", "kivi", "duo_attention", "think"])
def test_rows_of_unequal_length_read_what_each_of_them_would_alone(policy):
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (40, 160, 61, 50)]
    found, alone = reads_of(policy, prompts), [reads_of(policy, [prompt]) for prompt in prompts]
    token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dimensions, bytes
    if policy == "full":
        held = sum(len(prompt) + 5 for prompt in prompts) * token
        assert found == {"device": pytest.approx(held, abs=len(prompts) * token), "host": 0}
    # hash functions are shared by the rows; short rows alone have fewer centroids
    share = {"magicpig": 0.16, "pqcache": 0.25}.get(policy, 0.08)
    for tier, size in found.items():
        assert size == pytest.approx(sum(one[tier] for one in alone), rel=share, abs=4 * token), (tier, alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", [*FIXED, *INDEXES])
@pytest.mark.parametrize("batch", [PROMPTS[:1], PROMPTS], ids=["one", "unequal"])
def test_a_captured_step_gives_what_the_hooks_give(policy, batch):
    model = tiny_model(pad_token_id=None).cuda()
    with attach(model, policy) as session:
        hooks = generate_batch(session, batch, max_new_tokens=[20] * len(batch), decoding="eager")
        graph = generate_batch(session, batch, max_new_tokens=[20] * len(batch))
    assert [one.tokens for one in graph] == [one.tokens for one in hooks]
    assert {one.mode for one in graph} == {"partial" if policy in INDEXES else "graph"}


def check_tiers(policy, held, reads, token):
    """61 tokens and 8 more; a budget of 24, with 2 sinks and a window of 8, or 1 for the oracle."""
    if policy in ("oracle_topk", "oracle_topp"):  # no step was taken yet, so a full budget is assumed
        assert held == {"resident": 69 * token, "offloaded": 0, "index": 0}
        assert (reads["device"], reads["host"]) == (24 * token + 60 * token // 2, 0)
    elif policy == "random":
        assert held == {"resident": 69 * token, "offloaded": 0, "index": 0}
        assert (reads["device"], reads["host"]) == (24 * token, 0)
    elif policy == "flat":
        assert held == {"resident": 18 * token, "offloaded": 67 * token, "index": 0}
        assert (reads["device"], reads["host"]) == (10 * token, 14 * token + 51 * token // 2)
    elif policy == "pqcache":
        centroids = 3 * 2 * 51 * 8 * 4  # layers, heads, no more centroids than tokens, dimensions, bytes
        codes = 3 * 2 * 4 * 67
        assert held == {"resident": 18 * token, "offloaded": 67 * token, "index": codes + centroids}
        assert (reads["device"], reads["host"]) == (10 * token + codes * 51 // 67 + centroids, 14 * token)
    elif policy == "retroinfer":
        clusters, rows = 3 * 2 * 13, 8 * 4  # of 51 tokens in all layers and heads, and the bytes of a mean
        assert held["resident"] == 13 * token and held["offloaded"] == 67 * token  # 4 tokens leave at a time
        assert held["index"] == 3 * 2 * 15 * (2 * rows + 2 * 4) + 3 * 2 * 67 * 4
        assert reads["host"] == 14 * token
        assert reads["device"] == pytest.approx(10 * token + clusters * (rows + 4 + 0.4 * rows), abs=3)
    elif policy == "infinigen":
        partial, projection = 3 * 2 * 69 * 16 * 4, 3 * 2 * 8 * 16 * 4  # 2 dimensions in rows of 16
        assert held == {"resident": token, "offloaded": 69 * token, "index": partial + projection}
        assert reads["host"] == 23 * token
        assert reads["device"] == pytest.approx(token + (partial * 60 / 69 + projection) / 8, abs=3)
    elif policy == "magicpig":
        codes, rest = 3 * 2 * 6 * 67 * 2, 3 * (8 * 18 + 2 * 8) * 4  # 6 tables of 3 bits; hyperplanes and means
        assert held == {"resident": 18 * token, "offloaded": 67 * token, "index": codes + rest}
        assert reads["host"] == 14 * token
        assert reads["device"] == pytest.approx(10 * token + codes * 51 / 67 + 3 * 8 * 18 * 4, abs=3)
    elif policy == "shadowkv":
        # 13 chunks of 4, 1 of them exact, 9 static tokens and 8 more; the rank is 9, of two heads together
        low = 3 * (52 * 9 + 2 * 2 * 9 * 8 + 2 * 4 * 8 + 2 * 13) * 4
        assert held == {"resident": low + 17 * token, "offloaded": 52 * token // 2, "index": 3 * 2 * 13 * 8 * 4}
        assert reads["host"] == 15 * token // 2
        assert reads["device"] == 9 * token + held["index"] + 3 * (2 * 9 * 8 + 2 * 15 * 9) * 4
    elif policy == "squeezed_attention":
        clusters = 3 * 2 * 16  # of 53 tokens
        assert held["resident"] == 69 * token and held["offloaded"] == 0
        assert held["index"] == clusters * (8 * 4 + 2 * 4) + 3 * 2 * 69 * 4 + 3 * 6 * 16 * 2 * 4
        assert (reads["device"], reads["host"]) == (24 * token + clusters * (8 * 4 + 4), 0)
    else:
        raise AssertionError(policy)
