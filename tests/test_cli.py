"""The `kvbench` command as its users meet it, on a tiny random model in a local folder."""

import json
import re
from importlib.metadata import version

import pytest
from language import THINKS, save_model

from kvbench.cli.common import allocation, listed
from kvbench.contract.errors import KVBenchError
from kvbench.plugins import registry
from kvbench.runs import examples


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def run(kvbench, model_folder, tmp_path):
    """`kvbench run` on the tiny model, three short examples of short answers."""

    def command(*arguments):
        small = ("--model", model_folder, "--context-length", 512, "--examples", 3, "--output", tmp_path / "out")
        return kvbench("run", *small, "--task", "infinitebench_passkey", *arguments)

    return command


@pytest.mark.transformers
def test_run_prints_one_json_document_with_the_policy_first_and_the_baseline_after_it(run):
    code, out, _ = run("--policy", "snapkv", "--ratio", "0.3", "--json")
    document = json.loads(out)
    assert (code, document["schema"]) == (0, 1)
    assert [entry["policy"] for entry in document["runs"]] == ["snapkv", "full"]
    ours, full = (entry["metrics"] for entry in document["runs"])
    assert set(document["runs"][0]) >= {"policy", "budget", "config", "environment", "status", "metrics"}
    assert set(ours["accuracy"]) == {"mean", "ci95", "n"}
    assert ours["accuracy"]["n"] == 3
    assert set(ours["bytes"]) == {"resident", "offloaded", "index"}
    assert ours["ttft_s"]["total"] == pytest.approx(ours["ttft_s"]["prefill"] + ours["ttft_s"]["index"])
    assert 0.25 < ours["density"] < 0.45 < full["density"] == 1
    assert (full["recall_at_k"], full["recovered_mass"]) == pytest.approx((1, 1))
    assert 0 < ours["recall_at_k"] < 1
    assert ours["tpot_s"]["p50"] <= ours["tpot_s"]["p95"]
    assert ours["peak_memory_bytes"] > 10_000_000
    assert document["runs"][0]["status"] == "complete"


def test_run_prints_a_table_and_names_its_folders(run, tmp_path):
    code, out, _ = run("--policy", "quest,streaming_llm", "--ratio", "0.3", "-o", "page_size=8")
    assert code == 0
    for text in ("quest", "streaming_llm", "full", "95% interval", "recall@k", "recovered attention mass", "TPOT p95"):
        assert text in out
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(folders) == 3
    assert all(
        re.fullmatch(r"(quest|streaming_llm|full)-infinitebench_passkey-512-[0-9a-f]{12}", name) for name in folders
    )
    assert (
        json.loads((tmp_path / "out" / folders[1] / "run.json").read_text())["config"]["policy_options"]["page_size"]
        == 8
    )


def test_run_says_that_a_thinking_template_gets_no_answer_prefix(kvbench, tmp_path):
    folder = save_model(tmp_path / "thinker", THINKS)
    small = ("--model", folder, "--context-length", 512, "--examples", 2, "--output", tmp_path / "out")
    code, out, _ = kvbench("run", *small, "--policy", "full")
    assert code == 0
    note = "2 without the answer prefix, since the chat template opens a thinking block"
    assert note in " ".join(out.split())
    (found,) = (tmp_path / "out").iterdir()
    rows = [json.loads(line) for line in (found / "examples.jsonl").read_text().splitlines()]
    assert {row["info"]["prefix_left_out"] for row in rows} == {"the chat template opens a thinking block"}
    code, out, _ = kvbench("run", *small, "--policy", "full", "--task-option", "thinking_prefix=true", "--json")
    (document,) = json.loads(out)["runs"]
    assert (code, document["metrics"]["prefix_left_out_examples"]) == (0, 0)
    assert document["config"]["task_options"]["thinking_prefix"] is True


def test_a_finished_baseline_is_reused_and_another_configuration_gets_another_folder(run, tmp_path):
    assert run("--policy", "quest", "--ratio", "0.3")[0] == 0
    baseline = next((tmp_path / "out").glob("full-*")) / "examples.jsonl"
    before = baseline.read_bytes(), baseline.stat().st_mtime_ns
    assert run("--policy", "quest", "--ratio", "0.4")[0] == 0
    assert (baseline.read_bytes(), baseline.stat().st_mtime_ns) == before
    assert len(list((tmp_path / "out").glob("quest-*"))) == 2


def test_an_interrupted_run_exits_130_and_continues_without_repeating(run, tmp_path, monkeypatch):
    measure = examples._measure
    seen = []

    def interrupted(config, loaded, task, batch, prefilled):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.extend(batch)
        return measure(config, loaded, task, batch, prefilled)

    monkeypatch.setattr(examples, "_measure", interrupted)
    code, _, err = run("--policy", "quest", "--ratio", "0.3", "--no-baseline")
    assert code == 130
    assert "Interrupted" in err
    folder = next((tmp_path / "out").glob("quest-*"))
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    kept = (folder / "examples.jsonl").read_bytes()
    assert kept.count(b"\n") == 2
    with (folder / "examples.jsonl").open("ab") as file:  # what a killed writer leaves behind
        file.write(b'{"id": "half a li')

    monkeypatch.setattr(examples, "_measure", measure)
    assert run("--policy", "quest", "--ratio", "0.3", "--no-baseline")[0] == 0
    finished = (folder / "examples.jsonl").read_bytes()
    assert finished.startswith(kept)
    ids = [json.loads(line)["id"] for line in finished.splitlines()]
    assert len(ids) == len(set(ids)) == 3
    assert json.loads((folder / "run.json").read_text())["status"] == "complete"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "run.json").write_text("{"), "no readable run"),
        (lambda f: (f / "run.json").write_text('{"schema": 99}'), "schema version 99"),
        (lambda f: (f / "run.json").write_text('{"schema": 1, "config": {}}'), "no complete run"),
        (lambda f: (f / "examples.jsonl").write_text("nonsense\n{}\n"), "line 1 is corrupt"),
    ],
)
def test_a_corrupt_or_foreign_run_folder_is_refused_untouched(run, tmp_path, damage, message):
    assert run("--policy", "full")[0] == 0
    folder = next((tmp_path / "out").glob("full-*"))
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, _, err = run("--policy", "full")
    assert (code, message in " ".join(err.split())) == (2, True), err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_full_disk_is_one_sentence_and_keeps_what_is_there(run, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvbench.runs.results.os.fsync", full)
    code, _, err = run("--policy", "full")
    assert code == 2
    assert "No space left on device" in err
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "qest"), "did you mean quest?"),
        (("--policy", ""), "--policy '' names no policy"),
        (("--policy", " , "), "names no policy"),
        (("--policy", "quest", "--output", __file__), "test_cli.py is a file: give --output a folder."),
        (("--policy", "quest", "--output", f"{__file__}/deeper"), "test_cli.py is a file: give --output a folder."),
        (("--policy", "quest", "--budget", "pyramids"), "did you mean pyramid?"),
        (("--policy", "quest", "--task", "niah_singel_1"), "did you mean niah_single_1"),
        (("--policy", "quest", "-o", "page_size=large"), "page_size='large' of policy 'quest' is not valid"),
        (("--policy", "quest", "-o", "pagesize=3"), "its options are: page_size"),
        (("--policy", "quest", "-o", "page_size"), "not of the form name=value"),
        (("--policy", "quest", "--tokens", "600"), "larger than the context of 512"),
        (("--policy", "quest", "--tokens", "5"), "smaller than the policy's static set"),
        (("--policy", "quest", "--tokens", "50", "--ratio", "0.5"), "one size"),
        (("--policy", "quest", "--bytes", "64MiB"), "larger than the context of 512"),
        (("--policy", "quest", "--bytes", "5 parsecs"), "not a number of bytes"),
        (("--policy", "quest", "--budget", "profile"), "needs a measured profile"),
        (("--policy", "quest", "--ratio", "1.5"), "not between 0 and 1"),
        (("--policy", "quest", "--context-length", "5000"), "1024"),
        (("--policy", "quest", "--question", "maybe"), "neither 'aware' nor 'agnostic'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run, tmp_path, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_the_question_can_go_through_the_policy_after_the_prompt(run):
    code, out, _ = run("--policy", "snapkv", "--ratio", "0.3", "--question", "agnostic", "--json")
    assert code == 0
    assert json.loads(out)["runs"][0]["config"]["question"] == "agnostic"


@pytest.mark.parametrize("command", ["policies", "budgets", "indexes", "tasks", "probes", "models"])
def test_lists_name_summarise_and_describe(kvbench, command):
    code, out, _ = kvbench(command, "--json")
    rows = json.loads(out)
    assert code == 0
    assert rows
    assert all({"name", "summary", "options"} <= row.keys() for row in rows)
    name = rows[0]["name"]
    assert name in kvbench(command)[1]
    assert kvbench(command, name)[0] == 0
    code, _, err = kvbench(command, "nonesuch")
    assert code == 2
    assert "nonesuch" in err


def test_all_policies_run_and_one_that_cannot_is_left_out_with_its_reason(run, monkeypatch):
    classes = registry().classes
    some = {name: classes["policy"][name] for name in ("quest", "full", "full_no_cache")}
    alike = type("Alike", (some["quest"],), {"name": "alike", "head_budgets": False})
    monkeypatch.setattr(registry(), "classes", {**classes, "policy": {**some, "alike": alike}})
    code, out, err = run("--policy", "all", "--ratio", "0.5", "--budget", "ada", "--json")
    assert code == 0
    assert [entry["policy"] for entry in json.loads(out)["runs"]] == ["quest", "full"]  # none that has no cache
    assert "Left out alike: Budget 'ada' gives each head its own number of tokens" in " ".join(err.split())


def test_all_policies_go_on_where_one_fails_on_an_example(run, monkeypatch):
    classes = registry().classes
    some = {name: classes["policy"][name] for name in ("snapkv", "quest", "full")}
    monkeypatch.setattr(registry(), "classes", {**classes, "policy": some})
    monkeypatch.setattr("kvbench.strategies.evicting.snapkv.window_attention", lambda *_: 1 / 0)
    code, out, err = run("--policy", "all", "--ratio", "0.5", "--json")
    assert code == 2
    assert [entry["policy"] for entry in json.loads(out)["runs"]] == ["quest", "full"]
    assert "Failed: snapkv: Policy 'snapkv' (kvbench.strategies.evicting.snapkv) failed in prefill" in " ".join(
        err.split()
    )


def test_one_failing_policy_of_several_is_told_at_the_end_and_in_the_exit_code(run, monkeypatch, tmp_path):
    monkeypatch.setattr("kvbench.strategies.evicting.snapkv.window_attention", lambda *_: 1 / 0)
    code, out, err = run("--policy", "snapkv,streaming_llm", "--ratio", "0.5", "--json")
    document = json.loads(out)
    assert code == 2
    assert [entry["policy"] for entry in document["runs"]] == ["streaming_llm", "full"]
    (failure,) = document["failures"]
    assert failure["policy"] == "snapkv"
    assert "failed in prefill at layer 0: ZeroDivisionError" in failure["error"]
    assert "Failed: snapkv: Policy 'snapkv' (kvbench.strategies.evicting.snapkv) failed in prefill" in err
    assert "1 of 3 policies failed; the others are kept" in err
    monkeypatch.undo()


def test_one_policy_that_cannot_do_what_is_asked_leaves_the_others(run):
    code, out, err = run("--policy", "snapkv,streaming_llm", "--tokens", "40", "--json")
    assert code == 2
    assert [entry["policy"] for entry in json.loads(out)["runs"]] == ["streaming_llm", "full"]
    assert "Failed: snapkv: The budget of 40 tokens per layer is smaller than the policy's static set of 64" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "quest", "--tokens", "600"), "larger than the context of 512"),
        (("--policy", "quest", "--tokens", "5"), "smaller than the policy's static set"),
        (("--policy", "quest", "--bytes", "64MiB"), "larger than the context of 512"),
        (("--policy", "quest", "--task", "jsonl", "--task-option", "file=/no/such/file.jsonl"), "/no/such/file.jsonl"),
        (("--policy", "quest", "--output", "/proc/version"), "/proc/version is a file"),
    ],
)
def test_what_can_be_checked_is_before_the_weights_load(run, monkeypatch, arguments, message):
    monkeypatch.setattr("kvbench.models.loading._with_weights", lambda *_: pytest.fail("the weights were loaded"))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


def test_fresh_computes_again_and_keeps_what_was_there(run, tmp_path):
    assert run("--policy", "full")[0] == 0
    (folder,) = (tmp_path / "out").glob("full-*")
    before = (folder / "timings.jsonl").read_bytes()
    code, _, err = run("--policy", "full", "--fresh")
    assert code == 0
    assert f"Earlier results are in {tmp_path}/out/.replaced/{folder.name}-1 now." in "".join(err.split("\n"))
    assert (folder / "timings.jsonl").read_bytes() != before
    assert (tmp_path / "out" / ".replaced" / f"{folder.name}-1" / "timings.jsonl").read_bytes() == before


def test_a_hook_with_other_arguments_is_refused_before_the_weights_load(run, monkeypatch):
    classes = registry().classes
    odd = type("Odd", (classes["policy"]["quest"],), {"name": "odd", "select": lambda self, layer, q, budget: 0})
    monkeypatch.setattr(registry(), "classes", {**classes, "policy": {**classes["policy"], "odd": odd}})
    monkeypatch.setattr("kvbench.models.loading._with_weights", lambda *_: pytest.fail("the weights were loaded"))
    code, _, err = run("--policy", "odd")
    assert code == 2
    assert "Policy 'odd' (test_cli) defines select(layer, q, budget); expected these names" in " ".join(err.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("index", "--indexes", "flat"), ("analyze", "ood"), ("capture",), ("report", "."), ("sweep", "none.yaml"),
        ("run", "--policy", "full"),
    ],
)  # fmt: skip
def test_a_file_in_place_of_a_folder_is_told_before_any_work(kvbench, tmp_path, arguments):
    (tmp_path / "file").write_text("in the way")
    for output in (tmp_path / "file", tmp_path / "file" / "deeper"):
        code, out, err = kvbench(*arguments, "--output", output)
        assert (code, out) == (2, "")
        assert f"{tmp_path}/file is a file: give --output a folder." in "".join(err.split("\n"))
    (tmp_path / "loose").symlink_to(tmp_path / "nothing")
    code, _, err = kvbench(*arguments, "--output", tmp_path / "loose")
    assert (code, "is a broken link" in " ".join(err.split())) == (2, True)


def test_no_index_is_named(kvbench):
    code, _, err = kvbench("index", "--indexes", "")
    assert (code, "--indexes '' names no index" in err) == (2, True)


def test_the_version_is_that_of_the_package(kvbench):
    assert kvbench("--version") == (0, f"kvbench {version('kvbench')}\n", "")


def test_a_budget_takes_its_size_with_its_allocator(run):
    budgets = {"pyramid:300": {"tokens": 300}, "pyramid:25%": {"ratio": 0.25}, "40": {"tokens": 40}}
    for text, size in budgets.items():
        code, out, _ = run("--policy", "quest", "--budget", text, "--examples", 1, "--probe-examples", 0, "--json")
        found = json.loads(out)["runs"][0]["budget"]
        allocator = "uniform" if text == "40" else "pyramid"
        assert (code, found["allocator"], {name: found[name] for name in size}) == (0, allocator, size)


@pytest.mark.parametrize(
    ("budget", "given"),
    [
        ("pyramid:0", {}), ("pyramid:", {}), ("pyramid:101%", {}), ("uniform:0.1", {}), ("pyramid:512k", {}),
        ("uniform", {}), ("12MiB", {"bytes": 12 * 2**20}), ("ada:1.5 GB", {"bytes": 1_500_000_000}),
    ],
)  # fmt: skip
def test_a_budgets_size_is_read_or_refused(budget, given):
    if given or budget == "uniform":
        assert allocation(budget)[1] == given
    else:
        with pytest.raises(KVBenchError, match=r"--budget .* has a size that is none.*pyramid:512"):
            allocation(budget)


def test_a_budget_has_one_size(run):
    code, _, told = run("--policy", "quest", "--budget", "pyramid:300", "--ratio", 0.1)
    assert (code, "--budget NAME:SIZE" in told) == (2, True)


def test_lists_are_separated_by_commas_or_given_again():
    assert listed(["a, b", "c", "a"]) == listed("a,b,,c") == ["a", "b", "c"]
    assert listed(None) == []
