"""`kvbench compare` on folders written here."""

import json

import numpy as np
import pytest
from scipy import stats
from test_results import ENVIRONMENT, config, row

from kvbench.contract.budget import Budget
from kvbench.runs.results import Run


def store(path, scores, **changes):
    made = config(examples=len(scores), policy_options={}, **{"task": "qa", **changes})
    run = Run(path, made, ENVIRONMENT)
    with run.writing():
        for index, score in enumerate(scores):
            run.append({**row(index), "id": f"qa/512/{made.seed}/{index}", "score": float(score)})
    return run.path


FULL, QUEST, SNAPKV = [1] * 12, [1] * 3 + [0] * 9, [1] * 11 + [0]


@pytest.fixture
def runs(tmp_path):
    return {
        "full": store(tmp_path / "out", FULL, policy="full", budget=None),
        "quest": store(tmp_path / "out", QUEST, policy="quest"),
        "snapkv": store(tmp_path / "out", SNAPKV, policy="snapkv"),
    }


def test_a_table_of_paired_differences_with_holms_correction(kvbench, runs, tmp_path):
    code, out, err = kvbench("compare", runs["full"], tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    quest, snapkv = json.loads(out)["comparisons"]
    assert (quest["candidate"], snapkv["candidate"]) == ("quest ratio 0.1 uniform", "snapkv ratio 0.1 uniform")
    assert (quest["difference"], quest["wins"], quest["losses"]) == (-0.75, 0, 9)
    assert quest["p_value"] == pytest.approx(2 / 2**9)
    assert (quest["p_holm"], snapkv["p_holm"]) == (pytest.approx(2 * 2 / 2**9), 1)
    interval = stats.bootstrap((np.subtract(QUEST, FULL),), np.mean, method="BCa", rng=1).confidence_interval
    assert quest["ci95"] == pytest.approx(list(interval), abs=0.1)
    code, out, _ = kvbench("compare", runs["full"], runs["quest"], runs["snapkv"])
    assert code == 0
    for text in ("baseline full, accuracy 100.0%", "-75.0%", "0 / 9 / 3", "0.00391", "0.00781", "2 comparisons"):
        assert text in out, out


def test_seeds_are_pooled(kvbench, runs, tmp_path):
    store(tmp_path / "out", [1] * 12, policy="full", budget=None, seed=43)
    store(tmp_path / "out", [0] * 12, policy="quest", seed=43)
    code, out, _ = kvbench("compare", runs["full"], tmp_path / "out", "--json")
    assert code == 0
    quest, snapkv = json.loads(out)["comparisons"]
    assert (quest["n"], quest["by_seed"], quest["unpaired"]) == (24, {"42": -0.75, "43": -1.0}, 0)
    assert (snapkv["n"], snapkv["unpaired"]) == (12, 12)  # snapkv has no seed 43, and that is said
    assert "sd 17.7%" in kvbench("compare", runs["full"], tmp_path / "out")[1]


def test_other_tasks_find_their_own_baseline(kvbench, runs, tmp_path):
    store(tmp_path / "out", [0.5] * 12, task="vt")
    store(tmp_path / "out", [0.75] * 12, task="vt", policy="full", budget=None)
    code, out, err = kvbench("compare", runs["full"], tmp_path / "out", "--json")
    rows = {(row["task"], row["candidate"].split()[0]): row for row in json.loads(out)["comparisons"]}
    assert (code, err, len(rows)) == (0, "", 3)
    assert (rows["vt", "quest"]["difference"], rows["vt", "quest"]["test"]) == (-0.25, "permutation")
    assert rows["vt", "quest"]["p_value"] == pytest.approx(2 / 2**12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 1024}, "their context length differs (1024 against 512)"),
        ({"task": "vt"}, "their task differs (vt against qa)"),
        ({"model_fingerprint": "other"}, "their model fingerprint differs"),
        ({"question": "agnostic"}, "their question differs (agnostic against aware)"),
        ({"seed": 43}, "no example and seed in common"),
    ],
)
def test_runs_on_other_examples_are_refused(kvbench, runs, tmp_path, changes, message):
    other = store(tmp_path / "other", QUEST, **changes)
    code, out, err = kvbench("compare", runs["full"], other)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    # Beside runs that can be compared it is a warning.
    if "seed" not in changes:
        code, out, err = kvbench("compare", runs["full"], other, runs["quest"])
        assert code == 0
        assert message in " ".join(err.split())


def test_bad_folders_are_one_sentence(kvbench, runs, tmp_path):
    (tmp_path / "empty").mkdir()
    document = json.loads((runs["snapkv"] / "run.json").read_text())
    (runs["snapkv"] / "run.json").write_text(json.dumps({**document, "status": "interrupted"}))
    for arguments, message in [
        ((tmp_path / "empty", runs["quest"]), "There is no run in"),
        ((runs["full"], runs["full"]), "nothing to compare"),
        ((runs["full"], runs["snapkv"]), "is not finished (status interrupted, 12 of 12 examples)"),
        ((tmp_path / "out", runs["quest"]), "is not finished"),
    ]:
        code, out, err = kvbench("compare", *arguments)
        assert (code, out) == (2, "")
        assert message in " ".join(err.split()), err
    (runs["snapkv"] / "run.json").write_text(json.dumps(document))
    _, _, err = kvbench("compare", tmp_path / "out", runs["quest"])
    assert "holds runs of 3 configurations (full; quest ratio 0.1 uniform; snapkv" in " ".join(err.split())


def test_configurations_are_told_apart_by_what_differs(kvbench, runs, tmp_path):
    store(tmp_path / "out", QUEST, budget=Budget(tokens=64, allocator="pyramid"))
    code, out, _ = kvbench("compare", runs["quest"], tmp_path / "out", "--json")
    names = [entry["candidate"] for entry in json.loads(out)["comparisons"]]
    assert (code, names) == (0, ["full", "quest tokens 64 pyramid", "snapkv ratio 0.1 uniform"])


def test_unfinished_runs_can_be_left_out(kvbench, runs, tmp_path):
    document = json.loads((runs["snapkv"] / "run.json").read_text())
    (runs["snapkv"] / "run.json").write_text(json.dumps({**document, "status": "interrupted"}))
    code, out, err = kvbench("compare", runs["full"], tmp_path / "out", "--skip-unfinished", "--json")
    assert code == 0
    assert [entry["candidate"] for entry in json.loads(out)["comparisons"]] == ["quest ratio 0.1 uniform"]
    told = " ".join(err.split())
    assert "is not finished (status interrupted, 12 of 12 examples) and was left out." in told
    code, _, err = kvbench("compare", runs["snapkv"], tmp_path / "out", "--skip-unfinished")
    assert (code, "has no finished run" in " ".join(err.split())) == (2, True)
    code, _, err = kvbench("compare", runs["full"], runs["snapkv"], "--skip-unfinished")
    assert (code, "was left out" in " ".join(err.split())) == (2, True)


def test_versions_of_a_plugin_are_apart_and_told_apart(kvbench, runs, tmp_path):
    codes = [{"policy": {"distribution": "mine", "version": "1.0", "source": mark * 16}} for mark in "ab"]
    for code, scores in zip(codes, (QUEST, SNAPKV), strict=True):
        store(tmp_path / "out", scores, policy="mine", plugins=code)
    code, out, _ = kvbench("compare", runs["full"], tmp_path / "out", "--json")
    names = [entry["candidate"] for entry in json.loads(out)["comparisons"]]
    assert [name for name in names if name.startswith("mine")] == [
        f"mine ratio 0.1 uniform (mine 1.0, source {mark * 16})" for mark in "ab"
    ]
    changed = {"task": {"distribution": "kvbench", "version": "2", "source": "c" * 16}}
    other = store(tmp_path / "other", QUEST, policy="mine", plugins=changed)
    code, _, err = kvbench("compare", runs["full"], other)
    assert code == 2
    assert "their code of the task differs (kvbench 2, source cccccccccccccccc against not recorded)" in " ".join(
        err.split()
    )
