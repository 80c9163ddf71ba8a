"""Finished runs for others: the harness's files, the Hub, trackers; none of it reaches a network here."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from language import loaded_model
from test_results import Short

from kvbench.contract.errors import KVBenchError
from kvbench.plugins import registry
from kvbench.runs import redraw, runner
from kvbench.runs.verify import verify
from kvbench.share import hub
from kvbench.share.finished import finished_runs
from kvbench.share.harness import write_lm_eval

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs of the baseline and of a policy, their task installed; gives their folder and the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry().classes["task"], "short", Short)
        loaded = loaded_model()
        output = tmp_path_factory.mktemp("runs")
        requests = [
            runner.Request(policy, {}, None, "short", {}, 128, 3, 1, probe_examples=0)
            for policy in ("full", "full_no_cache")
        ]
        runner.execute([runner.plan(one, loaded) for one in requests], loaded, output, lambda *_: None)
        patch.setattr(redraw, "load_model", lambda *_, **__: loaded)
        yield SimpleNamespace(folder=output, loaded=loaded)


@pytest.fixture
def runs(made):
    return finished_runs([made.folder])[0]


def test_the_examples_are_made_again_as_they_were(made):
    assert [found.faults for found in verify(made.folder, redraw=True)] == [[], []]


def test_the_harness_s_files_hold_every_answer_and_the_mean(runs, tmp_path):
    files = write_lm_eval(runs, tmp_path, prompts=True)
    assert [file.name.partition("_")[0] for file in files] == ["results", "samples"] * 2
    for run, results, samples in zip(runs, files[::2], files[1::2], strict=True):
        content = json.loads(results.read_text())
        scores = [row["score"] for row in run.rows]
        mean = sum(scores) / 3
        error = (sum((score - mean) ** 2 for score in scores) / 2 / 3) ** 0.5
        assert content["results"]["short"]["accuracy,none"] == pytest.approx(mean)
        assert content["results"]["short"]["accuracy_stderr,none"] == pytest.approx(error)
        assert content["config"]["model_args"].startswith(f"pretrained=tiny,policy={run.config.policy},")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        assert [line["resps"] for line in lines] == [[[row["prediction"]]] for row in run.rows]
        assert [line["accuracy"] for line in lines] == scores
        assert all(len(line["arguments"]["gen_args_0"]["arg_0"]) > 100 for line in lines)


def test_the_harness_reads_the_files(runs, tmp_path):
    utils = pytest.importorskip("lm_eval.utils", reason="the extra kvbench[lm-eval] is not installed")
    from lm_eval.result_schema import EvalResults, SampleResult

    names = [str(file) for file in write_lm_eval(runs, tmp_path)]
    results, samples = utils.get_results_filenames(names), utils.get_sample_results_filenames(names)
    assert (len(results), len(samples)) == (2, 2)
    assert {utils.get_file_task_name(Path(name).name) for name in samples} == {"short"}
    assert utils.get_file_datetime(Path(samples[0]).name) in results[0]
    content = json.loads(Path(results[0]).read_text())
    assert set(content) - {"kvbench"} <= set(EvalResults.__annotations__)
    assert "|accuracy|↑" in utils.make_table(content).replace(" ", "")
    sample = json.loads(Path(samples[0]).read_text().splitlines()[0])
    assert set(sample) == {*SampleResult.__annotations__, "accuracy"}
    assert sample["doc_hash"] == utils.hash_string(json.dumps(sample["doc"], indent=2, ensure_ascii=False))


def test_a_data_set_holds_runs_that_can_be_verified(runs, tmp_path):
    hub.write_dataset(runs, tmp_path)
    assert [found.faults for found in verify(tmp_path / "runs", closed=True)] == [[], []]
    table = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [row["metrics.accuracy.mean"] for row in table] == [
        run.document["metrics"]["accuracy"]["mean"] for run in runs
    ]
    assert len((tmp_path / "examples.jsonl").read_text().splitlines()) == 6
    card = huggingface_hub.DatasetCard.load(tmp_path / "README.md")
    assert [one["config_name"] for one in card.data.configs] == ["runs", "examples"]


def test_a_model_card_states_each_run(runs, tmp_path):
    hub.write_model_card(runs, tmp_path)
    found = huggingface_hub.ModelCard.load(tmp_path / "README.md").data.eval_results
    assert [one.metric_value for one in found] == [run.document["metrics"]["accuracy"]["mean"] for run in runs]


class Hub:
    """What a test pushed, in place of the Hub's client."""

    pushed: list = []  # noqa: RUF012

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, repository, **options):
        self.pushed.append(("create", repository, options))
        return f"https://hub/{repository}"

    def upload_folder(self, **options):
        self.pushed.append(("upload", options["repo_id"], options))


def test_a_data_set_is_pushed_with_nothing_else_of_its_folder(made, tmp_path, kvbench, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "t")
    monkeypatch.setattr(Hub, "pushed", [])
    arguments = ("export", made.folder, "--output", tmp_path, "--format", "dataset", "--push", "me/runs", "--private")
    code, out, _ = kvbench(*arguments, "--json")
    assert (code, json.loads(out)["pushed"]) == (0, "https://hub/me/runs")
    (_, _, made_with), (_, _, sent) = Hub.pushed
    assert (made_with["private"], sent["repo_type"], sent["folder_path"]) == (True, "dataset", tmp_path)
    assert sent["allow_patterns"] == ["README.md", "runs.jsonl", "examples.jsonl", "runs/**"]


def test_results_go_to_a_model_as_a_pull_request(made, tmp_path, kvbench, monkeypatch):
    told = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "t")
    monkeypatch.setattr(
        huggingface_hub,
        "metadata_update",
        lambda *given, **options: told.append((given, options)) or "https://hub/pr/1",
    )
    code, out, _ = kvbench("export", made.folder, "--output", tmp_path, "--format", "model-card", "--push", "me/tiny")
    assert (code, "pushed to https://hub/pr/1" in out) == (0, True)
    ((repository, metadata), options) = told[0]
    assert (repository, options["create_pr"], len(metadata["model-index"][0]["results"])) == ("me/tiny", True, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--push", "me/runs"), "needs a token of the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN"),
        (("--push", "runs"), "--push runs is no repository's name: give OWNER/NAME."),
        (("--format", "csv"), "--format csv is none of lm-eval, dataset, model-card."),
        (("--private",), "--private is for a data set that --push makes"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(made, tmp_path, kvbench, monkeypatch, arguments, message):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    code, _, told = kvbench("export", made.folder, "--output", tmp_path / "out", *arguments)
    assert (code, message in told, (tmp_path / "out").exists()) == (2, True, False)


def test_a_hub_that_refuses_is_told_and_the_files_stay(made, tmp_path, kvbench, monkeypatch):
    def refuse(*_, **__):
        raise OSError("403 Forbidden")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "t")
    monkeypatch.setattr(Hub, "upload_folder", refuse)
    code, _, told = kvbench("export", made.folder, "--output", tmp_path, "--push", "me/runs")
    assert (code, "The Hub did not take me/runs (403 Forbidden)" in told) == (2, True)
    assert list(tmp_path.rglob("results_*.json"))


class Library:
    """A tracker's library that remembers."""

    def __init__(self):
        self.runs, self.broken = [], False

    def init(self, **given):
        if self.broken:
            raise ConnectionError("no route")
        self.runs.append(SimpleNamespace(given=given, steps=[], summary={}, ended=False))
        return self

    def log(self, content, step=None):
        self.runs[-1].steps.append((step, content))

    @property
    def summary(self):
        return self.runs[-1].summary

    def finish(self):
        self.runs[-1].ended = True

    def Table(self, columns, data):  # noqa: N802
        return data

    def Api(self):  # noqa: N802
        return SimpleNamespace(runs=lambda _: [SimpleNamespace(name=run.given["name"]) for run in self.runs])


@pytest.fixture
def libraries(monkeypatch):
    made = {name: Library() for name in ("wandb", "trackio")}
    for name, library in made.items():
        monkeypatch.setitem(sys.modules, name, library)
    return made


SWEEP = "policies: [full]\ntasks: [short]\ncontext_lengths: [128]\nexamples: 2\nprobe_examples: 0\nmodels: [{model}]\n"


@pytest.fixture
def command(made, tmp_path, kvbench):
    """Run a sweep of one run of a tiny model with more arguments."""
    made.loaded.model.save_pretrained(tmp_path / "model")
    made.loaded.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(model=tmp_path / "model"))
    return lambda *more: kvbench("sweep", tmp_path / "sweep.yaml", "--output", tmp_path / "runs", *more)


def test_trackers_are_told_of_every_run_and_example(command, libraries):
    code, out, told = command("--wandb", "mine", "--trackio", "ours", "--json")
    assert code == 0, told
    (document,) = json.loads(out)["runs"]
    (wandb,), (trackio,) = libraries["wandb"].runs, libraries["trackio"].runs
    for run, project in ((wandb, "mine"), (trackio, "ours")):
        assert (run.given["project"], run.given["config"]["policy"], run.ended) == (project, "full", True)
        assert [content["example.score"] for step, content in run.steps if step < 2] == [
            json.loads(line)["score"] for line in Path(document["folder"], "examples.jsonl").read_text().splitlines()
        ]
    assert wandb.given["id"] == document["folder"].rpartition("-")[2]
    assert wandb.summary["metrics.accuracy.mean"] == document["metrics"]["accuracy"]["mean"]
    assert trackio.steps[-1][1]["metrics.ttft_s.total"] == document["metrics"]["ttft_s"]["total"]
    command("--trackio", "ours")
    assert len(libraries["trackio"].runs) == 1, "a run that Trackio has is not told twice"


def test_a_tracker_that_takes_nothing_leaves_the_runs(command, libraries, tmp_path):
    libraries["wandb"].broken = True
    code, out, told = command("--wandb", "mine")
    assert (code, "100" in out or "accuracy" in out) == (2, True)
    assert "wandb did not take" in told and "(ConnectionError: no route); the run is kept" in told
    assert [found.faults for found in verify(tmp_path / "runs")] == [[]]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_tracker_is_told_before_any_work(kvbench, monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    code, _, told = kvbench("run", "--policy", "full", f"--{name}", "mine", "--output", tmp_path / "runs")
    assert (code, f"run pip install 'kvbench[{name}]'" in " ".join(told.split()), (tmp_path / "runs").exists()) == (
        2,
        True,
        False,
    )


def test_a_run_that_is_not_complete_is_left_out_and_named(made, tmp_path):
    with pytest.raises(KVBenchError, match="There is no run in"):
        finished_runs([tmp_path])
