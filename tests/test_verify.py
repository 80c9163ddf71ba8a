"""`kvbench verify`: a run whose numbers follow from its examples holds, and any that was changed is told."""

import json
import shutil

import pytest
from language import loaded_model
from test_results import Short

from kvbench.contract.errors import KVBenchError
from kvbench.plugins import registry
from kvbench.runs import runner
from kvbench.runs.verify import verify

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of the baseline, its task installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry().classes["task"], "short", Short)
        loaded = loaded_model()
        request = runner.Request("full", {}, None, "short", {}, 128, 4, 1, probe_examples=1)
        output = tmp_path_factory.mktemp("runs")
        (run,) = runner.execute([runner.plan(request, loaded)], loaded, output, lambda *_: None)
        yield run.path


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / made.name)


def edit(file, change):
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    first = json.loads(lines[0])
    change(first)
    file.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")


def faults(folder):
    (found,) = verify(folder)
    return found.faults


def test_a_run_as_it_was_made_holds(copied):
    (found,) = verify(copied.parent)
    assert (found.faults, found.examples, found.scores) == ([], 4, 4)


def test_a_score_that_its_answer_does_not_have_is_told(copied):
    edit(copied / "examples.jsonl", lambda row: row.update(score=0.99))
    stated, mean = faults(copied)[:2]
    assert "states a score of 0.99, and its answer has" in stated
    assert "accuracy.mean is" in mean


def test_an_answer_that_was_changed_is_told(copied):
    edit(copied / "examples.jsonl", lambda row: row.update(prediction=row["prediction"] + "x"))
    assert [fault for fault in faults(copied) if "its answer has" in fault]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: run["metrics"]["accuracy"].update(mean=1.0), "accuracy.mean is 1 in run.json"),
        (lambda run: run["metrics"]["bytes"].update(resident=1.0), "bytes.resident is 1 in run.json"),
        (lambda run: run["metrics"]["accuracy"]["ci95"].__setitem__(0, 0.9), r"accuracy.ci95[0] is 0.9 in run.json"),
        (lambda run: run["config"].update(seed=2), "the configuration belongs to a folder full-short-128-"),
        (lambda run: run.update(status="interrupted"), "the run is interrupted, not complete"),
    ],
)
def test_a_run_file_that_was_changed_is_told(copied, change, told):
    edit(copied / "run.json", change)
    assert [fault for fault in faults(copied) if fault.startswith(told)]


def test_examples_that_are_missing_are_told(copied):
    for name in ("examples.jsonl", "timings.jsonl"):
        lines = (copied / name).read_text().splitlines(keepends=True)
        (copied / name).write_text("".join(lines[:-1]))
    assert "it holds 3 examples and was asked for 4" in faults(copied)


def test_an_answer_that_was_changed_and_scores_the_same_is_told(copied):
    edit(copied / "examples.jsonl", lambda row: row.update(prediction=row["prediction"] + "\n"))
    assert "examples.jsonl was changed after the run: its hash is another" in faults(copied)


def test_a_file_that_is_no_part_of_the_run_is_told(copied):
    (copied / "model.bin").write_bytes(b"x")
    (copied / "more.jsonl").symlink_to(copied / "examples.jsonl")
    assert faults(copied) == ["more.jsonl is a link", "model.bin is no file of this run"]
    edit(copied / "run.json", lambda run: run.pop("files"))  # as older versions wrote it
    assert faults(copied) == ["more.jsonl is a link", "model.bin is no file of a run"]


def test_a_trace_that_is_gone_is_told(copied):
    next(copied.glob("traces/*")).unlink()
    assert faults(copied) == ["traces/000000.safetensors is missing"]


def test_a_closed_folder_holds_runs_alone(copied):
    (copied.parent / "README.md").write_text("mine")
    assert [found.faults for found in verify(copied.parent, closed=True)] == [[]]
    (copied.parent / "notes.txt").write_text("x")
    assert [found.faults for found in verify(copied.parent, closed=True)] == [["notes.txt belongs to no run"], []]


def test_the_command_names_what_does_not_hold_and_ends_with_2(kvbench, made, copied):
    assert kvbench("verify", made)[0] == 0
    edit(copied / "run.json", lambda run: run["metrics"]["accuracy"].update(mean=1.0))
    code, out, told = kvbench("verify", copied.parent)
    assert (code, "does not hold" in out, "accuracy.mean" in told, "1 of 1 runs" in told) == (2, True, True, True)
    code, out, _ = kvbench("verify", copied, "--json")
    (entry,) = json.loads(out)["runs"]
    assert (code, len(entry["faults"]), entry["scores"]) == (2, 1, 4)


def test_a_task_of_logits_is_said_not_to_be_scored_again(copied):
    edit(copied / "run.json", lambda run: run["config"].update(task="fidelity", task_options={}))
    (found,) = verify(copied)
    assert found.notes == ["scores were not computed again: task 'fidelity' scores logits, which are not kept"]
    assert found.scores == 0


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(KVBenchError, match="There is no run in"):
        verify(tmp_path)
