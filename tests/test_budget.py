"""Budgets share out exactly what was asked for, over layers and over heads."""

import functools
import gc
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DATA_DEPENDENT, FITTED, budgeted_policies, small_options, tiny_model, tokens

import kvbench
from kvbench.contract.budget import Budget, BudgetAllocator, BudgetRequest, LayerBudget, allocate, fit
from kvbench.contract.errors import KVBenchError
from kvbench.engine.survey import token_bytes
from kvbench.plugins import registry
from kvbench.strategies.budgets.ada import Ada
from kvbench.strategies.budgets.pyramid import Pyramid
from kvbench.strategies.budgets.squeeze import Squeeze
from kvbench.strategies.budgets.uniform import Uniform

POLICIES = registry().classes["policy"]
OPTIONS = {name: small_options(cls) for name, cls in POLICIES.items()}
ALIKE = ("vamana", "robust_vamana", "cagra", "ivf", "ivfpq", "hnsw")
"""Policies that differ from `flat` and `retrieval` in their index alone."""
HEAD_WISE = [
    name for name, cls in POLICIES.items()
    if cls.head_budgets and not cls.across_layers and name not in {*ALIKE, *FITTED}
]  # fmt: skip


@st.composite
def requests(draw):
    minimum = draw(st.integers(1, 700))
    tokens = minimum + draw(st.integers(0, 5000))
    context = tokens + draw(st.integers(0, 20000))
    return BudgetRequest(draw(st.integers(1, 80)), tokens, context, minimum, minimum)


@pytest.mark.parametrize(
    "allocator",
    [Uniform(), Pyramid(), Pyramid(Pyramid.Options(beta=2)), Pyramid(Pyramid.Options(variant="code"))],
)
@settings(deadline=None)
@given(request_=requests())
def test_every_allocator_sums_to_the_total_and_keeps_the_bounds(allocator, request_):
    shares = [share.tokens for share in allocate(allocator, request_)]
    assert sum(shares) == request_.total
    assert all(request_.minimum <= share <= request_.context for share in shares)
    assert shares == sorted(shares, reverse=True)


def test_pyramid_follows_the_published_slope_where_nothing_is_clipped():
    request = BudgetRequest(layers=32, tokens=128, context=10_000, minimum=8, window=8)
    shares = [share.tokens for share in allocate(Pyramid(), request)]
    least, most = 120 / 20, 2 * 120 - 120 / 20
    expected = [8 + most - (most - least) * layer / 31 for layer in range(32)]
    assert all(abs(share - wish) <= 1 for share, wish in zip(shares, expected, strict=True))


def published_code(layers, capacity, window, length, beta=20):
    """Tokens beside the window of each layer, as PyramidKV's published code has them, in its integers."""
    least = (capacity - window) // beta
    most = (capacity - window) * 2 - least
    if most >= length - window:
        most = length - window
        least = (capacity - window) * 2 - most
    steps = (most - least) // (layers - 1)
    if length < (capacity - window) * 2:
        return [capacity - window] * layers
    return [most - layer * steps for layer in range(layers)]


@pytest.mark.parametrize("length", [150, 300, 10_000])
def test_pyramid_follows_the_published_code_up_to_what_its_integers_overspend(length):
    capacity, window, layers = 128, 8, 32
    request = BudgetRequest(layers, capacity, length, window, window)
    shares = [share.tokens for share in allocate(Pyramid(Pyramid.Options(variant="code")), request)]
    expected = [window + wish for wish in published_code(layers, capacity, window, length)]
    over = (sum(expected) - request.total) / layers
    assert 0 <= over <= layers / 2
    assert all(abs(share - wish + over) <= 1 for share, wish in zip(shares, expected, strict=True))


@settings(deadline=None)
@given(request_=requests(), data=st.data())
def test_fit_keeps_the_order_of_the_wishes(request_, data):
    wishes = data.draw(st.lists(st.floats(-1e4, 1e5), min_size=request_.layers, max_size=request_.layers))
    shares = fit(wishes, total=request_.total, low=request_.minimum, high=request_.context)
    assert sum(shares) == request_.total
    assert all(request_.minimum <= share <= request_.context for share in shares)
    ranked = [share for _, share in sorted(zip(wishes, shares, strict=True), key=lambda pair: pair[0])]
    assert all(after >= before - 1 for before, after in pairwise(ranked))


def test_an_allocator_that_breaks_its_promise_is_named():
    class Greedy(BudgetAllocator):
        name, summary = "greedy", "Gives too much."

        def allocate(self, request):
            return [request.tokens + 1] * request.layers

    with pytest.raises(KVBenchError, match="'greedy' shared out 303 tokens over 3 layers; expected 300"):
        allocate(Greedy(), BudgetRequest(3, 100, 1000, 8, 8))


def test_sizes():
    assert Budget(ratio=0.1).size(2048, 100) == 205
    assert Budget(tokens=77).size(2048, 100) == 77
    assert Budget(bytes=7799).size(2048, 100) == 77
    assert Budget(bytes="64KiB").size(2048, 100) == 655
    with pytest.raises(KVBenchError, match="larger than the context of 50"):
        Budget(tokens=77).size(50, 100)
    with pytest.raises(KVBenchError, match=r"7799 bytes \(77 tokens of 100 bytes\) is larger than the context of 50"):
        Budget(bytes=7799).size(50, 100)
    with pytest.raises(KVBenchError, match="does not hold a token: ask for at least 100 bytes"):
        Budget(bytes=99).size(50, 100)
    for sizes in ({"tokens": 77, "ratio": 0.1}, {"tokens": 77, "bytes": 7}, {}):
        with pytest.raises(ValueError, match="exactly one size"):
            Budget(**sizes)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_token_s_bytes_are_those_that_the_cache_holds_for_it(architecture):
    model = tiny_model(architecture)
    with kvbench.attach(model, policy="snapkv", budget=40, options=OPTIONS["snapkv"]) as session, torch.no_grad():
        model(tokens(1, 90))
        assert sum(store.resident_bytes for store in session.cache.stores()) == 40 * token_bytes(model)
    with (
        kvbench.attach(
            model, policy="snapkv", budget=Budget(bytes=41 * token_bytes(model) - 1), options=OPTIONS["snapkv"]
        ) as session,
        torch.no_grad(),
    ):
        model(tokens(1, 90))
        assert [layer.by_lane[0].budget.tokens for layer in session.cache.governed] == [40] * len(
            session.cache.governed
        )


# -- heads -------------------------------------------------------------------------------------------------------------


def test_per_head_counts_cut_a_ranking():
    scores = torch.tensor([[[5.0, 1, 4, 2], [1, 2, 3, 4], [9, 8, 7, 6], [1, 3, 2, 0]]])  # 4 query heads, 2 groups
    budget = LayerBudget(4, heads=torch.tensor([[3, 5]]))
    assert budget.top(scores, 2).tolist() == [[[0, -1, -1], [3, -1, -1], [0, 1, 2], [1, 2, 0]]]
    assert budget.top(scores, 1, unit=2).tolist() == [[[0, -1], [3, -1], [0, 1], [1, 2]]]
    assert LayerBudget(4).top(scores, 2).shape == (1, 4, 2)
    assert (budget.least, budget.most, budget.beside(2, 100)) == (3, 5, 3)


class Watch(kvbench.Probe):
    """Keeps what each head attended to at each step."""

    name, summary = "watch", "Watches."

    def __init__(self):
        super().__init__()
        self.prompts, self.steps = {}, []

    def query_window(self, number):
        return None

    def prefill(self, layer, queries, keys, values):
        self.prompts[layer.ordinal] = layer.prompt_queries.clone(), keys.clone(), layer
        return (yield)

    def select(self, layer, queries, budget):
        selection = yield
        static = layer.store.static_ids
        counts = torch.full((layer.rows, layer.kv_heads), static.shape[-1])
        if static.dim() == 3:
            counts = (static >= 0).sum(-1)
        counts = counts.repeat_interleave(layer.heads // layer.kv_heads, dim=1)
        if selection.everything and selection.heads is None:
            counts = counts + layer.store.aside_stop - layer.store.aside_start
        elif selection.ids is not None:
            chosen = (selection.ids >= 0).sum(-1)
            counts = counts + chosen.repeat_interleave(layer.heads // chosen.shape[1], dim=1)
        self.steps.append((layer, counts, layer.tokens - layer.prompt_tokens))
        return selection


def run(policy, budget, ids, steps=4, model=None, mask=None):
    model, probe = model or tiny_model(), Watch()
    mask = torch.ones_like(ids) if mask is None else mask
    with (
        kvbench.attach(model, policy=policy, budget=budget, options=OPTIONS.get(policy), probes=[probe]) as session,
        torch.no_grad(),
    ):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=steps + 1, do_sample=False)
    return probe, session, out[:, ids.shape[1] :]


@pytest.mark.parametrize("policy", HEAD_WISE)
def test_every_head_attends_to_its_own_number_of_tokens(policy):
    budget = Budget(tokens=40, allocator="ada", options={"alpha": 0, "window": 8, "kernel": 1})
    probe, session, _ = run(policy, budget, tokens(2, 120))
    shares = torch.stack([layer.by_lane[0].budget.heads for layer in session.cache.governed])
    assert (shares.sum(-1) == 80).all()
    assert shares.min() < 40 < shares.max()
    page = {"quest": 4, "shadowkv": 8, "infllm": 8, "chunkkv": 4}.get(policy, 0)
    for layer, counts, generated in probe.steps:
        wanted = layer.budget.heads.repeat_interleave(3, dim=1) + (generated if POLICIES[policy].grows else 0)
        assert (counts <= wanted).all()
        assert policy in DATA_DEPENDENT or (counts >= wanted - page).all()


def test_ada_gives_each_head_what_its_formula_says():
    options = {"alpha": 0.2, "window": 8, "kernel": 3, "pooling": "max"}
    probe, _, _ = run("flat", Budget(tokens=40, allocator="ada", options=options), tokens(2, 120), steps=1)
    beside, static = 30, 10
    for queries, keys, layer in probe.prompts.values():
        for row in range(2):
            scores = []
            for group in range(2):
                votes = torch.zeros(3, 120, dtype=torch.float64)
                for head in range(3):
                    for place in range(112, 120):
                        query = queries[row, group * 3 + head, place].double()
                        logits = keys[row, group, : place + 1].double() @ query * layer.scaling
                        votes[head, : place + 1] += logits.softmax(-1)
                votes = votes[:, 2:112]  # neither sinks nor window
                pooled = [votes[:, max(i - 1, 0) : i + 2].max(-1).values.mean() for i in range(110)]
                scores += [(float(score), group) for score in pooled]
            best = sorted(scores, reverse=True)[: 2 * beside]
            for group in range(2):
                count = sum(owner == group for _, owner in best)
                wish = static + 0.8 * count + 0.2 * beside
                assert abs(int(layer.budget.heads[row, group]) - wish) <= 1.01


def test_ada_shares_a_pyramid_over_the_heads():
    budget = Budget(tokens=40, allocator="ada", options={"layers": "pyramid", "window": 8})
    _, session, _ = run("snapkv", budget, tokens(1, 120))
    layers = [layer.by_lane[0].budget for layer in session.cache.governed]
    assert layers[0].tokens > layers[1].tokens > layers[2].tokens
    assert sum(layer.tokens for layer in layers) == 120
    assert all(int(layer.heads.sum()) == 2 * layer.tokens for layer in layers)


def test_a_policy_that_cannot_honour_heads_is_refused_by_name():
    class Plain(kvbench.KVCachePolicy):
        name, summary = "plain", "Keeps everything."

    with pytest.raises(KVBenchError, match="'ada' gives each head its own number of tokens, which policy 'plain'"):
        kvbench.attach(tiny_model(), policy=Plain(), budget=Budget(tokens=40, allocator="ada"))


@pytest.mark.parametrize("wrong", [[[40, 41]], [[5, 75]], [[40, 40], [40, 40]], [[0, 80]]])
def test_an_allocator_that_breaks_its_promise_to_the_heads_is_named(wrong, monkeypatch):
    monkeypatch.setattr(Ada, "share_heads", lambda self, prompt, request, tokens: torch.tensor(wrong))
    with pytest.raises(
        KVBenchError, match=r"'ada' shared out .* over the heads of layer 0; expected 2 heads of 8 to 120"
    ):
        run("snapkv", Budget(tokens=40, allocator="ada"), tokens(1, 120))


# -- the whole prompt --------------------------------------------------------------------------------------------------


@pytest.mark.transformers
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("chunk", [None, 50])
def test_squeeze_cuts_the_layers_that_change_the_hidden_states_least(architecture, chunk):
    model, ids = tiny_model(architecture, num_hidden_layers=3 if architecture == "gemma3" else 5), tokens(1, 120)
    similarity = []
    layers = model.model.layers
    governed = [1, 2] if architecture == "gemma3" else range(5)
    for number in governed:  # the stream after attention, from what the layer's parts say themselves
        seen = {}
        layer = layers[number]
        norm = layer.post_attention_layernorm
        handles = [
            layer.register_forward_pre_hook(
                lambda m, args, kwargs, seen=seen: seen.update(before=args[0]), with_kwargs=True
            ),
        ]
        if architecture == "gemma3":
            handles.append(norm.register_forward_hook(lambda m, args, out, seen=seen: seen.update(added=out)))
        else:
            handles.append(norm.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(after=args[0])))
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        before = seen["before"].double()
        after = seen["after"].double() if "after" in seen else before + seen["added"].double()
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        similarity.append(float(cosine.mean()))
    with kvbench.attach(
        model,
        policy="snapkv",
        options=OPTIONS["snapkv"],
        budget=Budget(tokens=40, allocator="squeeze"),
        prompt_tokens=120,
    ) as session:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, prefill_chunk_size=chunk
        )
    shares = [layer.by_lane[0].budget.tokens for layer in session.cache.governed]
    assert sum(shares) == 40 * len(shares)
    order = np.argsort(similarity)
    assert abs(shares[order[-1]] - (8 + 0.3 * 32)) <= 1
    assert shares[order[0]] == max(shares) > 40
    assert all(
        layer.store.static_tokens == share + 1
        for layer, share in zip([cached.by_lane[0] for cached in session.cache.governed], shares, strict=True)
    )


def test_squeeze_s_groups_share_as_published():
    measured = [0.5, 0.52, 0.7, 0.71, 0.95, 0.96, 0.97]
    request = BudgetRequest(7, 100, 10_000, 10, 10, measured=measured)
    shares = [share.tokens for share in allocate(Squeeze(), request)]
    rest = 10 + (7 * 90 - 3 * 0.3 * 90) / 4
    assert shares[4:] == [37, 37, 37]
    assert all(abs(share - rest) <= 1 for share in shares[:4])
    alike = BudgetRequest(7, 100, 10_000, 10, 10, measured=[0.9] * 7)
    assert [share.tokens for share in allocate(Squeeze(), alike)] == [100] * 7


@pytest.mark.parametrize("allocator", ["ada", "squeeze"])
@pytest.mark.parametrize("policy", ["snapkv", "quest"])
def test_a_padded_batch_gives_the_tokens_of_its_rows_alone(policy, allocator):
    lengths = (70, 110, 90)
    ids, mask = torch.zeros(3, 110, dtype=torch.long), torch.zeros(3, 110, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 110 - length :], mask[row, 110 - length :] = tokens(1, length, row)[0], 1
    budget = Budget(tokens=30, allocator=allocator)
    together = run(policy, budget, ids, mask=mask)[2]
    alone = [run(policy, budget, ids[row : row + 1, mask[row] == 1])[2] for row in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_a_third_party_s_allocator_can_look_at_the_prompt():
    class ByNorm(BudgetAllocator):
        name, summary = "by_norm", "More for layers whose keys are longer."
        query_window = 5

        def measure(self, prompt):
            assert prompt.queries.shape == (1, 6, 5, 8)
            assert prompt.keys.shape == (1, 2, 90, 8)
            return float(prompt.keys.norm(dim=-1).mean())

        def allocate(self, request):
            assert list(request.numbers) == [0, 1, 2]
            most = int(np.argmax(request.measured))
            shares = [request.tokens - 2] * request.layers
            shares[most] += 2 * request.layers
            return shares

    model = tiny_model()
    with kvbench.attach(model, policy="snapkv", budget=40, options=OPTIONS["snapkv"]) as session, torch.no_grad():
        session.allocator, session.defers = ByNorm(), True
        model(tokens(1, 90))
        norms = [float(layer.self_attn.k_proj.weight.norm()) for layer in model.model.layers]
        assert len(norms) == 3
        shares = [layer.by_lane[0].budget.tokens for layer in session.cache.governed]
    assert sorted(shares) == [38, 38, 44]


# -- profiles ----------------------------------------------------------------------------------------------------------


def profile(path, shares):
    rows = [
        {"layer": layer, "head": head, "budget_share": share}
        for layer, heads in enumerate(shares) for head, share in enumerate(heads)
    ]  # fmt: skip
    path.write_text(json.dumps({"schema": 1, "analysis": "sparsity", "rows": rows}))
    return path


def test_profile_shares_over_layers_and_heads_as_measured(tmp_path):
    file = profile(tmp_path / "sparsity.json", [[2, 2, 2, 1, 1, 1], [1] * 6, [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])
    budget = Budget(tokens=40, allocator="profile", options={"file": str(file), "floor": 0})
    _, session, _ = run("snapkv", budget, tokens(2, 120))
    layers = [layer.by_lane[0].budget for layer in session.cache.governed]
    assert [layer.tokens for layer in layers] == [56, 40, 24]  # 8 beside 32 · (1.5, 1, 0.5)
    assert layers[0].heads.tolist() == [[72, 40]] * 2
    assert layers[1].heads.tolist() == [[40, 40]] * 2
    only_layers = {"file": str(file), "floor": 0, "heads": False}
    _, session, _ = run("streaming_llm", Budget(tokens=40, allocator="profile", options=only_layers), tokens(1, 120))
    assert [layer.by_lane[0].budget.heads for layer in session.cache.governed] == [None] * 3
    options = registry().options("budget", "profile", {"file": str(file)})
    file.write_text(file.read_text().replace("0.5", "0.6"))
    with pytest.raises(KVBenchError, match="has changed since the run was planned"):
        registry().options("budget", "profile", options.model_dump())


def test_profile_without_a_usable_file_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(KVBenchError, match=r"--budget-option file=FILE.*kvbench analyze sparsity"):
        registry().make("budget", "profile")
    with pytest.raises(KVBenchError, match=r"cannot be read.*kvbench analyze sparsity"):
        registry().make("budget", "profile", {"file": str(tmp_path / "none.json")})
    (tmp_path / "bad.json").write_text('{"rows": [{"layer": 0}]}')
    with pytest.raises(KVBenchError, match=r"is no sparsity profile.*kvbench analyze sparsity"):
        registry().make("budget", "profile", {"file": str(tmp_path / "bad.json")})
    partial = profile(tmp_path / "partial.json", [[1] * 6])
    with pytest.raises(KVBenchError, match="no share for layer 1 of the model"):
        run("snapkv", Budget(tokens=40, allocator="profile", options={"file": str(partial)}), tokens(1, 120))
    other = profile(tmp_path / "other.json", [[1] * 4] * 3)
    with pytest.raises(KVBenchError, match="shares of 4 heads in layer 0, and the model 6 query heads"):
        run("snapkv", Budget(tokens=40, allocator="profile", options={"file": str(other)}), tokens(1, 120))


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_every_allocator_s_budget_is_kept_in_total(data):
    length = data.draw(st.integers(60, 140))
    size = data.draw(st.integers(20, length))
    policy = data.draw(st.sampled_from(["snapkv", "quest", "flat"]))
    allocator = data.draw(st.sampled_from(["uniform", "pyramid", "ada", "squeeze"]))
    _, session, _ = run(policy, Budget(tokens=size, allocator=allocator), tokens(1, length, length), steps=2)
    budgets = [layer.by_lane[0].budget for layer in session.cache.governed]
    assert sum(budget.tokens for budget in budgets) == 3 * size
    for budget in budgets:
        assert budget.heads is None or int(budget.heads.sum()) == 2 * budget.tokens


NO_ARRAYS = [name for name in budgeted_policies() if name not in (*ALIKE, "retrieval", "sq8", "magicpig")]
"""Policies whose structures are tensors; those of the others are NumPy arrays, which the collector does not list."""


# -- memory -----------------------------------------------------------------------------------------------------------


def storages(tensors):
    """The storages of tensors: address and bytes."""
    return {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors}


@functools.cache
def wide_model():
    return tiny_model(hidden_size=384, head_dim=64)


@pytest.mark.parametrize("policy", NO_ARRAYS)
def test_what_a_policy_keeps_in_memory_is_what_it_reports(policy):
    model, ids, options = wide_model(), tokens(1, 600), OPTIONS[policy]
    known = storages([*model.parameters(), *model.buffers(), ids])
    gc.collect()
    gc.freeze()  # what is alive already is no object of the collector any more
    with kvbench.attach(model, policy=policy, budget=0.2, options=options) as session, torch.no_grad():
        model(ids, logits_to_keep=1)
        gc.collect()
        new = storages(part for part in gc.get_objects() if type(part) is torch.Tensor)
    tiers = session.cache.bytes()
    assert sum(tiers.values()) == pytest.approx(sum(new[place] for place in new.keys() - known.keys()), rel=0.05)
    if session.cache.stores()[0].aside_stop == 0:  # it evicts
        assert sum(tiers.values()) < 0.25 * 600 * token_bytes(model)
