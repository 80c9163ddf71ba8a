"""A run's folder survives whatever ends its writer: it continues to the bytes of an undisturbed run."""

import functools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from language import loaded_model

from kvbench import KVBenchError
from kvbench.compare.leaderboard import query
from kvbench.contract.budget import Budget
from kvbench.contract.task import Example, Task
from kvbench.plugins import registry
from kvbench.report.collect import collect
from kvbench.runs import results, runner
from kvbench.runs.results import Run, RunConfig, find_runs, read, read_rows

ENVIRONMENT = {"packages": {"kvbench": "0.1.0", "torch": "2"}, "device_name": "test", "device": "cpu"}
EXAMPLES = 8


def config(**changes):
    return RunConfig(**{
        "model": "m", "model_fingerprint": "f", "device": "cpu", "dtype": "float32", "policy": "quest",
        "policy_options": {"page_size": 16}, "budget": Budget(ratio=0.1), "task": "t", "task_options": {},
        "task_data": {}, "context_length": 512, "examples": EXAMPLES, "seed": 42, "question": "aware",
        "prefill_chunk": None, "recall_k": 100, "probe_examples": 1, **changes,
    })  # fmt: skip


def row(index):
    """What a measurement would give, the same in every process."""
    return {
        "id": f"t/512/42/{index}", "score": index % 3 / 2, "prediction": f"Grüße\r\n\u2028 {index} " * 20,
        "references": ["x"], "prompt_tokens": 400 + index, "generated_tokens": 3, "prefill_s": 0.25 + index,
        "index_s": 0.5, "step_s": [0.125] * 40, "bytes": {"resident": 10, "offloaded": 0, "index": 0},
        "peak_memory_bytes": 1000 + index, "info": {}, "probes": {"density": 0.1, "retrieval_s": 0.01},
    }  # fmt: skip


def write(path, examples=EXAMPLES):
    """What `execute` does, without a model."""
    run = Run(path, config(), ENVIRONMENT)
    if run.status != "complete":
        with run.writing():
            done = {row["id"] for row in run.rows}
            for index in range(examples):
                if row(index)["id"] not in done:
                    run.append(row(index))
    return run


def content(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def child(function, *arguments):
    """Run a function in a forked process that ends as soon as it returns."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        finally:
            os._exit(code)
    return pid


_ALONE: list[str] = []


def alone(test):
    """Run a test that forks in an interpreter of its own: other tests' threads may hold locks that a fork inherits.

    One interpreter runs all of them, once; each test has its own outcome there.
    """
    _ALONE.append(test.__name__)

    @functools.wraps(test)
    def run(**arguments):
        if "KVBENCH_TEST_ALONE" in os.environ:
            return test(**arguments)
        name = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
        outcomes, told = _outcomes()
        assert outcomes.get(name) == "PASSED", told
        return None

    return run


@functools.cache
def _outcomes():
    """The outcome of each of these tests by name, and what pytest told."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *(f"{__file__}::{n}" for n in _ALONE)],
        env={**kept, "KVBENCH_TEST_ALONE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.findall(r"^([A-Z]+) \S*::(\S+)", done.stdout, flags=re.MULTILINE)
    return {name: outcome for outcome, name in found}, done.stdout + done.stderr


def killed(pid):
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.fixture
def undisturbed(tmp_path):
    run = write(tmp_path / "undisturbed")
    assert run.status == "complete"
    return content(run.path)


@alone
def test_a_run_killed_at_random_moments_ends_in_the_bytes_of_an_undisturbed_one(tmp_path, undisturbed):
    began = time.monotonic()
    os.waitpid(child(write, tmp_path / "timed"), 0)
    duration = time.monotonic() - began
    rng = random.Random(7)
    kills = folders = 0
    seen = set()
    while kills < 30:
        folders += 1
        path = tmp_path / f"run-{folders}"
        latest = duration
        ends = False
        while not ends:
            pid = child(write, path)
            time.sleep(rng.uniform(0, latest))
            os.kill(pid, signal.SIGKILL)
            ends = not killed(pid)
            kills += not ends
            folder = path / config().folder
            seen.add((folder / "examples.jsonl").read_bytes() if (folder / "examples.jsonl").exists() else b"")
            latest *= 1.02  # a machine that became slower than it was when timed still gets to the end
        assert content(path / config().folder) == undisturbed
    assert len(seen) > EXAMPLES / 2  # the kills fell on different moments


def die_at(call, path):
    """Write a run that is killed just before, or just after, its `call`-th forcing or renaming."""
    count = 0

    def counted(function):
        def wrapper(*arguments, **options):
            nonlocal count
            for part in range(2):
                count += 1
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                if part == 0:
                    result = function(*arguments, **options)
            return result

        return wrapper

    results.os.fsync = counted(os.fsync)
    Path.replace = counted(Path.replace)
    write(path, examples=2)


@alone
def test_a_kill_beside_each_forcing_and_renaming_loses_nothing(tmp_path):
    reference = content(write(tmp_path / "undisturbed", examples=2).path)
    call = 1
    while killed(child(die_at, call, path := tmp_path / str(call))):
        assert content(write(path, examples=2).path) == reference
        call += 1
    assert call > 20


@pytest.mark.parametrize("name", ["examples.jsonl", "timings.jsonl"])
def test_a_file_cut_anywhere_in_its_last_line_continues_to_the_same_bytes(tmp_path, undisturbed, name):
    path = write(tmp_path / "cut").path
    for file in path.iterdir():
        file.unlink()
    whole = undisturbed[Path(name)]
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole), max(1, (len(whole) - start) // 12)):
        for file, data in undisturbed.items():
            (path / file).write_bytes(data)
        if name == "timings.jsonl":
            (path / "examples.jsonl").write_bytes(b"".join(undisturbed[Path("examples.jsonl")].splitlines(True)[:-1]))
        (path / name).write_bytes(whole[:end])
        changed = json.loads(undisturbed[Path("run.json")])
        (path / "run.json").write_text(json.dumps({**changed, "status": "running", "metrics": {}}))
        assert len(read_rows(path)) == EXAMPLES - 1
        assert (path / name).read_bytes() == whole[:end]  # reading repairs nothing
        run = write(tmp_path / "cut")
        assert content(path) == undisturbed
        cut = [note for note in run.notes if "never finished" in note]
        assert bool(cut) == (end > start or name == "examples.jsonl"), run.notes


def limited(path, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with pytest.raises(KVBenchError, match=r"File too large.*Free some space.*continues after them"):
        write(path)


@pytest.mark.parametrize("size", [1, 1500, 3500, 4400])
@alone
def test_a_disk_that_fills_up_is_one_sentence_and_the_run_continues(tmp_path, undisturbed, size):
    path = tmp_path / "full"
    assert os.waitpid(child(limited, path, size), 0)[1] == 0
    folder = path / config().folder
    kept = read_rows(folder)
    assert len(kept) < EXAMPLES
    for file in ("examples.jsonl", "timings.jsonl"):
        assert undisturbed[Path(file)].startswith((folder / file).read_bytes() if (folder / file).exists() else b"")
    write(path)
    assert content(folder) == undisturbed


def hold(path, signal_file):
    run = Run(path, config(), ENVIRONMENT)
    with run.writing():
        run.append(row(0))
        with (run.path / "timings.jsonl").open("ab") as file:
            file.write(b'{"id": "half')
        signal_file.touch()
        time.sleep(60)


@alone
def test_two_writers_are_kept_apart_and_a_killed_one_frees_the_folder(tmp_path, undisturbed):
    path, ready = tmp_path / "shared", tmp_path / "ready"
    pid = child(hold, path, ready)
    while not ready.exists():
        time.sleep(0.01)
    before = content(path)
    with pytest.raises(KVBenchError, match="Another kvbench is writing"):
        write(path)
    assert content(path) == before  # not even half a line of the other's is touched
    os.kill(pid, signal.SIGKILL)
    assert killed(pid)
    assert content(write(path).path) == undisturbed


def test_corruption_before_the_end_is_refused_and_named(tmp_path):
    folder = write(tmp_path).path
    lines = (folder / "examples.jsonl").read_bytes().splitlines(keepends=True)
    for damage, message in [
        ([*lines[:2], b"\0" * 40 + b"\n", *lines[3:]], "examples.jsonl line 3 is corrupt"),
        (lines[:2] + lines[1:], "examples.jsonl line 3 repeats example t/512/42/1"),
        (lines[:2] + lines[3:], "timings.jsonl has no line 3 for example t/512/42/3"),
    ]:
        (folder / "examples.jsonl").write_bytes(b"".join(damage))
        with pytest.raises(KVBenchError, match=message):
            Run(tmp_path, config(), ENVIRONMENT)
    (folder / "examples.jsonl").write_bytes(b"".join(lines))
    (folder / "timings.jsonl").unlink()
    with pytest.raises(KVBenchError, match=r"timings\.jsonl has no line 1"):
        read_rows(folder)


def test_a_last_line_whose_content_a_power_cut_lost_runs_again(tmp_path, undisturbed):
    folder = write(tmp_path / "cut").path
    lines = (folder / "examples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "examples.jsonl").write_bytes(b"".join(lines[:-1]) + b"\0" * (len(lines[-1]) - 1) + b"\n")
    run = write(tmp_path / "cut")
    assert content(folder) == undisturbed
    assert any("holds 7 now" in note for note in run.notes)


def test_a_complete_run_that_lost_examples_is_completed(tmp_path, undisturbed):
    folder = write(tmp_path / "cut").path
    for name in ("examples.jsonl", "timings.jsonl"):
        (folder / name).write_bytes(b"".join((folder / name).read_bytes().splitlines(keepends=True)[:5]))
    run = write(tmp_path / "cut")
    assert "had 8 examples when it was complete and holds 5 now" in run.notes[0]
    assert content(folder) == undisturbed


def test_continuing_in_another_environment_is_said(tmp_path):
    run = Run(tmp_path, config(), ENVIRONMENT)
    with pytest.raises(RuntimeError), run.writing():
        run.append(row(0))
        raise RuntimeError
    other = Run(tmp_path, config(), {**ENVIRONMENT, "packages": {"kvbench": "0.1.0", "torch": "3"}})
    assert "continues 1 examples of another environment (torch 2 -> 3)" in other.notes[0]


def test_only_what_is_timed_is_kept_apart(tmp_path):
    folder = write(tmp_path).path
    first = json.loads((folder / "examples.jsonl").read_text().split("\n")[0])
    timed = json.loads((folder / "timings.jsonl").read_text().split("\n")[0])
    assert set(timed) == {"id", "prefill_s", "index_s", "step_s", "peak_memory_bytes", "probes"}
    assert set(first) == set(row(0)) - {"prefill_s", "index_s", "step_s", "peak_memory_bytes"}
    assert first["probes"] == {"density": 0.1}
    assert read_rows(folder) == [row(index) for index in range(EXAMPLES)]


def test_version_1_is_read_and_gets_the_fields_that_came_later(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    old = config().model_dump(mode="json")
    del old["probes"]
    document = {"schema": 1, "config": old, "environment": ENVIRONMENT, "status": "complete", "metrics": {"a": 1}}
    (folder / "run.json").write_text(json.dumps(document))
    (folder / "examples.jsonl").write_text("".join(json.dumps(row(index)) + "\n" for index in range(3)))
    assert read(folder)["config"] == config().model_dump(mode="json")
    assert read_rows(folder) == [row(index) for index in range(3)]
    assert find_runs(tmp_path) == [folder]
    (folder / "run.json").write_text(json.dumps({**document, "schema": 3}))
    with pytest.raises(KVBenchError, match="schema version 3; this kvbench reads versions 1, 2"):
        read(folder)
    with pytest.raises(KVBenchError, match="no run in"):
        find_runs(tmp_path / "nowhere")


def test_no_folder_is_passed_over_without_a_word(tmp_path, monkeypatch):
    good = write(tmp_path / "good").path
    for name, target in (("loop", "run.json"), ("broken", "nowhere")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").symlink_to(target)
    (tmp_path / "folder" / "run.json").mkdir(parents=True)
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def closing(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", closing)
    bad = [tmp_path / name for name in ("broken", "closed", "folder", "loop")]
    assert find_runs(tmp_path) == sorted([good, *bad])
    problems = collect([tmp_path]).problems
    left_out = query(tmp_path)[1]
    for path in bad:
        for told in (problems, left_out):
            assert sum(f"{path}/run.json is no readable run" in sentence for sentence in told) == 1
    assert len(problems) == len(left_out) == len(bad)


class Short(Task):
    name, summary = "short", "Short prompts, for the test."

    def examples(self, tokenizer, *, context_length, count, seed):
        for index in range(count):
            yield Example(f"short/{seed}/{index}", f"one two three {index} " * 12, "four?", "", ("x",), 3)

    def score(self, prediction, example):
        return len(prediction) % 5 / 4


def real_run(path, ready=None):
    """A run of a policy on a tiny model, the same in every process; says when it has begun."""
    registry().classes["task"]["short"] = Short
    loaded = loaded_model()
    request = runner.Request("snapkv", {"window": 8}, Budget(ratio=0.5), "short", {}, 128, 3, 1, probe_examples=1)
    if ready is not None:
        ready.touch()
    runner.execute([runner.plan(request, loaded)], loaded, Path(path), lambda *_: None)


def begun(path, ready):
    """A process that has begun a real run."""
    ready.unlink(missing_ok=True)
    pid, began = child(real_run, path, ready), time.monotonic()
    while not ready.exists():
        assert time.monotonic() < began + 300, "no run began"
        time.sleep(0.01)
    return pid


@alone
def test_real_runs_killed_at_random_moments_end_in_the_same_examples_and_traces(tmp_path):
    rng, ready = random.Random(3), tmp_path / "ready"
    pid, began = begun(tmp_path / "undisturbed", ready), time.monotonic()
    assert os.waitpid(pid, 0)[1] == 0
    duration = time.monotonic() - began
    ends = 0
    for _ in range(4):
        pid = begun(tmp_path / "killed", ready)
        time.sleep(rng.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        ends += not killed(pid)
    assert ends < 3, "no run was killed at work"
    assert os.waitpid(child(real_run, tmp_path / "killed"), 0)[1] == 0
    (folder,), (reference,) = (find_runs(tmp_path / name) for name in ("killed", "undisturbed"))
    left, right = content(folder), content(reference)
    assert left.keys() == right.keys()
    for name in left.keys() - {Path("run.json"), Path("timings.jsonl")}:
        assert left[name] == right[name]
    ours, theirs = (read(path)["metrics"] for path in (folder, reference))
    for metric in ours.keys() - {"ttft_s", "tpot_s", "peak_memory_bytes", "probe_overhead"}:
        assert ours[metric] == theirs[metric]
