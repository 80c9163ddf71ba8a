"""`kvbench.run`, `kvbench.sweep` and `session.summary()` as Python's callers and notebooks meet them."""

import json
import subprocess
import sys

import pytest
import yaml
from language import save_model
from tiny import tiny_model, tokens

import kvbench as kv
from kvbench.api.table import Column, Table

SMALL = {"context_length": 400, "examples": 2, "ratio": 0.4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def results(folder, output):
    return kv.run(["quest", "streaming_llm"], model=folder, options={"page_size": 8}, output=output, **SMALL)


def small(folder, output):
    return ("--model", folder, "--context-length", 400, "--examples", 2, "--ratio", 0.4, "--output", output)


def test_python_and_the_command_give_the_same_runs_and_the_same_table(kvbench, folder, output, results):
    code, out, _ = kvbench("run", "--policy", "quest,streaming_llm", *small(folder, output), "-o", "page_size=8")
    assert code == 0
    assert [line.rstrip() for line in str(results.table()).splitlines()] == [
        line.rstrip() for line in out.splitlines()[: len(str(results.table()).splitlines())]
    ]
    code, out, _ = kvbench("run", "--policy", "quest,streaming_llm", *small(folder, output), "-o", "page_size=8",
                           "--json")  # fmt: skip
    assert json.loads(out) == json.loads(json.dumps(results.document()))


def test_results_are_found_by_policy_with_their_examples(results):
    assert [run.policy for run in results] == ["quest", "streaming_llm", "full"]
    quest = results["quest"]
    assert quest.config["policy_options"]["page_size"] == 8
    assert quest.accuracy == quest.metrics["accuracy"]["mean"]
    assert len(quest.examples()) == 2
    assert results[0] == quest
    with pytest.raises(kv.KVBenchError, match="no run of policy 'h2o': there are quest, streaming_llm, full"):
        results["h2o"]


def test_pandas_gets_a_row_for_each_run_or_one_sentence_says_what_is_missing(results, monkeypatch):
    frame = pytest.importorskip("pandas").DataFrame
    found = results.to_pandas()
    assert isinstance(found, frame)
    assert list(found["policy"]) == ["quest", "streaming_llm", "full"]
    assert list(found["accuracy_mean"]) == [run.accuracy for run in results]
    assert found["bytes_resident"][2] == results["full"].metrics["bytes"]["resident"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(kv.KVBenchError, match=r"pandas is not installed.*pip install pandas"):
        results.to_pandas()


def test_notebooks_get_tables_in_which_every_text_is_escaped(results):
    shown = results._repr_html_()
    assert all(text in shown for text in ("<table>", "recall@k", "streaming_llm", str(results["quest"].folder)))
    table = Table("<i>t</i>", [Column("<b>h</b>")], [["<script>alert(1)</script>"]])._repr_html_()
    assert "&lt;script&gt;" in table and "&lt;b&gt;" in table and "&lt;i&gt;" in table
    assert "<script" not in table and "<b>" not in table and "<i>" not in table


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (("--policy", "qest"), {"policy": "qest"}),
        (("--policy", ""), {"policy": ""}),
        (("--policy", "quest", "--tokens", 0), {"tokens": 0, "ratio": None}),
        (("--policy", "quest", "--tokens", 5), {"tokens": 5, "ratio": None}),
        (("--policy", "quest", "--bytes", "5 parsecs"), {"bytes": "5 parsecs", "ratio": None}),
        (("--policy", "quest", "--budget", "pyramid:0"), {"budget": "pyramid:0", "ratio": None}),
        (("--policy", "quest", "--task", "niah"), {"task": "niah"}),
        (("--policy", "quest", "-o", "page_size=large"), {"options": {"page_size": "large"}}),
        (("--policy", "quest", "--question", "maybe"), {"question": "maybe"}),
        (("--policy", "quest", "--decoding", "fast"), {"decoding": "fast"}),
        (("--policy", "quest", "--examples", 0), {"examples": 0}),
        (("--policy", "quest", "--context-length", 5000), {"context_length": 5000}),
    ],
)
def test_bad_input_has_the_same_sentence_in_python_and_on_the_command_line(
    kvbench, folder, tmp_path, arguments, given
):  # fmt: skip
    code, _, told = kvbench("run", "--model", folder, "--output", tmp_path, *arguments)
    given = {"policy": "quest", "model": folder, "output": tmp_path, **given}
    with pytest.raises(kv.KVBenchError) as raised:
        kv.run(**given)
    assert (code, told.strip()) == (2, f"Error: {raised.value}")
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_fails_is_told_and_leaves_the_others(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("kvbench.strategies.evicting.snapkv.window_attention", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match=r"Failed: snapkv: .*failed in prefill"):
        found = kv.run("snapkv", model=folder, output=tmp_path, **SMALL)
    assert [run.policy for run in found] == ["full"]
    assert "failed in prefill" in found.failures["snapkv"]
    assert "failed in prefill" in found._repr_html_()
    with pytest.raises(kv.KVBenchError, match="1 of 2 policies failed"):
        found.require()


def test_a_sweep_is_a_mapping_or_its_file(folder, output, tmp_path, results):
    grid = {
        "models": [str(folder)], "policies": [{"name": "quest", "options": {"page_size": 8}}], "examples": 2,
        "context_lengths": [400], "budgets": [{"ratio": 0.4}],
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    planned = kv.sweep(grid, output=output, dry_run=True)
    assert planned.planned == kv.sweep(tmp_path / "grid.yaml", output=output, dry_run=True).planned
    assert "1 runs of 2 examples; nothing was run." in str(planned.table())
    found = kv.sweep(grid, output=output)
    assert found[0].folder == results["quest"].folder
    assert "quest" in found._repr_html_()
    wrong = {**grid, "policies": ["qest"], "budgets": [{"ratio": 3}]}
    with pytest.raises(kv.KVBenchError) as raised:
        kv.sweep(wrong)
    assert str(raised.value).startswith("The sweep has 1 problem, and nothing was run:\n  budgets[0].ratio: ")


def test_public_names_complete_and_importing_the_package_stays_cheap():
    code = (
        "import sys, kvbench; assert {'run', 'sweep', 'index', 'attach'} <= set(dir(kvbench));"
        "kvbench.run, kvbench.sweep, kvbench.index;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'rich', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert sorted(kv._HOMES) == sorted(set(kv.__all__) - {"KVBenchError", "hookimpl"})
    assert all(getattr(kv, name) is not None for name in kv.__all__)


@pytest.mark.parametrize("policy", ["full", "quest", "snapkv"])
def test_a_summary_says_what_the_probes_measure(policy):
    """The latest step's density, which needs no probe, is what the density probe finds in a generation of one step."""
    model, found = tiny_model(), []
    for probes in ((), ("density", "recall")):
        with kv.attach(model, policy=policy, budget=80, probes=probes) as session:
            assert session.summary().tokens == {"prompt": 0, "generated": 0}
            model.generate(tokens(1, 200), max_new_tokens=2, do_sample=False)
        found.append(session.summary())
    plain, probed = found
    assert plain.tokens == {"prompt": 200, "generated": 1}
    assert plain.bytes == session.cache.bytes()
    assert plain.density == pytest.approx(probed.density) == probed.probes["density"]
    assert plain.attended_tokens == pytest.approx(probed.attended_tokens)
    assert plain.recall_at_k is None and 0 < probed.recall_at_k <= 1
    assert "not probed" in str(plain) and "<td" in probed._repr_html_()
