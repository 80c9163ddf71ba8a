"""`kvbench recommend` on folders written here."""

import json

import numpy as np
import pytest
from scipy import stats
from test_compare import store
from test_results import ENVIRONMENT, config, row

import kvbench
from kvbench.compare.candidates import Limits
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.runs.results import Run
from kvbench.statistics import averaged_difference, examples_needed, least_examples, paired_difference

MANY = 400


def lost(count, n=MANY):
    return [0] * count + [1] * (n - count)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("recommend")
    store(root, [1] * MANY, policy="full", budget=None)
    for policy, ratio, losses in (
        ("quest", 0.05, 60), ("quest", 0.1, 0), ("quest", 0.2, 0), ("snapkv", 0.1, 7), ("snapkv", 0.5, 1),
    ):  # fmt: skip
        store(root, lost(losses), policy=policy, budget=Budget(ratio=ratio))
    return root


def by_name(scope):
    return {one.name: one for one in scope.candidates}


def test_the_smallest_budget_that_is_shown_within_the_limit_is_chosen(runs):
    (scope,) = kvbench.recommend(runs, max_drop=2, context_length=512).scopes
    found = by_name(scope)
    verdicts = {name: one.verdict for name, one in found.items()}
    assert verdicts == {
        "quest at 5%": "beyond", "quest at 10%": "within", "quest at 20%": "within", "snapkv at 10%": "unknown",
        "snapkv at 50%": "within",
    }  # fmt: skip
    assert [one.name for one in scope.choices] == ["quest at 10%", "snapkv at 50%"]
    seven = found["snapkv at 10%"]
    assert seven.difference.difference == pytest.approx(-7 / MANY)
    spread = 7 / MANY - (7 / MANY) ** 2
    assert seven.examples_needed == pytest.approx(1.96**2 * spread / (0.02 - 7 / MANY) ** 2, abs=1)
    assert scope.accuracy == 1
    assert scope.sentences[0].startswith("Shown within 2 points of exact attention: quest at 10%")


def test_few_examples_prove_nothing_however_well_they_went(tmp_path):
    store(tmp_path, [1] * 4, policy="full", budget=None)
    store(tmp_path, [1] * 4, policy="quest")
    store(tmp_path, [0] * 4, policy="snapkv")
    (scope,) = kvbench.recommend(tmp_path).scopes
    verdicts = {one.policy: (one.verdict, one.examples_needed) for one in scope.candidates}
    assert verdicts == {"quest": ("unknown", 368), "snapkv": ("unknown", 6)}
    text = " ".join(scope.sentences)
    assert "No budget here is shown within 1 point" in text
    assert "4 examples without a loss cannot rule out a drop of 60 points: it takes 368" in text
    assert "quest at 10% (n = 4, 370 more)" in text
    assert "too few to be sure: snapkv at 10% (n = 4, 2 more)" in text


def test_least_examples_is_clopper_and_pearsons_bound():
    for margin in (0.01, 0.05, 0.3):
        n = least_examples(margin)
        bounds = [stats.binomtest(0, k).proportion_ci(0.95, method="exact").high for k in (n - 1, n)]
        assert bounds[1] <= margin < bounds[0]


def test_the_mean_over_tasks_weighs_tasks_alike_and_draws_within_each():
    def scores(values):
        return {42: {str(place): float(value) for place, value in enumerate(values)}}

    first, second = [1] * 30 + [0] * 10, [0.5] * 8
    found = averaged_difference([(scores([1] * 40), scores(first)), (scores([1] * 8), scores(second))])
    assert found.difference == pytest.approx((-0.25 - 0.5) / 2)
    assert (found.n, found.mean_a, found.test) == (48, pytest.approx(1), "permutation")
    expected = stats.bootstrap(
        (np.subtract(first, 1.0),), np.mean, method="BCa", rng=np.random.default_rng(7)
    ).confidence_interval  # the second task does not vary
    assert found.ci95 == pytest.approx([(end - 0.5) / 2 for end in expected], abs=0.02)
    one = (scores([1] * 40), scores(first))
    assert averaged_difference([one]) == paired_difference(*one)
    assert examples_needed(paired_difference(scores([1] * 4), scores([1, 1, 1, 0])), 0.25) is None


def test_tasks_are_averaged_and_what_lacks_one_is_left_out(tmp_path):
    for task, scores in (("qa", [1] * 8), ("vt", [1] * 4)):
        store(tmp_path, scores, policy="full", budget=None, task=task)
        store(tmp_path, [0, *scores[1:]], policy="quest", task=task)
    store(tmp_path, [1] * 8, policy="snapkv", task="qa")
    found = kvbench.recommend(tmp_path)
    (scope,) = found.scopes
    (quest,) = scope.candidates
    assert (scope.tasks, quest.worst_task) == (("qa", "vt"), "vt")
    assert quest.difference.difference == pytest.approx(-(1 / 8 + 1 / 4) / 2)
    assert any("snapkv" in note and "was not run on vt" in note for note in found.left_out)
    assert {one.policy for one in kvbench.recommend(tmp_path, task=["qa"]).scopes[0].candidates} == {"quest", "snapkv"}


def sized(root, policy, scores, resident, offloaded, kl=None):
    made = config(examples=len(scores), policy_options={}, task="qa", policy=policy,
                  budget=None if policy == "full" else Budget(tokens=64))  # fmt: skip
    run = Run(root, made, ENVIRONMENT)
    with run.writing():
        for place, score in enumerate(scores):
            more = {} if kl is None else {"scores": {"kl": kl[place]}}
            run.append({**row(place), "id": str(place), "score": float(score), **more,
                        "bytes": {"resident": resident, "offloaded": offloaded, "index": 0}})  # fmt: skip


def test_bytes_bound_the_choice_and_dominated_budgets_name_what_is_better(tmp_path):
    for policy, resident, offloaded in (("full", 900, 0), ("quest", 900, 10), ("snapkv", 100, 0), ("ivf", 50, 900)):
        sized(tmp_path, policy, [1] * 8, resident * 2**20, offloaded * 2**20)
    (scope,) = kvbench.recommend(tmp_path, bytes=500 * 2**20).scopes
    assert {one.policy: one.fits for one in scope.choices} == {"snapkv": True, "quest": False, "ivf": False}
    assert {one.policy: one.dominated_by for one in scope.candidates} == {
        "quest": "snapkv at 64 tokens", "snapkv": None, "ivf": None,
    }  # fmt: skip
    assert "and 500 MiB in all" in scope.sentences[0]
    (scope,) = kvbench.recommend(tmp_path, device_bytes=60 * 2**20).scopes
    assert [one.policy for one in scope.choices if one.fits] == ["ivf"]


def test_the_divergence_is_a_limit_of_its_own(tmp_path):
    sized(tmp_path, "full", [1] * 8, 9, 0, [0.0] * 8)
    near, far = [0.01, 0.02, 0.015, 0.012, 0.018, 0.011, 0.013, 0.014], [0.2, 0.3, 0.25, 0.22, 0.31, 0.27, 0.2, 0.3]
    sized(tmp_path, "quest", [1] * 8, 9, 0, near)
    sized(tmp_path, "snapkv", [1] * 8, 9, 0, far)
    sized(tmp_path, "ivf", [1] * 8, 9, 0, [*near[:7], 0.4])
    (scope,) = kvbench.recommend(tmp_path, max_kl=0.05).scopes
    verdicts = {one.policy: one.verdict for one in scope.candidates}
    assert verdicts == {"quest": "within", "snapkv": "beyond", "ivf": "unknown"}
    assert by_name(scope)["quest at 64 tokens"].kl == pytest.approx(np.mean(near))
    with pytest.raises(KVBenchError, match="no finished run of full of a task whose answers are scored"):
        kvbench.recommend(tmp_path, max_drop=1)


def test_the_command_prints_a_decision_and_a_document(kvbench, runs):
    code, out, err = kvbench("recommend", runs, "--bytes", "2GiB", "--max-drop", "2", "--context-length", "512")
    assert (code, err) == (0, "")
    for text in ("within", "cannot tell", "Shown within 2 points of exact attention and 2 GiB in all: quest at 10%"):
        assert (text in out) == (text != "cannot tell"), out
    assert "cannot tell" in kvbench("recommend", runs, "--max-drop", "2", "--all")[1]
    some = kvbench("recommend", runs, "--max-drop", "2", "--all", "--where", "policy=snapkv")[1]
    assert "within" in some and "snapkv at 50%" in some and "quest at" not in some  # exact attention is still there
    document = json.loads(kvbench("recommend", runs, "--max-drop", "2", "--json")[1])
    assert document["scopes"][0]["choices"][0]["name"] == "quest at 10%"
    for arguments, message in (
        (("--context-length", "4096"), "there are 512"), (("--task", "vt"), "no finished run here has the task vt"),
        (("--max-drop", "0"), "give one above 0"), (("--bytes", "much"), "--bytes much is not a number of bytes"),
    ):  # fmt: skip
        code, _, err = kvbench("recommend", runs, *arguments)
        assert (code, message.lower() in " ".join(err.lower().split())) == (2, True), err
    assert Limits(1, 0.1, 2**30).text == "within 1 point and 0.1 nats of exact attention"
