"""The conformance check passes what is right, and names every planted fault: in a policy, in a model, in a session."""

import errno
import json
from types import SimpleNamespace

import pytest
import torch
from language import save_model
from tiny import ARCHITECTURES, every_policy, of_each_kind, tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

import kvbench
from kvbench.contract.attend import attend
from kvbench.contract.attention import Attention
from kvbench.contract.errors import KVBenchError
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.selection import Selection
from kvbench.contract.storage import KVStore
from kvbench.engine.conformance import checks
from kvbench.engine.conformance.checks import Conformance
from kvbench.engine.fixed import FixedDecoder
from kvbench.engine.interface import attached
from kvbench.engine.spool import Spool
from kvbench.plugins import registry

pytestmark = pytest.mark.transformers

OPTIONS = {
    "minference": {"vertical": 4, "slash": 4, "first": 1, "nearest": 1},
    "kvzip": {"instruction": "", "continuation": ""}, "kivi": {"group": 8, "residual": 16}, "ivfpq": {"subspaces": 4},
    "vamana": {"degree": 8}, "robust_vamana": {"degree": 8},
    "cagra": {"degree": 8, "intermediate": 16},
}  # fmt: skip
NEVER_EXACT = {"kivi", "think", "int8", "fp8", "turboquant", "minference"}
TINY = tiny_model()


class Keeping(KVCachePolicy):
    """Sets all but sinks and window aside and selects the first of it that the budget has room for."""

    name, summary = "keeping", "A policy without a fault."
    query_window = 0

    def static_tokens(self, context):
        return 2, 4

    def prefill(self, layer, queries, keys, values):
        layer.store.set_aside(2, layer.tokens - 4, offload=False)

    def insert(self, layer, keys, values):
        layer.store.advance(1)

    def room(self, layer, budget):
        return budget.beside(layer.store.static_tokens, layer.store.aside_stop - layer.store.aside_start)

    def select(self, layer, queries, budget):
        first = layer.store.aside_start
        ids = torch.arange(first, first + self.room(layer, budget))
        return Selection(ids.expand(layer.rows, layer.heads, -1))


class OverBudget(Keeping):
    def room(self, layer, budget):
        return min(super().room(layer, budget) + 1, layer.store.aside_stop - layer.store.aside_start)


class Repeating(Keeping):
    def select(self, layer, queries, budget):
        ids = super().select(layer, queries, budget).ids.clone()
        if layer.ordinal == 1:
            ids[:, 3, 1] = ids[:, 3, 0]
        return Selection(ids)


class RepeatingStatic(KVCachePolicy):
    name, summary = "repeating_static", "Keeps a token twice."

    def prefill(self, layer, queries, keys, values):
        layer.store.keep(torch.tensor([0, 1, 1]))


class FromStaticSet(Keeping):
    def select(self, layer, queries, budget):
        return Selection(super().select(layer, queries, budget).ids - 1)


class BeyondContext(Keeping):
    def select(self, layer, queries, budget):
        return Selection(torch.full((layer.rows, layer.heads, 1), layer.tokens))


class Negative(Keeping):
    def select(self, layer, queries, budget):
        return Selection(torch.full((layer.rows, layer.heads, 1), -1))


def late(faulty):
    """A policy that becomes faulty at the fifth step."""

    class Late(faulty):
        def select(self, layer, queries, budget):
            now = faulty if layer.tokens - layer.prompt_tokens > 4 else Keeping
            return now.select(self, layer, queries, budget)

        def attend(self, layer, queries, selection):
            if faulty is NotANumber and layer.tokens - layer.prompt_tokens > 4:
                return faulty.attend(self, layer, queries, selection)
            return attend(layer, queries, selection)

    return type(f"{faulty.__name__}Late", (Late,), {})


class OtherHeads(Keeping):
    def select(self, layer, queries, budget):
        return Selection(super().select(layer, queries, budget).ids[:, :5])


class NoSelection(Keeping):
    def select(self, layer, queries, budget):
        return super().select(layer, queries, budget).ids


class Tensors(Keeping):
    def attend(self, layer, queries, selection):
        return queries


class NotANumber(Keeping):
    def attend(self, layer, queries, selection):
        return Attention(torch.full_like(queries, torch.nan))


class RandomChoice(Keeping):
    def select(self, layer, queries, budget):
        if budget.covers_all:
            return Selection(everything=True)
        lots = torch.Generator()
        lots.seed()
        count = layer.store.aside_stop - layer.store.aside_start
        ids = torch.randperm(count, generator=lots)[: self.room(layer, budget)] + layer.store.aside_start
        return Selection(ids.expand(layer.rows, layer.heads, -1))


class RandomWeights(Keeping):
    def select(self, layer, queries, budget):
        ids = super().select(layer, queries, budget).ids
        if budget.covers_all:
            return Selection(ids)
        lots = torch.Generator()
        lots.seed()
        return Selection(ids, log_weights=torch.rand(ids.shape, generator=lots))


class DropsOne(Keeping):
    def room(self, layer, budget):
        return super().room(layer, budget) - (layer.ordinal == 2)


class Weighs(Keeping):
    def select(self, layer, queries, budget):
        ids = super().select(layer, queries, budget).ids
        return Selection(ids, log_weights=torch.full(ids.shape, 0.2 if layer.ordinal else 0.0))


class StateOnPolicy(Keeping):
    def prefill(self, layer, queries, keys, values):
        super().prefill(layer, queries, keys, values)
        self.kept = layer.tokens

    def insert(self, layer, keys, values):
        layer.store.advance(self.kept - layer.prompt_tokens + 1)


class Raises(Keeping):
    def select(self, layer, queries, budget):
        return 1 / 0


RepeatingLate, FromStaticSetLate, NotANumberLate = late(Repeating), late(FromStaticSet), late(NotANumber)
FAULTS = [
    (OverBudget, "budget", "it attends to 58 tokens on average over its heads; expected at most 57; first at layer 0"),
    (Repeating, "runs", r"at layer 1: head 3 of row 0 attends to token 2 2 times; expected once"),
    (RepeatingLate, "selection", "head 3 of row 0 attends to token 2 2 times; expected once; first at layer 1, step 5"),
    (RepeatingStatic, "runs", "failed in prefill at layer 0: ValueError: a token comes twice"),
    (FromStaticSet, "runs", "select gave token 1, of the static set or evicted; expected set-aside tokens, 2 to"),
    (FromStaticSetLate, "selection", "select gave token 1, of the static set .* 2 to 112; first at layer 0, step 5"),
    (BeyondContext, "runs", "select gave token 113, of a context of 113; expected set-aside tokens, 2 to"),
    (Negative, "runs", "select gave the id -1; expected 0 or more"),
    (OtherHeads, "runs", r"ids \[1, 5, 51\]; expected 1 rows, and 6 query or 2 key/value heads"),
    (NoSelection, "runs", "select gave a tensor .*; expected a kvbench.Selection"),
    (Tensors, "runs", "attend gave a tensor .*; expected a kvbench.Attention"),
    (NotANumber, "runs", "attend gave an output that is NaN or infinite; expected finite"),
    (NotANumberLate, "selection", "attend gave an output that is NaN or infinite; first at layer 0, step 5"),
    (RandomChoice, "two runs are equal", r"they attend to other tokens \(\d+ differ\), first at layer 0, step 1"),
    (RandomWeights, "two runs are equal", "to the same tokens and differ first in the attention of layer 0 at step 1"),
    (DropsOne, "exact when covering", "attends to 112 of 113 tokens; expected all .*; first at layer 2, step 1"),
    (Weighs, "exact when covering", "first at step 1, by .* of them, first in the attention of layer 1 at step 1"),
    (StateOnPolicy, "runs", "^Policy 'keeping' .* failed in insert at layer 0"),
    (Raises, "runs", "Policy 'keeping' .* failed in select at layer 0: ZeroDivisionError"),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "check", "message"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_a_planted_fault_is_named_with_policy_model_place_and_size(policy, check, message):
    report = Conformance(TINY, "tiny-llama").check_policy(policy())
    assert [found.name for found in report.checks if found.status == "failed"] == [check]
    with pytest.raises(KVBenchError, match=message) as raised:
        report.require()
    assert policy.name in str(raised.value) and "tiny-llama" in str(raised.value)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_a_policy_without_a_fault_passes_and_says_what_it_attended_to():
    report = Conformance(TINY).check_policy(Keeping())
    assert report.failure is None
    assert [(check.name, check.status) for check in report.checks] == [
        ("selection", "passed"), ("budget", "passed"), ("two runs are equal", "passed"),
        ("exact when covering", "passed"),
    ]  # fmt: skip
    assert report.checks[1].detail == "at most 57 tokens attended at a step, 57 allowed by a budget of 57"


@pytest.mark.parametrize("policy", of_each_kind(every_policy()))
def test_every_policy_conforms_and_says_why_where_it_is_never_exact(policy):
    made = registry().make("policy", policy, OPTIONS.get(policy, {}))
    report = Conformance(TINY).check_policy(made)
    assert report.failure is None
    exact = report.checks[-1]
    assert exact.status == ("skipped" if policy in NEVER_EXACT else "passed")
    assert bool(made.never_exact) == (policy in NEVER_EXACT)
    if policy in NEVER_EXACT:
        made.never_exact = ""
        checks._KNOWN.clear()
        assert "logits differ" in Conformance(TINY).check_policy(made).failure
        checks._KNOWN.clear()


@pytest.mark.parametrize(
    ("policy", "options"),
    [("oracle_topp", {"capped": False, "p": 0.9}), ("think", {"pruned": 0.0}),
     ("snapkv", {"window": 100}),
     ("flat", {"preset": "published"})],
)  # fmt: skip
def test_options_that_change_what_a_policy_promises_change_what_is_expected(policy, options):
    made = registry().make("policy", policy, options)
    report = Conformance(TINY).check_policy(made)
    assert report.failure is None
    assert (report.checks[-1].status == "skipped") == (policy == "oracle_topp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_is_right_passes(architecture, dtype):
    report = Conformance(tiny_model(architecture).to(dtype)).check_model()
    assert report.failure is None
    status = {check.name: check.status for check in report.checks}
    covering = "skipped" if architecture == "mistral" else "passed"  # sliding windows only
    chunks = ", prompt in two chunks"
    assert status == {
        "full": "passed", "full" + chunks: "passed", "covering selection and eviction": covering,
        "covering selection and eviction" + chunks: covering,
    }  # fmt: skip
    if dtype == torch.float32:
        assert report.checks[0].tolerance == 0.0 and report.checks[0].difference == 0.0


class Altering:
    """A cache whose keys and values a model changes after it has fetched them."""

    def __init__(self, cache, change):
        self.cache, self.change = cache, change

    def update(self, *args, **kwargs):
        return self.change(*self.cache.update(*args, **kwargs))


def altered(change, layer=1):
    class Altered(LlamaAttention):
        def forward(self, *args, past_key_values=None, **kwargs):
            return super().forward(*args, past_key_values=Altering(past_key_values, change), **kwargs)

    model = tiny_model()
    model.model.layers[layer].self_attn.__class__ = Altered
    return model


def nudged(when):
    model = tiny_model()
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, output: output * 1.01 if when(model) else output)
    return model


def test_a_model_that_looks_at_the_name_of_its_attention_finds_its_own():
    model = nudged(lambda model: model.config._attn_implementation != "sdpa")
    assert [check.status for check in Conformance(model).check_model().checks] == ["passed"] * 4
    with kvbench.attach(model, policy="full"):
        assert model.config._attn_implementation == "sdpa"


def test_a_model_that_differs_once_attached_fails_with_layer_and_size():
    failure = Conformance(nudged(lambda model: attached(model.config)), "tiny").check_model().failure
    assert "Model tiny failed the conformance check 'full'" in failure
    assert "policy 'full'" in failure
    assert "expected equality bit for bit" in failure
    assert "first in the output of layer 1, by" in failure


def test_a_covering_selection_that_is_not_exact_on_a_model_names_the_layer():
    model = tiny_model()
    right = KVStore.gather

    def wrong(self, ids):
        keys, values = right(self, ids)
        return keys, values * 1.01

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVStore, "gather", wrong)
        failure = Conformance(model, "tiny").check_model().failure
    assert "'covering selection and eviction'" in failure
    assert "first in the attention of layer 1 at step" in failure


def test_a_model_that_takes_no_padding_is_proven_without():
    model = tiny_model()

    def refuse(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and bool((mask == 0).any()):
            raise ValueError("no padding")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    checker = Conformance(model)
    assert checker.check_model().failure is None
    assert checker.check_policy(Keeping()).failure is None


def test_a_model_that_cannot_run_or_gives_nan_is_named():
    model = tiny_model()
    model.lm_head.weight.data[0, 0] = torch.nan
    assert "logits that are NaN or infinite in float32" in Conformance(model, "tiny").check_model().failure

    class Broken(nn.Module):
        def forward(self, *args, **kwargs):
            raise ValueError("no such thing")

    model = tiny_model()
    model.model.layers[0].mlp = Broken()
    assert "plain transformers cannot run it (ValueError: no such thing)" in Conformance(model).check_model().failure


def test_what_was_found_is_not_computed_again_and_random_numbers_stay_as_they_were():
    model = tiny_model()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, other = Conformance(model), Conformance(model)
    report, policy = first.check_model(), first.check_policy(Keeping())
    assert torch.equal(before, torch.random.get_rng_state())
    assert other.check_model() == report
    assert other.check_policy(Keeping()) == policy
    assert other.check_policy(OverBudget()).failure
    model.to(torch.bfloat16)
    assert Conformance(model).check_model() != report


def test_steps_of_fixed_shapes_are_held_to_steps_hook_by_hook(monkeypatch):
    status = {}
    for policy in ("full", "quest", "streaming_llm", "flat", "squeezed_attention"):
        checker = Conformance(TINY, "tiny", fixed=True)
        report = checker.check_policy(registry().make("policy", policy))
        assert report.failure is None
        status[policy] = {check.name: check.status for check in report.checks}["fixed steps"]
    assert status["full"] == "passed"
    assert "passed" in {status["quest"], status["streaming_llm"], status["flat"]}
    assert [r.policy for r in checker.check(registry().make("policy", "full"))] == [None, "full"]
    checks._KNOWN.clear()
    right = FixedDecoder.step

    def wrong(self):
        right(self)
        self.logits[0, 5] += 0.01

    monkeypatch.setattr(FixedDecoder, "step", wrong)
    failure = Conformance(TINY, "tiny", fixed=True).check_policy(registry().make("policy", "full")).failure
    assert "'fixed steps' on tiny: their logits are" in failure
    checks._KNOWN.clear()


# -- keys and values that change between the cache and the attention -------------------------------------------------


def tiled(keys, values):
    """As JetMoE's experts do: every head a second time."""
    return keys.repeat(1, 3, 1, 1), values.repeat(1, 3, 1, 1)


CHANGES = {
    "scaled keys": lambda keys, values: (keys * 1.01, values),
    "scaled values": lambda keys, values: (keys, values * 1.01),
    "tiled heads": tiled,
}


@pytest.mark.parametrize("name", CHANGES)
def test_keys_and_values_that_a_model_makes_of_its_caches_are_governed_exactly(name):
    model, ids = altered(CHANGES[name]), torch.randint(3, 97, (2, 16))
    if name == "tiled heads":
        model.model.layers[1].self_attn.num_key_value_groups = 1
    plain = steps(model, ids)
    assert float((plain - steps(tiny_model(), ids)).abs().max()) > 1e-2
    with kvbench.attach(model, policy="full"):
        assert torch.equal(steps(model, ids), plain)
    with kvbench.attach(model, policy="full", probes=["recovery"]):
        assert torch.equal(steps(model, ids), plain)
    for policy in ("streaming_llm", "quest", "snapkv"):
        with kvbench.attach(model, policy=policy, budget=1.0):
            torch.testing.assert_close(steps(model, ids), plain, rtol=1e-4, atol=1e-4)
    assert [check.status for check in Conformance(model).check_model().checks] == ["passed"] * 4


def longer(keys, values):
    """As a rotation of cached keys by frequencies that change with the length of the context."""
    return keys * (1.5 if keys.shape[2] > 30 else 1.01), values


def at_a_length(limit):
    """A model that makes other keys of its cache from a position on, as the arguments of its attention tell it."""

    class Changing(LlamaAttention):
        def forward(self, hidden_states, position_embeddings, *args, past_key_values=None, **kwargs):
            late = bool((position_embeddings[0][..., -1] < limit).any())
            change = Altering(past_key_values, lambda keys, values: (keys * (1.5 if late else 1.01), values))
            return super().forward(hidden_states, position_embeddings, *args, past_key_values=change, **kwargs)

    model = tiny_model()
    model.model.layers[1].self_attn.__class__ = Changing
    return model


def test_keys_that_a_model_makes_otherwise_in_a_longer_context_are_refused():
    model, ids = altered(longer), torch.randint(3, 97, (2, 60))
    for policy, probes in (("streaming_llm", ()), ("full", ("recovery",))):
        budget = None if policy == "full" else 0.5
        with kvbench.attach(model, policy=policy, budget=budget, probes=probes), torch.no_grad():
            model(ids[:, :20], use_cache=True)
            with pytest.raises(
                KVBenchError, match=r"makes other keys .* of layer 1 holds at this length .*\(60 tokens"
            ):
                model(ids, use_cache=True)
    with kvbench.attach(model, policy="full"), torch.no_grad():
        model(ids, use_cache=True)


def test_keys_that_change_while_decoding_are_refused_at_that_step():
    cosines = tiny_model().model.rotary_emb(torch.zeros(1), torch.arange(400)[None])[0][0, :, -1]
    model, ids = at_a_length(float(cosines[200:220].mean())), torch.randint(3, 97, (1, 230))
    with kvbench.attach(model, policy="snapkv", budget=0.5), torch.no_grad():
        past = model(ids[:, :150], use_cache=True).past_key_values
        with pytest.raises(KVBenchError, match="makes other keys or values of what the cache of layer 1 holds at this"):
            for place in range(150, 230):
                past = model(ids[:, place : place + 1], past_key_values=past, use_cache=True).past_key_values
    assert place in range(195, 225)


def steps(model, ids):
    """The logits of a prompt and three steps."""
    with torch.no_grad():
        output, logits = model(ids[:, :13]), []
        for place in range(13, 16):
            logits.append(output.logits)
            output = model(ids[:, place : place + 1], past_key_values=output.past_key_values)
    return torch.cat([*logits, output.logits], dim=1)


@pytest.mark.parametrize("allocator", ["uniform", "ada"])
@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
def test_heads_of_such_keys_that_keep_different_tokens_keep_their_own(part, allocator):
    """Scaling after the cache is scaling the projection before it."""
    late, early = altered(CHANGES["scaled keys" if part == "k_proj" else "scaled values"]), tiny_model()
    getattr(early.model.layers[1].self_attn, part).weight.data *= 1.01
    ids, found = torch.randint(3, 97, (2, 16)), []
    budget = kvbench.Budget(tokens=8, allocator=allocator)
    for model in (late, early):
        with kvbench.attach(model, policy="snapkv", budget=budget, options={"window": 2}):
            found.append(steps(model, ids))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_model_that_attends_to_fewer_tokens_than_its_cache_gave_is_refused_before_it_attends():
    model = altered(lambda keys, values: (keys[:, :, -12:], values[:, :, -12:]))
    seen = []
    with kvbench.attach(model, policy="streaming_llm", budget=8):
        model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: seen.append(1))
        message = r"LlamaForCausalLM attends in layer 1 to other keys than its cache gave \(\[2, 2, 16, 8\].* 12, 8\]"
        with pytest.raises(KVBenchError, match=message):
            model(torch.randint(3, 97, (2, 16)))
    assert not seen


@pytest.mark.parametrize("factor", [1.01, 2.0])
def test_keys_that_are_made_of_more_than_their_token_are_refused(factor):
    model = altered(lambda keys, values: (keys * (1.0 if keys.shape[2] > 1 else factor), values))
    message = (
        "LlamaForCausalLM makes keys and values of what the cache of layer 1 holds of a token and of more than that"
    )
    with pytest.raises(KVBenchError, match=f"{message}, so policy 'streaming_llm' cannot govern it"):
        kvbench.attach(model, policy="streaming_llm", budget=8)
    checks = Conformance(model).check_model().checks
    assert [check.status for check in checks] == ["passed", "passed", "skipped", "skipped"]
    assert f"only policy 'full' runs on it: {message}" in checks[2].detail


def test_keys_of_another_layer_are_refused_and_copies_of_ones_own_are_not():
    model, held = altered(lambda keys, values: (held.setdefault(len(held), keys), values), layer=0), {}

    class Sharing(LlamaAttention):
        def forward(self, *args, past_key_values=None, **kwargs):
            shared = Altering(past_key_values, lambda keys, values: (held[len(held) - 1], values))
            return super().forward(*args, past_key_values=shared, **kwargs)

    model.model.layers[1].self_attn.__class__ = Sharing
    with pytest.raises(KVBenchError, match=r"attends to keys of the cache of layer 0 with other values than its own"):
        kvbench.attach(model, policy="streaming_llm", budget=8, prompt_tokens=20)
    copying = altered(lambda keys, values: (keys.clone(), values.contiguous()))
    reports = Conformance(copying).check_model()
    assert [check.status for check in reports.checks] == ["passed"] * 4


# -- where it runs ---------------------------------------------------------------------------------------------------


def test_attach_checks_first_where_it_is_asked_to():
    model = tiny_model(seed=5)
    session = kvbench.attach(model, policy="streaming_llm", budget=20, check=True)
    assert [report.policy for report in session.conformance] == [None, "streaming_llm"]
    assert all(report.failure is None for report in session.conformance)
    assert [r.policy for r in kvbench.attach(model, check=True).conformance] == [None]
    assert kvbench.attach(model, policy="streaming_llm", budget=20).conformance == ()
    with pytest.raises(KVBenchError, match="Policy 'keeping' failed the conformance check 'budget' on Llama"):
        kvbench.attach(model, policy=OverBudget(), budget=20, check=True)
    with pytest.raises(KVBenchError, match=r"Model LlamaForCausalLM failed .*NaN or infinite"):
        model.lm_head.weight.data[0, 0] = torch.nan
        kvbench.attach(model.to(torch.bfloat16), policy="streaming_llm", budget=20, check=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny-llama"))


def test_the_command_prints_a_table_or_json(kvbench, model_folder):
    code, out, err = kvbench("check", "--model", model_folder, "--policy", "quest,kivi", "-o", "group=8")
    assert (code, err) == (0, "")
    for text in ("the model (", "full, prompt in two chunks", "quest (", "equal bit for bit", "never exact: keys and"):
        assert text in " ".join(out.split())
    assert "[" not in out
    code, out, _ = kvbench("check", "--model", model_folder, "--policy", "quest", "--json")
    document = json.loads(out)
    assert (code, document["schema"], document["dtype"]) == (0, 1, "float32")
    assert [(part["policy"], part["passed"]) for part in document["reports"]] == [(None, True), ("quest", True)]
    assert document["reports"][0]["checks"][0] == {
        "name": "full", "status": "passed", "detail": "equal bit for bit", "difference": 0.0, "tolerance": 0.0,
    }  # fmt: skip
    code, out, _ = kvbench("check", "--model", model_folder, "--json")
    assert len(json.loads(out)["reports"]) == 1


def test_the_command_ends_with_one_sentence_and_code_2_at_a_failure(kvbench, model_folder, monkeypatch):
    monkeypatch.setitem(registry().classes["policy"], "over", OverBudget)
    monkeypatch.setitem(registry().classes["policy"], "raises", Raises)
    code, out, err = kvbench("check", "--model", model_folder, "--policy", "over", "--policy", "streaming_llm")
    assert code == 2
    assert "failed" in out and "streaming_llm (" in out
    assert err.startswith("Error: Policy 'keeping' failed the conformance check 'budget' on") and err.count("\n") == 1
    code, out, err = kvbench("check", "--model", model_folder, "--policy", "over,raises", "--json")
    assert (code, [report["passed"] for report in json.loads(out)["reports"]]) == (2, [True, False, False])
    assert "2 of 3 failed" in err
    assert kvbench("check", "--model", model_folder, "--policy", "qest")[0] == 2
    code, _, err = kvbench("check", "--model", model_folder, "-o", "window=3")
    assert (code, "give --policy too" in err) == (2, True)


def test_a_run_holds_what_was_proven_and_a_failure_stops_it(kvbench, model_folder, monkeypatch, tmp_path):
    monkeypatch.setitem(registry().classes["policy"], "over", OverBudget)
    small = ("--model", model_folder, "--context-length", 512, "--examples", 1, "--output", tmp_path)
    code, out, _ = kvbench("run", *small, "--policy", "streaming_llm", "--ratio", 0.3, "--json")
    assert code == 0
    ours, full = json.loads(out)["runs"]
    assert [(report["policy"], report["passed"]) for report in ours["conformance"]] == [
        (None, True), ("streaming_llm", True),
    ]  # fmt: skip
    assert [report["policy"] for report in full["conformance"]] == [None]
    (folder,) = tmp_path.glob("streaming_llm-*")
    assert json.loads((folder / "run.json").read_text())["conformance"] == ours["conformance"]
    code, _, err = kvbench("run", *small, "--policy", "over", "--ratio", 0.3, "--no-baseline")
    assert code == 2
    assert "Policy 'keeping' failed the conformance check 'budget'" in err
    (folder,) = tmp_path.glob("over-*")
    stopped = json.loads((folder / "run.json").read_text())
    assert stopped["status"] == "failed"
    assert [report["passed"] for report in stopped["conformance"]] == [True, False]
    assert not (folder / "examples.jsonl").exists()


def test_a_full_disk_says_nothing_of_a_policy(monkeypatch):
    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = SimpleNamespace(seek=lambda _: None, write=full)
    monkeypatch.setattr("kvbench.engine.spool.tempfile.TemporaryFile", lambda **_: file)
    said = r"^The prompt that policies share .* cannot be written \(No space left on device\): free some space"
    with pytest.raises(KVBenchError, match=said):
        kvbench.attach(tiny_model(), policy="quest", budget=1.0, check=True)
    monkeypatch.setattr("kvbench.engine.spool.tempfile.TemporaryFile", lambda **_: full(file))
    with pytest.raises(KVBenchError, match=said):
        Spool()
