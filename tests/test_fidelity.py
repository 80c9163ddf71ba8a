"""Fidelity to exact attention, against plain transformers' logits and float64 formulas written here."""

import json
import math
from itertools import pairwise

import pytest
import torch
from language import make_tokenizer
from test_cli import model_folder  # noqa: F401
from tiny import tiny_model, tokens

import kvbench as package
from kvbench.contract.errors import KVBenchError
from kvbench.engine.generation import exact_logits, force
from kvbench.plugins import registry
from kvbench.tasks import ForcedTask, LogitScores, TokenExample
from kvbench.tasks.fidelity import Fidelity

pytestmark = pytest.mark.transformers

WORDS = "every good boy deserves fudge and all cows eat grass while the quick brown fox jumps over a lazy dog"


@pytest.fixture
def text(tmp_path):
    """A text of words that repeat in no period."""
    words = WORDS.split()
    drawn = torch.randint(len(words), (4000,), generator=torch.Generator().manual_seed(5))
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words[i] for i in drawn.tolist()))
    return file


def divergence(p, q):
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    return [float(sum(a * math.log(a / b) for a, b in zip(x.tolist(), y.tolist(), strict=True)))
            for x, y in zip(p, q, strict=True)]  # fmt: skip


def test_scores_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(40, 30, generator=generator) * 3, torch.randn(40, 30, generator=generator) * 3
    theirs[:20] = ours[:20] + torch.randn(20, 30, generator=generator) * 0.1
    targets = torch.randint(30, (40,), generator=generator)
    scores = Fidelity().score(ours, theirs, targets)
    kl = divergence(theirs, ours)
    assert scores.positions["kl"] == pytest.approx(kl)
    assert scores.values["kl"] == pytest.approx(sum(kl) / 40)
    agree = [int(ours[i].argmax()) == int(theirs[i].argmax()) for i in range(40)]
    assert 0 < sum(agree) < 40
    assert scores.values["top1_agreement"] == pytest.approx(sum(agree) / 40)
    nll = [
        -sum(math.log(logits[i].double().softmax(-1)[targets[i]]) for i in range(40)) / 40 for logits in (ours, theirs)
    ]
    assert scores.values["perplexity_ratio"] == pytest.approx(math.exp(nll[0]) / math.exp(nll[1]))
    assert Fidelity().score(ours, ours, targets).values == {"kl": 0, "top1_agreement": 1, "perplexity_ratio": 1}


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_exact_logits_are_those_of_one_plain_forward_and_full_s_are_the_same_to_the_bit(architecture):
    model, ids = tiny_model(architecture), tokens(1, 90)
    with torch.no_grad():
        plain = model(ids).logits[0, 60:89]
    for chunk in (None, 25):
        exact = exact_logits(model, ids[0].tolist(), prompt_tokens=60, prefill_chunk=chunk)
        torch.testing.assert_close(exact, plain, atol=1e-4, rtol=1e-4)
        with package.attach(model) as session:
            forced = force(session, ids[0].tolist(), prompt_tokens=60, prefill_chunk=chunk)
        assert torch.equal(forced.logits, exact)
    assert forced.tokens == plain.argmax(-1).tolist()
    assert len(forced.step_s) == 29


def test_forced_tokens_go_through_the_policy_one_by_one():
    """StreamingLLM's logits equal plain attention under a mask of sinks and window, written out here."""
    model, ids, prompt, budget, sinks = tiny_model(num_hidden_layers=1), tokens(1, 90), 60, 20, 4
    with package.attach(model, policy="streaming_llm", budget=budget) as session:
        forced = force(session, ids[0].tolist(), prompt_tokens=prompt)
    columns, rows = torch.arange(90)[None, :], torch.arange(90)[:, None]
    seen = (columns <= rows) & ((columns < sinks) | (columns > rows - (budget - sinks)) | (rows < prompt))
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits[0, prompt:89]
    torch.testing.assert_close(forced.logits, plain, atol=1e-4, rtol=1e-4)
    targets = ids[0, prompt + 1 :]
    exact = exact_logits(model, ids[0].tolist(), prompt_tokens=prompt)
    scores = Fidelity().score(forced.logits, exact, targets)
    with torch.no_grad():
        reference = divergence(model(ids).logits[0, prompt:89], plain)
    assert scores.positions["kl"] == pytest.approx(reference, rel=1e-3, abs=1e-6)
    assert scores.values["kl"] > 1e-3


def test_the_baseline_without_a_cache_agrees_with_exact_attention():
    model, ids = tiny_model(), tokens(1, 60)[0].tolist()
    with package.attach(model, policy="full_no_cache") as session:
        forced = force(session, ids, prompt_tokens=50)
    torch.testing.assert_close(forced.logits, exact_logits(model, ids, prompt_tokens=50), atol=1e-4, rtol=1e-4)


def test_examples_are_disjoint_windows_that_a_larger_count_only_adds_to(text):
    task = Fidelity(Fidelity.Options(text=str(text), scored=16))
    tokenizer = make_tokenizer()
    few = list(task.examples(tokenizer, context_length=100, count=3, seed=1))
    more = list(task.examples(tokenizer, context_length=100, count=6, seed=1))
    assert more[:3] == few
    assert [len(example.input_ids) for example in more] == [100] * 6
    assert {example.prompt_tokens for example in more} == {100 - 17}
    starts = sorted(int(example.info["first_token"]) for example in more)
    assert all(b - a >= 99 for a, b in pairwise(starts))
    assert list(task.examples(tokenizer, context_length=100, count=3, seed=2)) != few
    with pytest.raises(KVBenchError, match="too small for fidelity over 16 positions"):
        next(task.examples(tokenizer, context_length=30, count=1, seed=1))
    with pytest.raises(KVBenchError, match=r"has \d+ disjoint windows of 100 tokens, fewer than the 100000"):
        next(task.examples(tokenizer, context_length=100, count=100_000, seed=1))
    with pytest.raises(KVBenchError, match="cannot be read"):
        Fidelity(Fidelity.Options(text=str(text) + "x")).data()


@pytest.fixture
def run(kvbench, model_folder, tmp_path, text):  # noqa: F811
    """`kvbench run --task fidelity` on the tiny model."""

    def command(*arguments):
        return kvbench(
            "run", "--model", model_folder, "--task", "fidelity", "--task-option", f"text={text}", "--task-option",
            "scored=12", "--context-length", 160, "--examples", 3, "--output", tmp_path / "out", *arguments,
        )  # fmt: skip

    return command


def test_run_measures_fidelity_of_several_policies_with_intervals_and_reuses_them(run, tmp_path):
    arguments = ("--policy", "streaming_llm,oracle_topk", "--ratio", "0.3")
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    streaming, oracle, full = json.loads(out)["runs"]
    assert full["metrics"]["kl"] == {"mean": 0, "ci95": [0, 0], "n": 3}
    assert full["metrics"]["top1_agreement"]["mean"] == full["metrics"]["perplexity_ratio"]["mean"] == 1
    for metrics in (streaming["metrics"], oracle["metrics"]):
        low, high = metrics["kl"]["ci95"]
        assert 0 < low <= metrics["kl"]["mean"] <= high
        assert metrics["accuracy"]["mean"] == pytest.approx(metrics["top1_agreement"]["mean"])
        assert metrics["attended_tokens"] == pytest.approx(0.3 * 147, abs=1)
        assert metrics["bytes"]["resident"] > 0
    assert oracle["metrics"]["kl"]["mean"] < streaming["metrics"]["kl"]["mean"]
    rows = [json.loads(line) for line in (tmp_path / "out").glob("streaming*/examples.jsonl").__next__().open()]
    assert all(len(row["positions"]["kl"]) == 12 for row in rows)
    files = {file: file.read_bytes() for file in (tmp_path / "out").rglob("examples.jsonl")}
    code, out, _ = run(*arguments)
    assert code == 0
    assert {file: file.read_bytes() for file in files} == files
    for label in ("KL divergence, nats", "top-1 agreement", "perplexity ratio", "95% interval"):
        assert label in out
    assert "accuracy" not in out


def test_a_third_party_s_task_can_score_logits_of_its_own_tokens(monkeypatch, kvbench, model_folder, tmp_path):  # noqa: F811
    class Entropy(ForcedTask):
        name, summary = "entropy", "Entropy of the policy's distributions, in bits"
        metrics = {"entropy": "entropy, bits"}  # noqa: RUF012
        main = "entropy"

        def examples(self, tokenizer, *, context_length, count, seed):
            for number in range(count):
                yield TokenExample(f"entropy/{number}", tuple(range(3, 3 + 40)), 30)

        def score(self, logits, exact, targets):
            assert logits.shape == exact.shape == (9, logits.shape[1])
            assert targets.tolist() == list(range(34, 43))
            p = logits.double().softmax(-1)
            return LogitScores({"entropy": float(-(p * p.log2()).sum(-1).mean() / 20)})

    monkeypatch.setitem(registry().classes["task"], "entropy", Entropy)
    code, out, err = kvbench(
        "run", "--model", model_folder, "--task", "entropy", "--policy", "full", "--context-length", 100,
        "--examples", 2, "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "entropy, bits" in out
