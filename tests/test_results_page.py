"""Compact results, the page made of them, and two commits compared: on runs of a tiny model."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from language import make_tokenizer
from test_results import Short
from tiny import tiny_model

from kvbench.compare.comparison import compare
from kvbench.compare.history import history
from kvbench.contract.budget import Budget
from kvbench.contract.errors import KVBenchError
from kvbench.models import LoadedModel
from kvbench.plugins import registry
from kvbench.report.reference import page
from kvbench.runs import runner
from kvbench.runs.commit import standing
from kvbench.runs.packed import _short as packed_row
from kvbench.runs.packed import pack, read_scores
from kvbench.runs.results import read

PUBLISHED = Path(__file__).parent.parent / "results/published.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two policies on six examples, of two tasks by name."""
    place, classes = tmp_path_factory.mktemp("runs"), registry().classes["task"]
    tokenizer = make_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=1024, eos_token_id=1)
    loaded = LoadedModel(model, tokenizer, "tiny", "f", model.device, model.dtype, 1024)
    classes["short"] = Short
    try:
        request = runner.Request("full", {}, None, "short", {}, 128, 6, 1, probe_examples=0)
        configs = [
            runner.plan(dataclasses.replace(request, policy=policy, budget=Budget(tokens=80)), loaded)
            for policy in ("full", "streaming_llm")
        ]
        runner.execute(configs, loaded, place, lambda *_: None)
    finally:
        del classes["short"]
    return place


@pytest.fixture
def packed(runs, tmp_path):
    pack([runs], tmp_path / "packed")
    return tmp_path / "packed"


def changed(packed, place, policy, change):
    """A copy of packed runs in which `change` was made to the rows and the document of a policy's run."""
    shutil.copytree(packed, place)
    (folder,) = place.glob(f"{policy}-*")
    rows, document = read_scores(folder), json.loads((folder / "run.json").read_text())
    change(rows, document)
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps(document))
    return place


def test_packed_runs_hold_scores_and_figures_and_no_texts(runs, packed, kvbench):
    for folder in packed.iterdir():
        whole = runs / folder.name
        assert {file.name for file in folder.iterdir()} == {"run.json", "scores.jsonl"}
        assert read(folder)["metrics"] == read(whole)["metrics"]
        assert read(folder)["environment"].get("commit") == read(whole)["environment"].get("commit")
        rows = read_scores(folder)
        assert rows == read_scores(whole)
        assert {row["id"] for row in rows} == {f"short/{number}" for number in range(6)} or len(rows) == 6
        assert not {"prediction", "references", "info"} & set(rows[0])
        assert sum(file.stat().st_size for file in folder.iterdir()) < 12_000
    folders = [next(root.glob("full-*")) for root in (runs, packed)]
    others = [next(root.glob("streaming_llm-*")) for root in (runs, packed)]
    results = [compare(folder, [other])[0][0].result for folder, other in zip(folders, others, strict=True)]
    assert results[0] == results[1]
    assert kvbench("leaderboard", packed)[0] == 0


def test_an_unfinished_run_is_not_packed(runs, tmp_path):
    copy = shutil.copytree(runs, tmp_path / "runs")
    file = next(copy.glob("full-*")) / "run.json"
    file.write_text(file.read_text().replace('"status": "complete"', '"status": "failed"'))
    with pytest.raises(KVBenchError, match="is not finished"):
        pack([copy], tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_history_tells_what_changed_beyond_noise_and_nothing_else(packed, tmp_path, kvbench):
    same = history(packed, packed)
    assert [change for change in same.changes if change.beyond_noise] == []

    def slower(rows, document):
        document["environment"]["commit"] = {"id": "b" * 40, "modified": False}
        document["config"]["plugins"]["policy"]["source"] = "other"
        for place, row in enumerate(rows):
            row["step_s"] = 1.5 * row["step_s"] * (1 + 0.01 * (-1) ** place)
            row["ttft_s"] *= 1.01

    after = changed(packed, tmp_path / "after", "streaming_llm", slower)
    found = history(packed, after)
    (sure,) = [change for change in found.changes if change.beyond_noise]
    assert (sure.figure, sure.n) == ("TPOT", 6)
    assert sure.change == pytest.approx(0.5, abs=0.02)
    assert "b" * 10 in found.after
    code, out, _ = kvbench("history", packed, after)
    assert (code, "streaming_llm" in out, "+50.0%" in out) == (0, True, True)

    def scored(value):
        return lambda rows, document: [row.update(score=value) for row in rows]

    sides = [changed(packed, tmp_path / str(value), "full", scored(value)) for value in (1.0, 0.0)]
    for first, second in (sides, [next(side.glob("full-*")) for side in sides]):
        found = history(first, second)
        (accuracy,) = [c for c in found.changes if c.figure == "accuracy" and c.cell.startswith("full")]
        assert (accuracy.change, accuracy.n) == (-1, 6)
        # McNemar's p of six of six is 0.03, by Holm twice that where there are two cells.
        assert accuracy.beyond_noise == (first != sides[0])

    def elsewhere(rows, document):
        slower(rows, document)
        document["environment"]["device_name"] = "another"

    moved = history(packed, changed(packed, tmp_path / "moved", "streaming_llm", elsewhere))
    assert not any(change.beyond_noise for change in moved.changes), "another device is no other code"
    with pytest.raises(KVBenchError, match="have no cell in common"):
        history(next(packed.glob("full-*")), next(packed.glob("streaming_llm-*")))


def test_the_page_states_settings_intervals_verdicts_and_what_is_not_of_the_committed_code(packed, tmp_path):
    repository = tmp_path / "repository"
    (repository / "kvbench").mkdir(parents=True)

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", repository, "-c", "user.name=x", "-c", "user.email=x", *arguments],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    git("init", "-q")
    commits = []
    for text in ("one", "two"):
        (repository / "kvbench/a.py").write_text(text)
        git("add", "-A")
        git("commit", "-qm", text)
        commits.append(git("rev-parse", "HEAD"))
    assert standing(repository, {"id": commits[1], "modified": False}) == ""
    assert "earlier code" in standing(repository, {"id": commits[0], "modified": False})
    assert "changed after" in standing(repository, {"id": commits[1], "modified": True})
    assert "no commit of this repository" in standing(repository, {"id": "c" * 40, "modified": False})
    assert standing(repository, None) == "of no known commit"

    def solved(rows, document):
        document["environment"]["commit"] = {"id": commits[1], "modified": False}
        document["metrics"]["accuracy"] = {"mean": 1.0, "ci95": [0.61, 1.0], "n": 6}
        document["config"]["task"] = "niah_single_2"
        for row in rows:
            row["score"] = 1.0

    def failed(rows, document):
        solved(rows, document)
        document["config"]["policy"] = "snapkv"
        document["environment"]["commit"]["modified"] = True
        document["metrics"]["accuracy"] = {"mean": 0.0, "ci95": [0.0, 0.39], "n": 6}
        for row in rows:
            row["score"] = 0.0

    place = changed(packed, tmp_path / "solved", "full", solved)
    shutil.rmtree(next(place.glob("streaming_llm-*")))
    second = changed(packed, tmp_path / "failed", "streaming_llm", failed)
    shutil.copytree(next(second.glob("streaming_llm-*")), place / "snapkv")
    text = page(place, PUBLISHED, repository)
    assert "2 runs of 6 examples" in text
    assert "## tiny, 128 tokens, question aware" in text
    assert "| full | – | 100.0 (61–100) n 6 | 100.0 |" in text
    assert "| snapkv † | 80 tokens uniform | 0.0 (0–39) n 6 | 0.0 |" in text
    (claim,) = [line for line in text.splitlines() if "SnapKV is near exact attention on needles" in line]
    assert "-100.0 (-100.0 to -8.1), n 6" in claim and claim.endswith("| undecided |"), "six examples decide little"
    (other,) = [line for line in text.splitlines() if "StreamingLLM finds nothing" in line]
    assert other.endswith("| not measured |")
    assert "RTable 4" in text and "36.5" in text
    assert "No results are committed yet" in page(tmp_path / "none", PUBLISHED, repository)


def test_the_page_of_long_answers_is_made_of_their_measures(packed, tmp_path, kvbench):
    names = ("whole_answer", "before_error", "answer_length", "repetition", "rule_kept")

    def measured(policy, mean, length, rule):
        def change(rows, document):
            values = dict(zip(names, (0.0, 0.5, length, 0.25, rule), strict=True))
            document["config"]["task"] = "long_copy"
            document["metrics"]["accuracy"] = {"mean": mean, "ci95": [mean - 0.1, mean + 0.1], "n": 6}
            document["metrics"] |= {name: {"mean": value, "ci95": [0, 1], "n": 6} for name, value in values.items()}
            document["metrics"]["answer_bytes"] = {"peak": 3 * 2**20, "mean": 2**20}
            for place, row in enumerate(rows):
                row |= {"score": mean, "scores": values | {"answer_length": length + 0.001 * place}}
                row["step_s_parts"] = [0.002] * 7 + [0.004]
            if document["config"]["budget"]:
                document["config"]["budget"]["compress_every"] = 16

        return change

    first = changed(packed, tmp_path / "first", "full", measured("full", 0.8, 1.0, 1.0))
    both = changed(first, tmp_path / "both", "streaming_llm", measured("streaming_llm", 0.3, 1.5, 0.0))
    output = tmp_path / "page.md"
    assert kvbench("results", "answers", both, "--output", output)[0] == 0
    text = output.read_text()
    assert "## long_copy: tiny, 128 tokens of prompt and answer" in text
    exact, ours = (line for line in text.splitlines() if line.startswith(("| full", "| streaming")))
    assert exact.split(" | ")[1:5] == ["–", "80.0 (70–90)", "–", "0.0"]
    assert ours.split(" | ")[1:4] == ["80 tokens, every 16", "30.0 (20–40)", "-50.0 (-73.0 to +18.9), n 6"]
    assert ours.split(" | ")[5:] == ["50.0", "1.50", "25.0", "0.0", "3.0", "1.0", "2.0 to 4.0", "eager |"]
    found = [line for line in text.splitlines() if "2512.12008" in line or "2510.00231" in line]
    assert len(found) == 2 and all(line.endswith("| holds |") for line in found)
    assert kvbench("results", "answers", packed, "--output", output)[0] == 0
    assert "No results are committed yet" in output.read_text()
    assert kvbench("results", "answers", tmp_path / "none", "--output", output)[0] == 2


def test_packed_long_answers_keep_their_times_and_tokens_held_by_eighths():
    row = {"id": "a", "score": 1.0, "reused_tokens": 0, "prefill_s": 1, "index_s": 0, "bytes": {}}
    found = packed_row(row | {"step_s": [n / 8 for n in range(64)], "held_tokens": list(range(63))})
    assert found["step_s_parts"] == [pytest.approx(n + 7 / 16, rel=1e-4) for n in range(8)]
    assert "held_parts" not in found
