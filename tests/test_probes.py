"""Probes against float64 formulas written out here."""

import re

import pytest
import torch
from test_strategies import Watch, attended
from tiny import tiny_model, tokens

import kvbench
from kvbench.engine.validation import ANSWERS, Answers
from kvbench.plugins import registry

PROBES = ("recall", "recovery", "density", "output_error")


def measured(policy, budget, options=None, **recall):
    model = tiny_model()
    watch = Watch()
    probes = [registry().make("probe", name, recall if name == "recall" else {}) for name in PROBES]
    with kvbench.attach(model, policy=policy, budget=budget, options=options, probes=[watch, *probes]):
        ids = tokens(2, 80)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    return {name: value for probe in probes for name, value in probe.result().items()}, watch


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("snapkv", {"window": 8}),
        ("streaming_llm", {}),
        ("quest", {"page_size": 4}),
        ("flat", {"sinks": 2, "window": 8}),
    ],
)
def test_recall_recovery_and_density_follow_their_definitions(policy, options):
    result, watch = measured(policy, 30, options, k=7)
    recalls, masses, beyond, densities, firsts = [], [], [], [], {}
    compared = {name: [] for name in ("dynamic_mass", "static_mass")}
    compared |= {f"{name}_without_sinks": [] for name in compared}
    for layer, queries, static, selection, budget, now in watch.steps:
        keys = watch.keys[layer.ordinal][:, :, :now].double()
        sinks, window = layer.static
        store_choice = selection.ids is not None
        for number, ids in enumerate(attended(layer, static, selection)):
            row, head = divmod(number, layer.heads)
            logits = keys[row, head // 3] @ queries[row, head, 0].double() * layer.scaling
            weights = logits.softmax(0)
            masses.append(float(weights[ids].sum()))
            beyond.append(float(weights[[i for i in ids if i >= 4]].sum() / weights[4:].sum()))
            densities.append(len(ids) / now)
            first = firsts.setdefault((layer.ordinal, row, head), weights)
            for name, left_out in (("", 0), ("_without_sinks", 4)):
                count, rest = len([i for i in ids if i >= left_out]), weights[left_out:]
                compared[f"dynamic_mass{name}"].append(
                    float(rest.sort(descending=True).values[:count].sum() / rest.sum())
                )
                reused = first[left_out:].sort(descending=True).indices[:count]
                compared[f"static_mass{name}"].append(float(rest[reused].sum() / rest.sum()))
            candidates = (
                sorted(set(range(now)) - set(static.tolist())) if store_choice else list(range(sinks, now - window))
            )
            taken = len(static) if store_choice else sinks + window
            k = min(7, budget.tokens - taken, len(candidates))
            if k > 0:
                best = {candidates[i] for i in logits[candidates].topk(k).indices.tolist()}
                recalls.append(len(best & set(ids)) / k)
    assert result["recall_at_k"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-9)
    assert result["recovered_mass"] == pytest.approx(sum(masses) / len(masses), rel=1e-5)
    assert result["recovered_mass_without_sinks"] == pytest.approx(sum(beyond) / len(beyond), rel=1e-4)
    for name, values in compared.items():
        assert result[name] == pytest.approx(sum(values) / len(values), rel=1e-4), name
    assert result["density"] == pytest.approx(sum(densities) / len(densities), rel=1e-6)


def test_exact_search_has_recall_one_and_full_attention_no_error():
    flat, _ = measured("flat", 30, {"sinks": 2, "window": 8})
    assert flat["recall_at_k"] == 1
    assert flat["scanned_fraction"] == 1
    assert flat["output_error"] > 0
    full, _ = measured("full", None)
    assert full["recovered_mass"] == pytest.approx(1, abs=1e-6)
    assert full["density"] == 1
    assert full["output_error"] < 1e-5


def test_without_probes_only_the_contract_wraps_the_hooks_and_no_second_copy_is_kept():
    model = tiny_model()
    with kvbench.attach(model, policy="quest", budget=30) as session:
        for name in ("prefill", "select", "attend", "insert"):
            hooks = getattr(session.hook, name).get_hookimpls()
            wrappers = [type(hook.plugin) for hook in hooks if hook.wrapper or hook.hookwrapper]
            assert wrappers == ([Answers] if name in ANSWERS else [])
            assert {type(hook.plugin).__name__ for hook in hooks} - {"Answers"} <= {"Quest", "DefaultPolicy"}
        model.generate(tokens(1, 80), max_new_tokens=4, do_sample=False)
        layers = [layer for cached in session.cache.governed for layer in cached.by_lane]
        assert not any(key.startswith("kvbench.analysis") for layer in layers for key in layer.state)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 5], "select gave token 0, of the static set or evicted; expected set-aside tokens, 4 to 59."),
        ([20, 20], "head 0 of row 0 attends to token 20 2 times; expected once."),
    ],
)
def test_a_selection_that_breaks_the_contract_is_refused(ids, message):
    class Careless(kvbench.KVCachePolicy):
        name, summary = "careless", "Selects wrongly."

        def prefill(self, layer, queries, keys, values):
            layer.store.set_aside(4, 60, offload=False)

        def select(self, layer, queries, budget):
            return kvbench.Selection(torch.tensor(ids).expand(layer.rows, layer.heads, -1))

    model = tiny_model()
    with (
        kvbench.attach(model, policy=Careless(), budget=0.9, probes=["density"]),
        pytest.raises(kvbench.KVBenchError, match=rf"^Policy 'careless' .* at layer 0: {re.escape(message)}$"),
    ):
        model.generate(tokens(1, 80), max_new_tokens=3, do_sample=False)
