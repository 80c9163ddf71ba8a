"""What probes and tasks give is checked when they give it; a bad row of an older run is repaired."""

import json
import math

import numpy as np
import pytest
import torch
from language import loaded_model
from test_results import ENVIRONMENT, EXAMPLES, Short, config, row, write

import kvbench
from kvbench.api.runs_table import results_table
from kvbench.compare import leaderboard
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.identity import Identity
from kvbench.plugins import registry
from kvbench.report.build import build
from kvbench.runs import runner, sharing
from kvbench.runs.measured import probed_trace, probed_values
from kvbench.runs.results import REPLACED, Run, find_runs, over_budget_text, read, replace
from kvbench.runs.rows import fault, read_rows
from kvbench.strategies.evicting.streaming_llm import StreamingLLM


class Gives(kvbench.Probe):
    name, summary = "gives", "Gives what it is told to."

    def __init__(self, values=None, trace=None):
        super().__init__()
        self.values, self.steps = values, trace

    def result(self):
        return self.values() if callable(self.values) else self.values

    def trace(self):
        return self.steps


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x": [1, 2]}, "gave x = [1, 2] (list) as result; expected a finite int or float, or None"),
        ({"x": math.nan}, "gave x = nan (float)"),
        ({"x": math.inf}, "gave x = inf"),
        ({"x": torch.tensor(1.0)}, "gave x = tensor(1.) (Tensor)"),
        ({"x": np.float32(1)}, "(float32)"),
        ({"x": "1"}, "gave x = '1' (str)"),
        ({"x": 10**400}, "expected a finite int or float"),
        ({1: 1.0}, "gave the name 1 (int)"),
        ([1.0], "gave [1.0] (list) as result; expected a dictionary"),
        (None, "gave None (NoneType)"),
        ({"accuracy": 1.0}, "the name accuracy, a metric of every run"),
        ({"kl": 1.0}, "the name kl, a metric of every run"),
        (lambda: 1 / 0, "failed in result: ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_number_names_the_probe(values, message):
    with pytest.raises(KVBenchError) as raised:
        probed_values([Gives(values)], reserved=("kl",))
    assert str(raised.value).startswith("Probe 'gives' (test_measured) ")
    assert message in str(raised.value)


def test_two_probes_cannot_give_one_name():
    assert probed_values([Gives({"x": 1.5, "y": None, "z": True})]) == {"x": 1.5, "y": None, "z": True}
    with pytest.raises(KVBenchError, match=r"the name x, what probe 'gives' measures"):
        probed_values([Gives({"x": 1}), Gives({"x": 2})])


@pytest.mark.parametrize(
    "trace",
    [
        None, [1], {"x": [1]}, {"x": {(1, 2): 3.0}}, {"x": {1: [3.0]}}, {"x": {(1, 2): []}}, {1: {}},
        {"x": {(1, 2): ["a"]}},
    ],
)  # fmt: skip
def test_what_is_no_trace_names_the_probe(trace):
    with pytest.raises(KVBenchError, match=r"Probe 'gives' \(test_measured\) gave .* as trace; expected"):
        probed_trace([Gives({}, trace)])
    assert probed_trace([Gives({}, {"x": {(1, 2): [0.5, math.nan]}, "y": {}})]) == {"x": {(1, 2): [0.5, math.nan]}}


# -- rows --------------------------------------------------------------------------------------------------------------


def test_every_row_that_is_no_result_is_found_and_kept_out(tmp_path):
    assert fault(row(0)) is None
    run = Run(tmp_path, config(), ENVIRONMENT)
    changes = (
        {"score": None}, {"score": "1"}, {"score": math.nan}, {"score": 10**400}, {"probes": {"a": [1]}}, {"probes": 3},
        {"step_s": 0.5}, {"step_s": ["x"]}, {"bytes": None}, {"bytes": {"resident": 1}}, {"prefill_s": None},
        {"peak_memory_bytes": []}, {"prompt_tokens": {}}, {"info": 3}, {"scores": {"kl": None}}, {"trace": 5},
    )  # fmt: skip
    with run.writing():
        for change in changes:
            with pytest.raises(
                KVBenchError, match=f"Example t/512/42/0 of task 't' was not kept: {next(iter(change))}"
            ):
                run.append({**row(0), **change})
        with pytest.raises(KVBenchError, match="its info is nothing that JSON can hold"):
            run.append({**row(0), "info": {"x": torch.tensor(1)}})
        with pytest.raises(KVBenchError, match="its prediction is nothing that JSON can hold"):
            run.append({**row(0), "prediction": "\ud800"})
        run.append(row(0))
    assert read_rows(run.path) == [row(0)]


@pytest.mark.parametrize("bad", [{"density": [1, 2]}, {"retrieval_s": [1, 2]}, {"density": {"a": 1}}])
@pytest.mark.parametrize("place", [0, 3])
def test_a_bad_row_of_an_older_run_runs_again_and_nothing_else(tmp_path, bad, place):
    folder = write(tmp_path).path
    for name in ("examples.jsonl", "timings.jsonl"):
        lines = (folder / name).read_text().split("\n")
        kept = json.loads(lines[place])
        mine = bad if name == "timings.jsonl" else {k: v for k, v in bad.items() if not k.endswith("_s")}
        lines[place] = json.dumps({**kept, "probes": {**kept["probes"], **mine}}, ensure_ascii=False)
        (folder / name).write_text("\n".join(lines))
    document = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**document, "status": "running", "metrics": {}}))
    before = (folder / "examples.jsonl").read_bytes()

    run = Run(tmp_path, config(), ENVIRONMENT)
    (note,) = run.notes
    assert f"holds example t/512/42/{place} with a value that is no result (probes.{next(iter(bad))} is" in note
    with run.writing():
        assert [r["id"] for r in run.rows] == [f"t/512/42/{i}" for i in range(EXAMPLES) if i != place]
        run.append(row(place))
    assert (folder / "examples.jsonl").read_bytes().startswith(before)  # appended to, never rewritten
    assert sorted(read_rows(folder), key=lambda r: r["id"]) == [row(index) for index in range(EXAMPLES)]
    again = Run(tmp_path, config(), ENVIRONMENT)
    assert (again.status, again.notes, len(again.rows)) == ("complete", [], EXAMPLES)
    with pytest.raises(KVBenchError, match="repeats example"):
        (folder / "examples.jsonl").write_bytes((folder / "examples.jsonl").read_bytes() * 2)
        read_rows(folder)


# -- other code --------------------------------------------------------------------------------------------------------


def code(source, version="1.0"):
    return {"policy": Identity(distribution="mine", version=version, source=source * 16)}


def store(path, plugins):
    run = Run(path, config(plugins=plugins), ENVIRONMENT)
    if run.status != "complete":
        with run.writing():
            for index in range(EXAMPLES):
                run.append(row(index))
    return run


def test_a_changed_plugin_runs_anew_and_says_so(tmp_path):
    first = store(tmp_path, code("a"))
    assert first.notes == []
    assert store(tmp_path, code("a")).path == first.path
    changed = store(tmp_path, code("b"))
    assert changed.path != first.path
    assert changed.notes == [
        f"Changed since {first.path}, so this run starts anew in {changed.path}: policy (mine 1.0, source "
        f"{'a' * 16} -> mine 1.0, source {'b' * 16})."
    ]
    newer = store(tmp_path, code("b", "1.1"))
    assert f"(mine 1.0, source {'b' * 16} -> mine 1.1, source {'b' * 16})" in newer.notes[1]
    assert read(first.path)["status"] == "complete"
    unreadable = store(tmp_path / "other", {"policy": Identity(distribution=None, version=None, source=None)})
    assert "source of policy cannot be read, so an edit of it will not be noticed: use --fresh" in unreadable.notes[0]


def test_a_folder_without_the_code_stays_readable(tmp_path):
    old = write(tmp_path)
    document = json.loads((old.path / "run.json").read_text())
    del document["config"]["plugins"]
    (old.path / "run.json").write_text(json.dumps(document))
    assert read(old.path)["config"]["plugins"] == {}
    new = store(tmp_path, code("a"))
    assert new.notes == [
        f"Changed since {old.path}, so this run starts anew in {new.path}: policy (its code was not recorded)."
    ]


def test_fresh_moves_earlier_results_away_and_loses_none(tmp_path):
    run = write(tmp_path)
    kept = (run.path / "examples.jsonl").read_bytes()
    assert replace(tmp_path, config(seed=1)) is None
    for number in (1, 2):
        moved = replace(tmp_path, config())
        assert moved == tmp_path / REPLACED / f"{run.path.name}-{number}"
        assert (moved / "examples.jsonl").read_bytes() == kept
        assert not run.path.exists()
        assert write(tmp_path).notes == []
    assert find_runs(tmp_path) == [run.path]
    with run.writing(), pytest.raises(KVBenchError, match="Another kvbench is writing"):
        replace(tmp_path, config())


CHECKED = (109, 112)
"""Tokens of the conformance check's prompts."""

# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    return loaded_model()


@pytest.fixture
def run(monkeypatch, loaded, tmp_path):
    def execute(*policies, task=Short, probes=(), failed=None, **changes):
        classes = registry().classes
        monkeypatch.setattr(registry(), "classes", {
            **classes, "task": {**classes["task"], task.name: task},
            "probe": {**classes["probe"], **{probe.name: probe for probe in probes}},
        })  # fmt: skip
        configs = [
            runner.plan(
                runner.Request(
                    name, {}, Budget(ratio=0.5), task.name, {}, 128, 3, 1, probes=tuple(p.name for p in probes),
                    **{"probe_examples": 1, **changes},
                ),
                loaded,
            )
            for name in policies
        ]  # fmt: skip
        return runner.execute(configs, loaded, tmp_path, lambda *_: None, failed)

    return execute


def test_a_probe_that_gives_a_list_stops_at_the_first_example_and_is_named(run, tmp_path):
    probe = type("Listing", (kvbench.Probe,), {
        "name": "listing", "summary": "Lists.", "result": lambda self: {"steps": [1, 2]},
    })  # fmt: skip
    with pytest.raises(
        KVBenchError, match=r"Probe 'listing' \(test_measured\) gave steps = \[1, 2\] \(list\) as result"
    ):
        run("streaming_llm", probes=[probe])
    (folder,) = find_runs(tmp_path)
    assert read(folder)["status"] == "failed"
    assert read_rows(folder) == []
    probe.result = lambda self: {"steps": 2}
    (done,) = run("streaming_llm", probes=[probe])
    assert done.metrics["steps"] == 2


@pytest.mark.parametrize("score", [math.nan, [1.0], None, torch.tensor(1.0), "1"])
def test_a_task_that_scores_with_no_number_is_named(run, score):
    task = type("Bad", (Short,), {"name": "bad", "summary": "B.", "score": lambda *_: score})
    with pytest.raises(KVBenchError, match=r"Task 'bad' \(\w+\) scored example short/1/0 with .* expected a f"):
        run("streaming_llm", task=task)


def test_a_task_that_raises_is_named(run):
    task = type("Bad", (Short,), {"name": "bad", "summary": "B.", "score": lambda *_: {}["x"]})
    with pytest.raises(KVBenchError, match=r"Task 'bad' \(\w+\) failed in the score of example short/1/0: KeyE"):
        run("streaming_llm", task=task)


@pytest.mark.parametrize("shared", [False, True])
def test_a_policy_that_fails_leaves_the_others_alone(run, monkeypatch, tmp_path, shared):
    quest = registry().find("policy", "quest")
    monkeypatch.setattr(quest, "static_tokens", lambda self, context: (0, 8))
    calls = []

    def breaks(self, layer, keys, values):
        if layer.prompt_tokens not in CHECKED:
            calls.append(layer.number)
        if len(calls) > 70:
            raise RuntimeError("broken on purpose")

    alike = type("Alike", (quest,), {"name": "alike", "summary": "A.", "insert": breaks})
    classes = registry().classes
    monkeypatch.setattr(registry(), "classes", {**classes, "policy": {**classes["policy"], "alike": alike}})
    told = {}
    done = run(
        "alike",
        "streaming_llm",
        "full",
        share_prefill=shared,
        failed=lambda config, error: told.update({config.policy: error}),
    )
    assert [one.config.policy for one in done] == ["streaming_llm", "full"]
    assert all(one.status == "complete" and len(one.rows) == 3 for one in done)
    assert "broken on purpose" in str(told["alike"])
    (folder,) = (folder for folder in find_runs(tmp_path) if folder.name.startswith("alike"))
    assert read(folder)["status"] == "failed"
    assert 0 < len(read_rows(folder)) < 3  # what it had finished is kept
    with pytest.raises(KVBenchError, match="broken on purpose"):
        run("alike", "streaming_llm", share_prefill=shared)


def test_a_run_planned_with_other_code_is_refused(run, loaded, monkeypatch):
    found = registry()
    classes = found.classes
    monkeypatch.setattr(found, "classes", {**classes, "task": {**classes["task"], "short": Short}})
    config = runner.plan(runner.Request("streaming_llm", {}, Budget(ratio=0.5), "short", {}, 128, 3, 1), loaded)
    assert set(config.plugins) == {"policy", "task", "budget", *(f"probe {name}" for name in sharing.STANDARD_PROBES)}
    other = Identity(distribution="kvbench", version="9", source="0" * 16)
    changed = config.model_copy(update={"plugins": {**config.plugins, "policy": other}})
    with pytest.raises(
        KVBenchError, match=r"Policy streaming_llm is kvbench .* here and was kvbench 9, source 0+ when this run"
    ):
        runner.execute([changed], loaded, "nowhere", lambda *_: None)


class Hoards(StreamingLLM):
    """Keeps within its budget where the conformance check looks; evicts nothing from other prompts."""

    def prefill(self, layer, queries, keys, values):
        if layer.prompt_tokens in CHECKED:
            super().prefill(layer, queries, keys, values)

    def insert(self, layer, keys, values):
        if layer.prompt_tokens in CHECKED:
            super().insert(layer, keys, values)

    def fixed_step(self, parts, clock):
        return None


def hoarder(**more):
    """A policy that takes a budget and never evicts anything from these runs' prompts."""
    return type("Hoarder", (Hoards,), {"name": "hoarder", "summary": "Keeps all.", **more})


@pytest.fixture
def hoarding(monkeypatch, run):
    def execute(cls, *others, **changes):
        classes = registry().classes
        monkeypatch.setattr(registry(), "classes", {**classes, "policy": {**classes["policy"], cls.name: cls}})
        return run(cls.name, *others, **changes)

    return execute


@pytest.fixture
def command(request):
    """The `kvbench` command; the fixture's own name is the module's here."""
    return request.getfixturevalue("kvbench")


def test_a_run_over_its_budget_is_marked_wherever_it_is_shown(hoarding, command, tmp_path):
    hoards, keeps, full = hoarding(hoarder(), "streaming_llm", "full")
    over, (first, *_) = hoards.metrics["over_budget"], hoards.rows
    assert over["asked"] == over["allowed"] == first["budget_tokens"]
    assert over["attended"] == first["prompt_tokens"] + 2  # at the last step of 3 tokens
    assert keeps.metrics["over_budget"] is None
    assert full.metrics["over_budget"] is None
    text = f"over budget: asked {over['asked']} tokens, attended {over['attended']:.0f}"
    assert over_budget_text(hoards.metrics) == text
    assert read(hoards.path)["metrics"]["over_budget"] == over

    table = results_table([run.document() for run in (hoards, keeps)], "t", {}, None)
    assert [column.heading for column in table.columns][1:] == ["hoarder (over budget)", "streaming_llm"]
    found, _ = leaderboard.query(tmp_path, columns=["policy", "over_budget"], sort=["policy"])
    assert found.fetchall() == [
        ("full", None), ("hoarder", f"asked {over['asked']}, attended {over['attended']:.0f}"), ("streaming_llm", None)
    ]  # fmt: skip
    report = build([tmp_path], tmp_path / "report", ("html", "md"))
    marked = {run["policy"]: run["over_budget"] for run in report.document()["runs"]}
    assert marked == {"full": None, "hoarder": over, "streaming_llm": None}
    assert (tmp_path / "report" / "report.html").read_text().count(f'<span class="tag">{text}</span>') == 2
    assert f"hoarder ({text})" in (tmp_path / "report" / "report.md").read_text()
    code, out, _ = command("compare", full.path, hoards.path, keeps.path, "--json")
    entries = json.loads(out)["comparisons"]
    assert (code, [entry["over_budget"] for entry in entries]) == (0, [over, None])


def test_what_a_policy_declares_is_allowed(hoarding):
    """Chunks, pages and growth with the answer are a policy's own to declare; what goes beyond them is not."""
    (run,) = hoarding(hoarder(grows=True))
    over = run.metrics["over_budget"]
    assert over["allowed"] - over["asked"] in (1, 2)  # the tokens generated until then
    (run,) = hoarding(hoarder(name="honest", most_attended=lambda self, layer: None))
    assert run.metrics["over_budget"] is None
    (run,) = hoarding(hoarder(name="paged", most_attended=lambda self, layer: layer.budget.tokens + 16))
    assert run.metrics["over_budget"]["allowed"] == run.metrics["over_budget"]["asked"] + 16


def test_without_probes_nothing_is_said_of_a_budget(hoarding):
    (run,) = hoarding(hoarder(), probe_examples=0)
    assert run.metrics["over_budget"] is None
    assert run.metrics["density"] is None
