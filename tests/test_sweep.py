"""`kvbench sweep` on a tiny random model: validation, resumption, isolation, and the same bytes on a Ray cluster."""

import json
import os
import signal
import threading
import time
from importlib.util import find_spec

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import model_folder  # noqa: F401  a fixture
from test_results import Short

from kvbench.compare.comparison import describe
from kvbench.contract.errors import KVBenchError
from kvbench.plugins import registry
from kvbench.runs import examples as measuring
from kvbench.runs import sweep
from kvbench.runs.shard import Shard, shard_named


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setitem(registry().classes["task"], "short", Short)


@pytest.fixture
def write(tmp_path, model_folder):  # noqa: F811
    """A sweep's file: two policies, a length, two seeds, three examples, with changes."""

    def make(text="", **changes):
        keys = {
            "models": f"[{model_folder}]", "policies": "[full, streaming_llm]", "budgets": "[{ratio: 0.3}]",
            "context_lengths": "[512]", "seeds": "[1, 2]", "examples": "3", "probe_examples": "0", **changes,
        }  # fmt: skip
        file = tmp_path / "sweep.yaml"
        file.write_text(text or "".join(f"{key}: {value}\n" for key, value in keys.items() if value is not None))
        return file

    return make


def examples(output):
    return {file.parent.name: file.read_bytes() for file in sorted(output.glob("*/examples.jsonl"))}


def test_a_sweep_runs_every_combination_once_and_continues(kvbench, write, tmp_path, monkeypatch):
    output = tmp_path / "out"
    loads, measured = [], []
    load_model, measure = sweep.load_model, measuring._measure
    monkeypatch.setattr(
        sweep,
        "load_model",
        lambda *a, weights=True, **k: (loads.append(weights), load_model(*a, weights=weights, **k))[1],
    )

    def interrupted(config, loaded, task, batch, prefilled):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.extend(batch)
        return measure(config, loaded, task, batch, prefilled)

    monkeypatch.setattr(measuring, "_measure", interrupted)
    file = write(budgets="[{ratio: 0.3}, {tokens: 60, allocator: pyramid}]", seeds="[1]", examples="2", tasks="[short]")
    assert kvbench("sweep", file, "--output", output)[0] == 130
    kept = examples(output)
    measured.clear()
    monkeypatch.setattr(measuring, "_measure", lambda *a: (measured.extend(a[3]), measure(*a))[1])
    code, out, err = kvbench("sweep", file, "--output", output, "--json")
    document = json.loads(out)
    # `full` takes no budget, so it is one run and not one for each.
    assert (code, document["failures"]) == (0, [])
    found = [(run["policy"], run["budget"] and run["budget"]["allocator"]) for run in document["runs"]]
    assert found == [("full", None), ("streaming_llm", "uniform"), ("streaming_llm", "pyramid")]
    assert len(measured) == 2  # the third run's examples, or what was left of it
    assert all(examples(output)[name].startswith(data) for name, data in kept.items())
    assert loads.count(True) == 2  # once for each command, whatever the number of runs
    assert "[3/3]" in err
    loads.clear()
    code, out, err = kvbench("sweep", file, "--output", output)
    assert (code, loads.count(True)) == (0, 0)  # all is there, and no model is loaded
    for text in ("3 runs", "streaming_llm", "tokens 60", "pyramid", "accuracy"):
        assert text in out


def test_a_policy_may_have_an_interval_of_its_own(write):
    own = "{name: snapkv, options: {window: 8}, compress_every: %d}"
    file = write(policies=f"[quest, {own % 8}]", budgets="[{tokens: 100}]", tasks="[short]", seeds="[1]")
    plans = sweep.plan_sweep(file)
    assert [describe(p.config.model_dump(mode="json")).split(" window")[0] for p in plans] == [
        "quest tokens 100 uniform", "snapkv tokens 100 uniform every 8",
    ]  # fmt: skip
    found = {planned.config.policy: planned.config.budget for planned in plans}
    assert {name: budget.compress_every for name, budget in found.items()} == {"quest": None, "snapkv": 8}
    with pytest.raises(KVBenchError, match=r"policies\[0\]: --compress-every 7 is smaller than the window of 8"):
        sweep.plan_sweep(write(policies=f"[{own % 7}]", tasks="[short]"))


def test_a_failing_run_leaves_the_others_alone_and_is_listed(kvbench, write, tmp_path, monkeypatch):
    measure = measuring._measure

    def failing(run, *rest):
        if run.config.policy == "streaming_llm" and run.config.seed == 1:
            raise ValueError("no such tensor")
        return measure(run, *rest)

    monkeypatch.setattr(measuring, "_measure", failing)
    file, output = write(examples="1", tasks="[short]"), tmp_path / "out"
    code, out, err = kvbench("sweep", file, "--output", output, "--json")
    document = json.loads(out)
    assert code == 2
    assert [(run["policy"], run["config"]["seed"]) for run in document["runs"]] == [
        ("full", 1), ("full", 2), ("streaming_llm", 2),
    ]  # fmt: skip
    (failure,) = document["failures"]
    assert failure["error"].startswith("ValueError: no such tensor (test_sweep.py line")
    assert "Failed: streaming_llm ratio 0.3 uniform" in err
    assert "1 of 4 runs failed; the others are kept" in " ".join(err.split())
    assert "about" in err and " left" in err  # the time left
    # A run whose folder is damaged is one failure too; the one that failed before is tried again.
    monkeypatch.setattr(measuring, "_measure", measure)
    next(output.glob("full-*")).joinpath("run.json").write_text("{")
    code, out, err = kvbench("sweep", file, "--output", output, "--json")
    document = json.loads(out)
    assert (code, len(document["runs"])) == (2, 3)
    assert "no readable run" in document["failures"][0]["error"]


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"policies": "[full, qest]"}, ["line 2, policies[1]: Unknown policy 'qest': did you mean quest?"]),
        ({"tasks": "[niah_singel_1]"}, ["line 8, tasks[0]: Unknown task 'niah_singel_1': did you mean niah_single_1"]),
        ({"polices": "[full]"}, ["line 9, polices: this key is unknown: did you mean policies?"]),
        ({"policies": None}, ["line 1, policies: Field required"]),
        ({"seeds": "[1, two]"}, ["line 5, seeds[1]: 'two': Input should be a valid integer"]),
        ({"budgets": "[{tokens: 100, ratio: 0.5}]"}, ["line 3, budgets[0]: a budget needs exactly one size"]),
        ({"budgets": "[{ratio: 2}]"}, ["line 3, budgets[0].ratio: 2: Input should be less than or equal to 1"]),
        ({"budgets": "[{ratio: 0.3, allocator: flat}]"}, ["line 3, budgets[0]: Unknown budget 'flat'"]),
        ({"budgets": "[{tokens: 600}]"}, ["line 3, budgets[0]: The budget of 600 tokens is larger than the context"]),
        (
            {"budgets": "[{ratio: 0.3}, {ratio: 0.01}]"},
            ["line 3, budgets[1]: This budget is 4 of the", "streaming_llm"],
        ),
        ({"context_lengths": "[512, 64]"}, ["line 8, tasks[0]: A context of 64 tokens is too small"]),
        ({"context_lengths": "[2048]"}, ["reads at most 1024 tokens and 2048 were asked for"]),
        ({"models": "[/nowhere]"}, ["line 1, models[0]: There is no model folder /nowhere"]),
        ({"policies": "[{name: quest, options: {page_size: big}}]"}, ["policies[0]: Option page_size='big' of policy"]),
        (
            {"policies": "[qest, streaming_lm]", "tasks": "[nope]"},
            ["has 3 problems, and nothing was run", "policies[0]", "policies[1]", "tasks[0]"],
        ),
    ],
)
def test_what_is_wrong_is_told_by_line_before_anything_runs(kvbench, write, tmp_path, changes, messages):
    changes = {"tasks": "[niah_single_1]", **changes}
    code, out, err = kvbench("sweep", write(**changes), "--output", tmp_path / "out")
    assert (code, out) == (2, "")
    for message in messages:
        assert message in " ".join(err.split()), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policies: [full\ntasks: x", "line 2 is not YAML"),
        ("- full", "is not a mapping"),
        ("policies: [full]\nseeds: [1]\nseeds: [2]\n", "line 3, seeds: the key seeds is there twice"),
        ("policies: &a [*a]", "policies[0]"),
        ("policies: !!python/object/apply:os.system [ls]", "line 1 is not YAML"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(kvbench, write, text, message):
    code, _, err = kvbench("sweep", write(text))
    assert (code, message in " ".join(err.split())) == (2, True), err


def test_more_memory_than_the_machine_has_is_refused_beforehand(kvbench, write, monkeypatch):
    monkeypatch.setattr(sweep, "capacity", lambda _: 100_000)
    code, _, err = kvbench("sweep", write(probe_examples="1"))
    assert code == 2
    assert "line 4, context_lengths[0]:" in err
    assert (
        "needs at least 0.0 GiB for its weights and the keys and values of 512 tokens, which the probes hold twice"
        in err
    )
    monkeypatch.undo()


def test_a_dry_run_lists_and_runs_nothing(kvbench, write, tmp_path):
    code, out, _ = kvbench("sweep", write(), "--dry-run", "--output", tmp_path / "out")
    assert code == 0
    assert "streaming_llm ratio 0.3 uniform on" in out
    assert "4 runs of 3 examples; nothing was run" in out
    assert not (tmp_path / "out").exists()
    code, out, _ = kvbench("sweep", write(), "--dry-run", "--json")
    assert len(json.loads(out)["planned"]) == 4


def test_a_sweep_without_exact_attention_says_what_it_will_lack(kvbench, write, tmp_path):
    file, output = write(policies="[streaming_llm]"), tmp_path / "out"
    lacks = "No run of `full`"
    assert lacks in kvbench("sweep", file, "--output", output, "--dry-run")[2]
    (output / "full-niah_single_1-512-0").mkdir(parents=True)
    (output / "full-niah_single_1-512-0/run.json").write_text("{}")
    assert lacks not in kvbench("sweep", file, "--output", output, "--dry-run")[2]


def test_options_of_the_engine_are_checked(kvbench, write):
    assert "neither 'local' nor 'ray'" in kvbench("sweep", write(), "--engine", "slurm")[2]
    assert "need --engine ray" in kvbench("sweep", write(), "--workers", "2")[2]


def kill_a_worker(output, killed):
    """Kill one process of a Ray actor as soon as some run has an example and not all of them."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(0 < data.count(b"\n") < 3 for data in examples(output).values()):
            for process in psutil.Process().children(recursive=True):
                if "ray::Worker.run" in " ".join(process.cmdline() or [process.name()]):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
        time.sleep(0.02)


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'kvbench[ray]'")
def test_on_a_ray_cluster_of_two_workers_with_one_killed_nothing_is_lost_and_nothing_twice(
    kvbench, write, tmp_path, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = write()
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray", killed))
    killer.start()
    code, out, err = kvbench(
        "sweep", file, "--engine", "ray", "--workers", 2, "--output", tmp_path / "ray", "--json"
    )  # fmt: skip
    killer.join()
    assert (code, len(killed)) == (0, 1), err
    assert "died (ActorDiedError); another one goes on with it" in " ".join(err.split())
    document = json.loads(out)
    assert (len(document["runs"]), document["failures"]) == (4, [])
    assert {run["status"] for run in document["runs"]} == {"complete"}
    code, _, _ = kvbench("sweep", file, "--output", tmp_path / "local")
    assert code == 0
    assert examples(tmp_path / "ray") == examples(tmp_path / "local")
    assert len(examples(tmp_path / "local")) == 4


def test_ray_places_each_run_on_a_gpu_of_its_own_and_a_spread_model_on_all_of_a_node():
    ray = pytest.importorskip("ray")
    from kvbench.runs.ray import _Cluster

    class Worker:
        def place(self):
            return ray.get_gpu_ids()

    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1",
             object_store_memory=80 * 2**20)  # fmt: skip
    try:
        joined = _Cluster(ray, None)
        assert joined.device == "cuda"
        count, share = joined.workers("cuda")
        assert (count, share) == (2, {"num_gpus": 1, "num_cpus": 1})
        workers = [ray.remote(Worker).options(**share).remote() for _ in range(count)]
        places = ray.get([worker.place.remote() for worker in workers], timeout=120)
        assert sorted(places) in ([[0], [1]], [["0"], ["1"]])
        assert joined.workers("cuda", spread=True) == (1, {"num_gpus": 2, "num_cpus": 1})
        assert joined.workers("cpu")[1]["num_gpus"] == 0
    finally:
        ray.shutdown()


@given(runs=st.lists(st.integers(), max_size=40), of=st.integers(1, 40))
def test_shards_are_a_sweep_in_equal_parts(runs, of):
    if of > max(len(runs), 1):
        with pytest.raises(KVBenchError, match=f"the sweep has {len(runs)} runs"):
            Shard(1, of).of_runs(runs)
        return
    parts = [Shard(number, of).of_runs(runs) for number in range(1, of + 1)]
    assert [run for part in parts for run in part] == runs
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", "1 /2", "1/2\n", "٣/٤"])
def test_what_is_no_shard_is_told(text):
    with pytest.raises(KVBenchError, match="is no part of a sweep"):
        shard_named(text)


def test_shards_in_one_folder_make_the_whole_sweep(kvbench, write, tmp_path):
    file = write(seeds="[1]")
    kvbench("sweep", file, "--output", tmp_path / "whole")
    for part in ("1/2", "2/2"):
        kvbench("sweep", file, "--shard", part, "--output", tmp_path / "parts")
    assert len(examples(tmp_path / "parts")) == 2
    assert examples(tmp_path / "parts") == examples(tmp_path / "whole")
