"""A policy that changes a built-in one does not silently run the built-in's step of fixed shapes."""

import pytest
import torch
from tiny import shared_model, tokens

import kvbench
from kvbench.engine.generation import generate
from kvbench.engine.inherited import unfollowed
from kvbench.kernels.steps import GrowingStep
from kvbench.plugins import registry


def changed(policy, **members):
    """A plugin's subclass of a built-in policy."""
    return type("Mine", (registry().find("policy", policy),), {"name": "mine", **members})


def anything(self, *args, **kwargs):
    raise NotImplementedError


CHANGES = [
    ("quest", "select"), ("quest", "insert"), ("quest", "attend"), ("quest", "_note_pages"), ("h2o", "insert"),
    ("h2o", "attend"), ("h2o", "_spared"), ("knorm", "select"), ("tova", "attend"), ("streaming_llm", "select"),
    ("streaming_llm", "insert"), ("duo_attention", "select"), ("infllm", "_note_blocks"), ("kivi", "insert"),
    ("think", "attend"), ("flat", "grow"), ("flat", "insert"), ("flat", "_over_budget"), ("retroinfer", "attend"),
    ("full", "attend"), ("full", "select"),
]  # fmt: skip


@pytest.mark.parametrize("policy", sorted(registry().classes["policy"]))
def test_built_in_policies_follow_their_own_steps(policy):
    assert unfollowed(registry().find("policy", policy)) is None
    assert unfollowed(changed(policy)) is None
    assert unfollowed(changed(policy, prefill=anything, static_tokens=anything)) is None
    every = dict.fromkeys(("insert", "select", "attend", "fixed_step"), anything)
    if not registry().find("policy", policy).exact:
        assert unfollowed(changed(policy, **every)) is None


@pytest.mark.parametrize(("policy", "member"), CHANGES)
def test_a_change_that_an_inherited_step_does_not_follow_is_named(policy, member):
    assert f"policy 'mine' changes {member}" in unfollowed(changed(policy, **{member: anything}))
    mixin = type("Mixin", (), {member: anything})
    mixed = type("Mine", (mixin, registry().find("policy", policy)), {"name": "mine"})
    assert member in unfollowed(mixed)
    assert member in unfollowed(type("Further", (mixed,), {"name": "mine"}))


@pytest.mark.parametrize(("policy", "member"), [("h2o", "updated"), ("knorm", "step_scores"), ("tova", "protected")])
def test_what_a_step_asks_of_its_policy_may_be_changed(policy, member):
    assert unfollowed(changed(policy, **{member: anything})) is None


class Doubled(registry().find("policy", "quest")):
    """Quest with other pages than its step would take."""

    name = "doubled"

    def select(self, layer, queries, budget):
        return super().select(layer, -queries, budget)


def decoded(policy, decoding):
    with kvbench.attach(shared_model(), policy=policy, budget=40) as session:
        return generate(session, tokens(1, 90)[0].tolist(), max_new_tokens=8, decoding=decoding)


def test_the_hooks_run_and_the_mode_says_why():
    eager, auto = decoded(Doubled(), "eager"), decoded(Doubled(), "auto")
    assert auto.tokens == eager.tokens
    with kvbench.attach(shared_model(), policy=Doubled(), budget=40) as session, torch.no_grad():
        session.model(tokens(1, 90), use_cache=True)
        reason = session.fixed(torch.tensor([5]), 4, graph=False)
    assert "'doubled' changes select, which the step of fixed shapes that it inherits from Quest" in reason
    with pytest.raises(kvbench.KVBenchError, match="changes select"):
        decoded(Doubled(), "fixed")


class SomeLayers(kvbench.KVCachePolicy):
    name, summary, takes_budget = "some_layers", "Gives no step in later layers.", False
    answer = None

    def insert(self, layer, keys, values):
        pass

    def fixed_step(self, parts, clock):
        return GrowingStep(parts, clock) if parts[0].layer.ordinal == 0 else self.answer


class Raises(SomeLayers):
    def fixed_step(self, parts, clock):
        return 1 / 0


class Wrong(SomeLayers):
    answer = 3


@pytest.mark.parametrize(
    ("policy", "said"),
    [(SomeLayers, "gave no step of fixed shapes for layer 1 after it had given some for layers before"),
     (Raises, "failed in fixed_step at layer 0: ZeroDivisionError"),
     (Wrong, "gave a int from fixed_step at layer 1; expected a FixedStep")],
)  # fmt: skip
def test_wrong_answers_of_fixed_step_are_one_sentence(policy, said):
    with pytest.raises(kvbench.KVBenchError, match=said) as raised:
        decoded(policy(), "fixed")
    assert "Policy 'some_layers' (test_inherited)" in str(raised.value) and "\n" not in str(raised.value)
