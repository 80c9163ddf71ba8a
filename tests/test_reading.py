"""Foreign data of every kind is read or refused in one sentence, and one bad run never hides the others."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as write_tensors
from test_compare import store

from kvbench import KVBenchError
from kvbench.compare import leaderboard as board
from kvbench.compare.comparison import compare
from kvbench.contract.reading import DEPTH, parse_json, plain, read_bytes, reading, shown
from kvbench.report import charts, page
from kvbench.report.collect import collect
from kvbench.runs.results import finished_rows, read
from kvbench.runs.traces import read_trace

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12,
)  # fmt: skip


@given(JSON)
def test_what_json_holds_is_read_as_json_reads_it(value):
    text = json.dumps(value)
    assert parse_json(text) == parse_json(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('"\\ud800"', r"half of a surrogate pair, \\ud800, at character 0"),
        ('{"a\\udfff": 1}', "half of a surrogate pair"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "nested too deeply"),
        ("[" * 10**5, "nested too deeply"),
        ("NaN", "NaN"), ("[-Infinity]", "-Infinity"), ("1e999", "too large"), (str(2**64), "more than 64 bits"),
        ("9" * 5000, "digits"), ("", "Expecting value"), ("{", "Expecting"), (b"\xff\xfe", "not UTF-8"),
        (b"\x00" * 9, "Expecting value"),
    ],
)  # fmt: skip
def test_what_json_cannot_hold_is_one_reason(text, told):
    with (
        pytest.raises(KVBenchError, match=rf"^it is bad: [^\n]*{told}[^\n]*\.$"),
        reading(lambda r: f"it is bad: {r}."),
    ):
        parse_json(text)
    if told not in ("NaN", "-Infinity", "too large", "more than 64 bits"):
        with pytest.raises((ValueError, RecursionError)):
            parse_json(text, ours=False)


@given(st.text() | st.binary().map(os.fsdecode))
def test_foreign_text_in_a_sentence_is_one_printable_line(text):
    line = plain(text)
    assert line.isprintable() and len(line) <= 301
    assert shown(Path("a") / line.replace("\0", "")).encode()


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "loop", "missing", "."):
        with pytest.raises(OSError):
            read_bytes(tmp_path / name)


@pytest.mark.parametrize("command", [("leaderboard",), ("report",), ("verify",), ("compare", "x" * 5000)])
def test_a_path_longer_than_the_system_allows_is_told(kvbench, command):
    code, _, err = kvbench(*command, "x" * 5000)
    assert code == 2 and "(File name too long)" in err and "Traceback" not in err


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    store(root, [1] * 4, policy="full", budget=None)
    store(root, [1, 0, 0, 0], policy="quest")
    store(root, [1, 1, 0, 0], policy="snapkv")
    return root


@pytest.fixture
def root(stored, tmp_path):
    return Path(shutil.copytree(stored, tmp_path / "runs"))


def of(root, policy):
    return next(root.glob(f"{policy}-*"))


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def first_line(file, **changes):
    lines = file.read_text().split("\n")[:-1]
    file.write_text("".join(line + "\n" for line in [json.dumps({**json.loads(lines[0]), **changes}), *lines[1:]]))


def be(file, kind):
    file.unlink(missing_ok=True)
    {"folder": file.mkdir, "loop": lambda: file.symlink_to(file.name), "pipe": lambda: os.mkfifo(file)}[kind]()


def config(**changes):
    return lambda run: edit(run / "run.json", lambda content: content["config"].update(changes))


def metrics(**changes):
    return lambda run: edit(run / "run.json", lambda content: content["metrics"].update(changes))


def field(**changes):
    return lambda run: edit(run / "run.json", lambda content: content.update(changes))


def row(**changes):
    return lambda run: first_line(run / "examples.jsonl", **changes)


def timing(**changes):
    return lambda run: first_line(run / "timings.jsonl", **changes)


def text(name, content):
    return lambda run: (run / name).write_bytes(content)


def kind(name, what):
    return lambda run: be(run / name, what)


RUN_DAMAGES = {
    "empty": text("run.json", b""), "deep": text("run.json", b"[" * 10**5), "binary": text("run.json", b"\xff\xfe\0"),
    "list": text("run.json", b"[]"), "nan": text("run.json", b'{"schema": NaN}'), "pipe": kind("run.json", "pipe"),
    "schema": field(schema=[2]), "huge schema": field(schema="x" * 10**5), "status": field(status="done"),
    "environment": field(environment=[]), "packages": field(environment={"packages": {"torch": 2}}),
    "metrics": field(metrics="good"), "no metrics": field(metrics={}), "accuracy": metrics(accuracy=1),
    "mean": metrics(accuracy={"mean": "1", "ci95": [0, 1], "n": 4}), "n": metrics(accuracy={"mean": 1, "ci95": [0, 1]}),
    "interval": metrics(accuracy={"mean": 1, "ci95": [0], "n": 4}), "recall": metrics(recall_at_k="high"),
    "length": config(context_length=-5), "long": config(context_length=10**30), "examples": config(examples=0),
    "policy": config(policy=7), "surrogate": config(policy="\ud800"), "options": config(policy_options=[]),
    "budget": config(budget={"ratio": 2}), "no size": config(budget={"allocator": "uniform"}),
    "more": config(more=1), "deep options": config(policy_options={"a": json.loads("[" * 900 + "]" * 900)}),
}  # fmt: skip
ROW_DAMAGES = {
    "folder": kind("examples.jsonl", "folder"), "loop": kind("examples.jsonl", "loop"),
    "row pipe": kind("timings.jsonl", "pipe"), "row deep": text("examples.jsonl", b"[" * 10**5 + b"\n{}\n"),
    "score": row(score="1"), "score nan": row(score=None), "score bool": row(score=True), "id": row(id=7),
    "id list": row(id=["a"]), "row surrogate": row(prediction="\udfff"),
    "infinite": text("examples.jsonl", b'{"id":1e999}\n\n'),
    "bytes": row(bytes=[]), "probes": timing(probes={"density": "x"}), "references": row(references=3),
    "trace": row(trace="../../../etc/passwd"), "trace type": row(trace=3),
    "steps": timing(step_s=["a"]), "prefill": timing(prefill_s={}), "peak": timing(peak_memory_bytes="much"),
}  # fmt: skip


@pytest.mark.parametrize("damage", [*RUN_DAMAGES, *ROW_DAMAGES])
def test_one_bad_run_is_named_and_the_others_are_shown(root, damage):
    bad = of(root, "quest")
    {**RUN_DAMAGES, **ROW_DAMAGES}[damage](bad)
    found, skipped = board.query(root)
    assert len(found.fetchall()) == (2 if damage in RUN_DAMAGES else 3)
    (comparison,), left_out = compare(of(root, "full"), [root])
    assert comparison.candidate.startswith("snapkv")
    shown_runs = collect([root])
    assert sorted(run.policy for run in shown_runs.runs) == ["full", "snapkv"]
    for sentences in ([skipped] if damage in RUN_DAMAGES else []) + [left_out, shown_runs.problems]:
        (sentence,) = sentences
        assert "quest-" in sentence and "\n" not in sentence and len(sentence) < 1000, sentence


def test_commands_name_the_bad_run_and_show_the_others(kvbench, root, tmp_path):
    RUN_DAMAGES["deep"](of(root, "quest"))
    for arguments, others in (
        (("leaderboard", root), "snapkv"), (("compare", of(root, "full"), root), "snapkv"),
        (("report", root, "--format", "md", "--output", tmp_path / "out"), "2 runs"),
    ):  # fmt: skip
        code, out, err = kvbench(*arguments)
        assert code == 0 and others in out, err
        assert "Warning: " in err and "quest-" in err and "nested too deeply" in err and "Traceback" not in err
    RUN_DAMAGES["deep"](of(root, "full"))
    code, _, err = kvbench("compare", of(root, "full"), root)
    assert code == 2 and "has no finished run that can be read" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "name", ["a*", "a?", "a[b]", "a[!b]*", "{a,b}", "[red]x[/red]", "[/x]", ":smile:", b"\xff\xfe", "a'b;--"]
)
def test_a_folder_of_any_name_is_read_itself_and_no_other(kvbench, tmp_path, name):
    store(tmp_path / "ab", [0] * 4, policy="knorm")
    folder = tmp_path / os.fsdecode(name)
    full = store(folder, [1] * 4, policy="full", budget=None)
    store(folder, [1, 0, 0, 0], policy="quest")
    code, out, err = kvbench("leaderboard", folder, "--columns", "policy,folder")
    assert code == 0 and "2 runs" in out and "knorm" not in out, err
    assert name in out if isinstance(name, str) else "\\xff\\xfe" in out
    code, out, err = kvbench("leaderboard", folder, "--json", "--export", tmp_path / "out.md")
    assert [entry["policy"] for entry in json.loads(out)["rows"]] == ["full", "quest"]
    assert "quest" in (tmp_path / "out.md").read_text()
    assert kvbench("compare", full, folder)[0] == 0
    if name in ("a*", "[/x]", b"\xff\xfe"):  # of each kind one: patterns, markup, bytes
        code, out, err = kvbench("report", folder, "--format", "md,html", "--output", tmp_path / "out")
        assert code == 0 and "2 runs" in out, err


def test_names_with_brackets_and_colons_are_shown_as_they_are(kvbench, tmp_path):
    store(tmp_path, [1] * 4, model="[/bold] :smile: [red]m", policy="full", budget=None)
    code, out, _ = kvbench("leaderboard", tmp_path, "--columns", "model")
    assert code == 0 and "[/bold] :smile: [red]m" in out
    code, out, _ = kvbench("leaderboard", tmp_path, "--columns", "policy")
    assert code == 0 and "[/bold] :smile: [red]m" in out


quick = settings(
    max_examples=80, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
JUNK = st.sampled_from(
    [None, True, -1, 0, 10**30, -(2**70), 1e308, -1.5, "", "$x^", "[/a]", "\ud800", "\x1b[2J\n", [], [[]], {}, {"a": 1}]
)  # fmt: skip


def places(value, path=()):
    """Every place in a JSON document."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def damaged(data, content):
    """The document with a value replaced, taken out or doubled somewhere."""
    path = data.draw(st.sampled_from([place for place in places(content) if place]))
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    match data.draw(st.sampled_from(["junk", "junk", "drop", "wrap", "add"])):
        case "junk":
            holder[path[-1]] = data.draw(JUNK)
        case "drop":
            del holder[path[-1]]
        case "wrap":
            holder[path[-1]] = [holder[path[-1]]]
        case _ if isinstance(holder, dict):
            holder["[b]$\\frac$"] = data.draw(JUNK)
    return content


@quick
@given(st.data())
def test_any_change_of_a_runs_files_is_shown_or_named(stored, tmp_path_factory, data):
    root = shutil.copytree(stored, tmp_path_factory.mktemp("fuzz") / "runs")
    bad = of(root, "quest")
    name = data.draw(st.sampled_from(["run.json", "run.json", "examples.jsonl", "timings.jsonl"]))
    lines = (bad / name).read_text().split("\n")[:-1] if name.endswith("l") else [(bad / name).read_text()]
    lines[0] = json.dumps(damaged(data, json.loads(lines[0])))
    content = "\n".join(lines).encode() + b"\n"
    if data.draw(st.integers(0, 5)) == 0:
        place = data.draw(st.integers(0, len(content) - 1))
        content = content[:place] + data.draw(st.binary(max_size=3)) + content[place + data.draw(st.integers(0, 3)) :]
    (bad / name).write_bytes(content)
    found, _ = board.query(root, columns=list(board.COLUMNS))
    assert len(found.fetchall()) >= 2
    differences, _ = compare(of(root, "full"), [root])
    assert any(one.candidate.startswith("snapkv") for one in differences)
    collected = collect([root])
    assert len(collected.runs) + len(collected.problems) == 3
    composed = page.compose(collected, charts.charts(collected), "kvbench report")
    assert page.markdown(composed) and page.table(page.board_rows(collected))
    for problem in collected.problems:
        assert "\n" not in problem


# -- analyses and traces -----------------------------------------------------------------------------------------------


OOD_ROW = {"layer": 1, "head": 0, "dimension": 4, "keys_median": 2.0, "queries_median": 3.0,
           "decode_to_keys_median": 3.0, "missing": ""}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"rows": 3}, {"rows": [3]}, {"rows": [{**OOD_ROW, "layer": "x"}]}, {"rows": [{**OOD_ROW, "keys_median": None}]},
     {"source": []}, {"summary": [[]]}, {"partial": [3]}, {"rows": [{"layer": 1}]}],
)  # fmt: skip
def test_a_damaged_analysis_is_named_and_the_runs_are_shown(root, change):
    (root / "analysis").mkdir()
    document = {"schema": 1, "analysis": "ood", "rows": [OOD_ROW], "source": {}, "options": {}}
    (root / "analysis" / "ood.json").write_text(json.dumps(document))
    assert len(collect([root]).analyses) == 1
    (root / "analysis" / "ood.json").write_text(json.dumps({**document, **change}))
    found = collect([root])
    assert len(found.runs) == 3 and not found.analyses
    assert "ood.json is no analysis that can be read" in found.problems[0]
    (root / "analysis" / "ood.json").write_text(json.dumps(document))
    (root / "analysis" / "ood.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "ood.json is no analysis" in collect([root]).problems[0]


def trace_file(**changes):
    tensors = {
        "position": np.arange(3, dtype=np.int32), "layer": np.arange(2, dtype=np.int32),
        "column.recall": np.ones((3, 2, 4), np.float32),
    }  # fmt: skip
    return write_tensors({**tensors, **changes}, {"trace": '{"schema": "1", "example": "e", "prompt_tokens": 9}'})


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 7, struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 10**9) + b"{}", trace_file()[:-5],
        trace_file() + b"more", trace_file(position=np.zeros((3, 1), np.int32)), trace_file(position=np.zeros(3)),
        trace_file(layer=np.zeros(3, np.int32)), write_tensors({}, {"trace": "[" * 5000}),
        write_tensors({}, {"trace": "[]"}),
        trace_file(**{"column.recall": np.zeros((3, 2), np.float32)}), write_tensors({}, {"schema": "1"}),
        trace_file(**{"column.recall": np.zeros((3, 2, 4))}), trace_file(layer=-np.ones(2, np.int32)),
    ],
)  # fmt: skip
def test_a_damaged_trace_is_one_sentence(tmp_path, content):
    file = tmp_path / "trace.safetensors"
    file.write_bytes(trace_file())
    assert read_trace(file).columns["recall"].shape == (3, 2, 4)
    file.write_bytes(content)
    with pytest.raises(KVBenchError, match=r"^\S*trace\.safetensors [^\n]*$"):
        read_trace(file)


def test_a_written_run_is_what_readers_expect(stored):
    for folder in stored.iterdir():
        assert read(folder)["status"] == "complete" and len(finished_rows(folder)) == 4
