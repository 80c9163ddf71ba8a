"""The model `kvbench` of lm-evaluation-harness, on local task files and a tiny model."""

import functools
import json
import sys

import pytest
import torch
from language import save_model

from kvbench import cli
from kvbench.contract.errors import KVBenchError

pytest.importorskip("lm_eval", reason="the extra kvbench[lm-eval] is not installed")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvbench.integrations.lm_eval import KVBenchLM

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" blue", " quite green and grass", " yellow sun"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "blue"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model"), bos_token_id=0, max_position_embeddings=512))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    lines = ["The grass is green. The sky is blue. " * n + "The sky is" for n in (3, 5, 8)]
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": line, "answer": n}) for n, line in enumerate(lines)))
    for name, text in (("choice", CHOICE), ("generate", GENERATE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    # Reading the harness's thousands of task files and asking pip for versions take longer than all these tests.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))


def answers(made, tasks, name):
    """What each request of a task was answered."""
    results = lm_eval.simple_evaluate(
        made, tasks=[name], task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks)), bootstrap_iters=0
    )
    return [sample["resps"] for sample in results["samples"][name]], results


@pytest.mark.parametrize("policy", [{}, {"policy": "flat", "ratio": 1.0}])
def test_exact_attention_answers_as_the_harness_does(model, tasks, policy):
    ours, theirs = KVBenchLM(model, device="cpu", **policy), HFLM(model, device="cpu", dtype="float32")
    expected, _ = answers(theirs, tasks, "tiny_choice")
    for row, found in zip(expected, answers(ours, tasks, "tiny_choice")[0], strict=True):
        for (a,), (b,) in zip(row, found, strict=True):
            assert float(b[0]) == pytest.approx(float(a[0]), abs=1e-4)
            assert b[1] == a[1]
    assert answers(ours, tasks, "tiny_generate")[0] == answers(theirs, tasks, "tiny_generate")[0]


def test_the_policy_governs_generations_and_log_likelihoods(model, tasks):
    evicting = KVBenchLM(model, policy="streaming_llm", tokens=12, device="cpu", sinks=2)
    full = KVBenchLM(model, device="cpu")
    for name in ("tiny_choice", "tiny_generate"):
        found, results = answers(evicting, tasks, name)
        assert found != answers(full, tasks, name)[0]
        assert results["config"]["policy"] == "streaming_llm"
        assert results["config"]["policy_options"]["sinks"] == 2
        assert results["config"]["budget"]["tokens"] == 12


def test_log_likelihoods_through_a_policy_are_those_of_its_own_decoding(model):
    """Token by token, as `attach` decodes: the continuation's first token is still judged after exact attention."""
    import kvbench

    made = KVBenchLM(model, policy="streaming_llm", tokens=12, device="cpu", sinks=2)
    ids = made.tok_encode("The grass is green. The sky is blue. " * 5)
    context, continuation = ids[:-5], ids[-5:]
    ((found, _),) = made._loglikelihood_tokens([(("", ""), context, continuation)], disable_tqdm=True)
    total = 0.0
    with torch.no_grad(), kvbench.attach(made.model, policy="streaming_llm", options={"sinks": 2}, budget=12):
        out = made.model(torch.tensor([context]), use_cache=True)
        for token in continuation:
            total += float(out.logits[0, -1].double().log_softmax(-1)[token])
            out = made.model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    assert found == pytest.approx(total, abs=1e-4)


def test_batches_answer_as_single_requests(model, tasks):
    single, batched = (KVBenchLM(model, policy="flat", ratio=0.5, device="cpu", batch_size=size) for size in (1, 3))
    assert answers(batched, tasks, "tiny_generate")[0] == answers(single, tasks, "tiny_generate")[0]


def test_a_prompt_shorter_than_the_budget_is_kept_whole(model, tasks):
    short = KVBenchLM(model, policy="streaming_llm", tokens=400, device="cpu")
    assert (
        answers(short, tasks, "tiny_generate")[0] == answers(KVBenchLM(model, device="cpu"), tasks, "tiny_generate")[0]
    )


def test_rolling_log_likelihoods_are_exact_or_refused(model, tasks):
    expected = answers(HFLM(model, device="cpu", dtype="float32"), tasks, "tiny_rolling")[0]
    found = answers(KVBenchLM(model, device="cpu"), tasks, "tiny_rolling")[0]
    assert [float(a[0][0]) for a in found] == pytest.approx([float(b[0][0]) for b in expected], rel=1e-5)
    with pytest.raises(KVBenchError, match="have no prompt that policy 'flat' could govern"):
        answers(KVBenchLM(model, policy="flat", device="cpu"), tasks, "tiny_rolling")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "flaat"}, "Unknown policy 'flaat'"),
        ({"policy": "flat", "budget": "piramid"}, "Unknown budget 'piramid'"),
        ({"policy": "flat", "tokens": 5, "ratio": 0.5}, "A budget has one size, and tokens=5, ratio=0.5 were"),
        ({"policy": "flat", "bytes": "many"}, "bytes=many is no budget"),
        ({"policy": "flat", "tokens": 0}, "tokens=0 is no budget: expected a positive"),
        ({"policy": "flat", "ratio": "much"}, "ratio=much is no budget"),
        ({"policy": "flat", "pages": 3}, "Option pages=3 of policy 'flat' is not valid"),
        ({"trust_remote_code": True}, "runs no code that comes with a model"),
        ({"batch_size": "auto"}, "batch_size=auto would be found with exact attention"),
        ({"pretrained": "/absent/model"}, "There is no model folder /absent/model"),
    ],
)
def test_bad_arguments_are_named(model, arguments, message):
    with pytest.raises(KVBenchError, match=message):
        KVBenchLM(**{"pretrained": model, "device": "cpu", **arguments})


def test_the_command_runs_the_harness_with_the_model_registered(model, tasks, tmp_path, monkeypatch, capsys):
    arguments = f"pretrained={model},policy=quest,budget=pyramid,ratio=0.5,dtype=float32"
    monkeypatch.setattr(
        sys, "argv",
        ["kvbench", "lm-eval", "--model", "kvbench", "--model_args", arguments, "--tasks", "tiny_choice",
         "--include_path", str(tasks), "--output_path", str(tmp_path)],  # on the CPU where there is no GPU
    )  # fmt: skip
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main()
    assert "tiny_choice" in capsys.readouterr().out
    (file,) = tmp_path.rglob("results_*.json")
    config = json.loads(file.read_text())["config"]
    assert (config["model"], config["policy"], config["budget"]["allocator"]) == ("kvbench", "quest", "pyramid")


def test_the_command_without_the_harness_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.setattr(sys, "argv", ["kvbench", "lm-eval", "--tasks", "x"])
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main()
    assert "pip install 'kvbench[lm-eval]'" in capsys.readouterr().err
