"""A plugin that breaks the contract is told in one sentence: its name, the hook, and what was expected."""

import pytest
import torch
from tiny import tiny_model, tokens

import kvbench
from kvbench.contract.attention import Attention
from kvbench.contract.selection import Selection
from kvbench.engine.validation import check_hooks
from kvbench.plugins import registry

MODEL = tiny_model()
HEADS, GROUPS, LAYERS = 6, 2, 3


def policy(base=kvbench.KVCachePolicy, **hooks):
    return type("Mine", (base,), {"name": "mine", "summary": "M.", "__module__": "theirs", **hooks})


def probe(**hooks):
    return type("Looks", (kvbench.Probe,), {
        "name": "looks", "summary": "L.", "__module__": "theirs", "result": lambda self: {}, **hooks,
    })  # fmt: skip


def run(chosen, probes=(), steps=4, budget=20):
    with kvbench.attach(MODEL, policy=chosen, budget=budget, probes=probes):
        return MODEL.generate(
            tokens(2, 40), max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0
        )


def aside(self, layer, queries, keys, values):
    layer.store.set_aside(4, 30, offload=False)


def chooses(ids, **more):
    """A policy that sets tokens 4 to 29 aside and selects `ids`, repeated for all rows and heads."""

    def select(self, layer, queries, budget):
        made = ids if isinstance(ids, torch.Tensor) else torch.tensor(ids).expand(layer.rows, HEADS, -1)
        return Selection(made, **more)

    return policy(prefill=aside, select=select)()


def attends(answer):
    return policy(attend=lambda self, layer, queries, selection: answer(queries))()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (chooses([4, 29]), None),
        (chooses([4, -1], padded=True), None),
        (chooses([4, 4]), "attends to token 4 2 times; expected once"),
        (chooses([3]), "select gave token 3, of the static set or evicted; expected set-aside tokens, 4 to 29"),
        (chooses([30]), "token 30, of the static set or evicted"),
        (chooses([4000]), "token 4000, of a context of 41; expected set-aside tokens, 4 to 29"),
        (chooses([4, -1]), "the id -1; expected 0 or more"),
        (chooses([4, -2], padded=True), "the id -2; expected -1 or more"),
        (chooses(torch.zeros(2, 5, 1, dtype=torch.long)), "select gave ids [2, 5, 1]; expected 2 rows, and 6 query"),
        (chooses(torch.full((2, GROUPS, 1), 4)), None),
        (chooses(torch.full((1, HEADS, 1), 4)), "select gave ids [1, 6, 1]; expected 2 rows"),
        (chooses(torch.full((2, HEADS), 4)), "select gave a tensor [2, 6] of int64 as ids; expected a tensor [rows"),
        (chooses(torch.full((2, HEADS, 1), 4.0)), "a tensor [2, 6, 1] of float32 as ids"),
        (chooses(torch.full((2, HEADS, 1), 4, dtype=torch.int32)), "of int32 as ids"),
        (policy(select=lambda self, layer, queries, budget: [4])(), "select gave a list; expected a kvbench.Selection"),
        (policy(select=lambda self, layer, queries, budget: torch.ones(2, 3))(), "select gave a tensor [2, 3]"),
        (attends(lambda q: q), "attend gave a tensor [2, 6, 1, 8] of float32; expected a kvbench.Attention"),
        (attends(lambda q: (q, None)), "attend gave a tuple; expected a kvbench.Attention"),
        (attends(lambda q: Attention(q[:, :, 0])), "attend gave a tensor [2, 6, 8] of float32 as output"),
        (attends(lambda q: Attention(q[:, :2])), "as output; expected a tensor [2, 6, 1, 'd']"),
        (attends(lambda q: Attention(q * torch.nan)), "an output that is NaN or infinite"),
        (attends(lambda q: Attention(None)), "attend gave None as output"),
        (attends(Attention), None),
    ],
)  # fmt: skip
def test_what_a_hook_answers(chosen, message):
    if message is None:
        assert run(chosen).shape == (2, 44)
        return
    with pytest.raises(kvbench.KVBenchError) as raised:
        run(chosen)
    assert str(raised.value).startswith("Policy 'mine' (theirs) at layer 0: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_values_of_later_steps_are_looked_at_where_asked(monkeypatch):
    def select(self, layer, queries, budget):
        late = layer.tokens > layer.prompt_tokens + 1
        return Selection(torch.tensor([4, 4 if late else 5]).expand(layer.rows, HEADS, -1))

    late = policy(prefill=aside, select=select)
    run(late())
    monkeypatch.setenv("KVBENCH_CHECK", "1")
    with pytest.raises(kvbench.KVBenchError, match=r"Policy 'mine' \(theirs\) at layer 0: .* 2 times; expected once"):
        run(late())


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({"select": lambda self, layer, q, budget: 0}, "select(layer, q, budget); expected these names, or fewer: "),
        ({"prefill": lambda self, layer, query, key, value: 0}, "prefill(layer, query, key, value); expected"),
        ({"insert": lambda self, state, keys, values: 0}, "insert(layer, keys, values)"),
        ({"attend": lambda self, layer, *, queries: 0}, "attend(layer, queries); expected"),
        ({"after_prompt": lambda self, layers, tokens: 0}, "after_prompt(layers, ids, replay)"),
        ({"select": lambda self, layer: (yield)}, "select as a generator; expected a plain method"),
        ({"select": 5}, "select as 5; expected a method of layer, queries, budget"),
    ],
)  # fmt: skip
def test_how_a_policy_defines_its_hooks(hooks, message):
    cls = policy(**hooks)
    for attempt in (lambda: run(cls()), lambda: check_hooks(cls)):
        with pytest.raises(kvbench.KVBenchError, match=r"^Policy 'mine' \(theirs\) defines ") as raised:
            attempt()
        assert message in str(raised.value)


@pytest.mark.parametrize("found", [3, "ab", (-1, 4), (1.5, 2), None])
def test_what_static_tokens_gives_is_two_numbers_of_tokens(found):
    with pytest.raises(kvbench.KVBenchError) as raised:
        run(policy(static_tokens=lambda self, context: found, takes_budget=True)())
    expected = f"Policy 'mine' (theirs) gave {found!r} from static_tokens; expected two numbers of tokens, sinks and"
    assert str(raised.value).startswith(expected)


def test_fewer_arguments_and_defaults_are_fine():
    seen = []
    cls = policy(
        prefill=lambda self, layer, keys: seen.append(keys.shape), insert=lambda self: seen.append(0),
        select=staticmethod(lambda layer, extra=3, **more: Selection()),
    )  # fmt: skip
    check_hooks(cls)
    run(cls(), steps=3)
    assert len(seen) == LAYERS * 3


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({"select": lambda self, layer, queries, budget: None}, "defines select without a yield; expected a generator"),
        ({"select": lambda self, layer, query, budget: (yield)}, "select(layer, query, budget); expected these names"),
    ],
)
def test_how_a_probe_defines_its_hooks(hooks, message):
    with pytest.raises(kvbench.KVBenchError, match=r"^Probe 'looks' \(theirs\) defines ") as raised:
        run("streaming_llm", probes=[probe(**hooks)()])
    assert message in str(raised.value)


def test_a_probe_that_swallows_or_repeats_is_blamed_and_not_the_policy():
    def swallows(self, layer, queries, budget):
        yield

    def repeats(self, layer, queries, selection):
        yield
        yield

    other = type("Other", (kvbench.Probe,), {"name": "other", "summary": "O.", "result": lambda self: {}})()
    with pytest.raises(
        kvbench.KVBenchError,
        match=r"^Probe 'looks' \(theirs\) returned None from select at layer 0; expected what its yield",
    ):
        run("streaming_llm", probes=[other, probe(select=swallows)()])
    with pytest.raises(
        kvbench.KVBenchError, match=r"^Probe 'looks' \(theirs\) failed in attend at layer 0: .*second yield"
    ):
        run("streaming_llm", probes=[other, probe(attend=repeats)()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": registry().find("policy", "full")}, "The policy is the class Full; expected an instance, Full()"),
        ({"policy": 3}, "The policy 3 is a int; expected an instance of kvbench.KVCachePolicy"),
        ({"policy": None}, "The policy None is a NoneType"),
        ({"policy": probe()()}, "is a Looks; expected an instance of kvbench.KVCachePolicy"),
        ({"probes": [probe()]}, "The probe is the class Looks; expected an instance, Looks()"),
        ({"probes": [registry().make("policy", "full")]}, "is a Full; expected an instance of kvbench.Probe"),
    ],
)  # fmt: skip
def test_classes_and_other_things_instead_of_instances(arguments, message):
    with pytest.raises(kvbench.KVBenchError) as raised:
        kvbench.attach(MODEL, **arguments)
    assert message in str(raised.value)


def test_every_installed_policy_and_probe_keeps_the_contract():
    for kind in ("policy", "probe"):
        for cls in registry().classes[kind].values():
            check_hooks(cls)


def test_an_allocator_that_breaks_is_named(monkeypatch):
    classes = registry().classes
    uniform = classes["budget"]["uniform"]
    broken = type("Broken", (uniform,), {
        "name": "broken", "summary": "B.", "__module__": "theirs", "allocate": lambda self, request: request.nothing,
    })  # fmt: skip
    monkeypatch.setattr(registry(), "classes", {**classes, "budget": {**classes["budget"], "broken": broken}})
    with pytest.raises(kvbench.KVBenchError, match=r"^Budget 'broken' \(theirs\) failed in allocate: AttributeError"):
        run("streaming_llm", budget=kvbench.contract.budget.Budget(tokens=20, allocator="broken"))
