"""Files that a user names: JSONL, archives, sweeps, profiles, captures. Each is read or refused in one sentence."""

import io
import itertools
import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_capture import loaded, make  # noqa: F401
from test_reading import damaged

from kvbench import KVBenchError
from kvbench.capture.files import load_capture
from kvbench.plugins import registry
from kvbench.runs.sweep_file import load as load_sweep
from kvbench.strategies.evicting.duo_attention import DuoAttention
from kvbench.tasks import files
from kvbench.tasks.files import FileOptions, load
from kvbench.tasks.jsonl import JsonLines

quick = settings(
    max_examples=200, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in itertools.pairwise("abcdefghi")
)


# -- a task's own lines ------------------------------------------------------------------------------------------------


def lines_of(file):
    task = JsonLines(JsonLines.Options(path=str(file)))
    return task.data()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"input": "a \\ud800", "outputs": ["b"]}', r"Line 1 of .* is not JSON \(a text has half of a surrogate"),
        (b'{"input": "a", "outputs": ["\\udfff"]}', "half of a surrogate pair"),
        (b"[" * 10**5, r"Line 1 of .* is not JSON \(it is nested too deeply\)"),
        (b'{"input": "a", "outputs": "b", "more": ' + b"[" * 500 + b"]" * 500 + b"}", "nested too deeply"),
        (b'{"input": "a", "outputs": [' + b"9" * 5000 + b"]}", "digits"), (b"\xff\xfe", "is not UTF-8"),
        (b'{"input": "a", "outputs": ["b"], "max_new_tokens": 1e400}', "max_new_tokens"), (b"", "holds no examples"),
        (b"\xef\xbb\xbf\r\n\r\n", "holds no examples"), (b"\0" * 20, "is not JSON"), (b"7", "is not an example"),
        (b'{"input": {"a": 1}, "outputs": ["b"]}', "input"), (b'{"input": "a", "outputs": [1]}', "outputs.0"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_told_before_anything_runs(tmp_path, content, told):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(content)
    with pytest.raises(KVBenchError, match=told) as error:
        lines_of(file)
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_windows_files_and_fields_of_other_programs_are_read(tmp_path):
    file = tmp_path / "mine.jsonl"
    line = '{"input": "Grüße", "outputs": ["b"], "loss": NaN, "id": 123456789012345678901234567890}'
    file.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\r\n".encode())
    assert lines_of(file)["haystack"] == "mine.jsonl"


def test_what_is_no_file_of_lines_is_one_sentence(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name in ("folder", "pipe", "loop", "missing"):
        with pytest.raises(KVBenchError, match="There is no file"):
            lines_of(tmp_path / f"{name}.jsonl")


# -- published files and archives --------------------------------------------------------------------------------------

ROWS = "".join(json.dumps({"context": "a word " * 9, "input": str(n)}) + "\n" for n in range(40))


@pytest.fixture(scope="module")
def archive():
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("data/qasper.jsonl", ROWS)
        opened.writestr("data/other.jsonl", ROWS)
    return target.getvalue()


def published(path):
    return load(FileOptions(path=str(path)), ("qasper.jsonl",), "LongBench's files")


@quick
@given(st.data())
def test_any_damage_of_an_archive_is_one_sentence(archive, tmp_path, data):
    content = bytearray(archive)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / f"{data.draw(st.integers(0, 2**60))}.zip"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        assert len(published(file).content) == 40
    except KVBenchError as error:
        assert "\n" not in str(error) and str(error).endswith(".")
    finally:
        file.unlink()


def test_kinds_of_archives_that_cannot_be_read_are_named(archive, tmp_path):
    file = tmp_path / "data.zip"
    method = archive.index(b"PK\x01\x02") + 10
    locked = archive.index(b"PK\x01\x02") + 8
    body = archive.index(b"data/qasper.jsonl") + 17
    for change, told in (
        ({method: 99, 8: 99}, "another kind"), ({locked: 1, 6: 1}, "encrypted|password"),
        ({body + 9: 255, body + 10: 255, body + 11: 255}, "damaged|CRC|invalid"), (None, "not a zip file"),
    ):  # fmt: skip
        content = bytearray(archive)
        for place, value in (change or {}).items():
            content[place] = value
        file.write_bytes(content if change else b"PK")
        for where in (file, tmp_path):
            with pytest.raises(
                KVBenchError, match=rf"data\.zip cannot be read \([^\n]*({told})[^\n]*\): fetch it again\.$"
            ):
                published(where)


def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(archive, tmp_path, monkeypatch):
    (tmp_path / "data.zip").write_bytes(archive)
    monkeypatch.setattr(files, "LARGEST", len(ROWS) - 1)
    with pytest.raises(KVBenchError, match=r"data\.zip cannot be read \(data/qasper\.jsonl unpacks to more than"):
        published(tmp_path)
    monkeypatch.setattr(files, "LARGEST", len(ROWS))
    assert len(published(tmp_path).content) == 40


@pytest.mark.parametrize("content", [b"[" * 10**5, b'{"a": "\\ud800"}', b"\xff", b'{"a":\n'])
def test_published_rows_of_any_kind_are_one_sentence(tmp_path, content):
    (tmp_path / "qasper.jsonl").write_bytes(content)
    with pytest.raises(KVBenchError, match=r"qasper\.jsonl cannot be read \([^\n]*\): fetch it again\.$"):
        published(tmp_path)


@pytest.mark.parametrize("task", ["longbench_qasper", "infinitebench_longbook_qa_eng", "infinitebench_math_calc"])
@quick
@given(data=st.data())
def test_any_change_of_a_published_row_is_one_sentence(tmp_path_factory, task, data):
    row = {
        "dataset": "qasper", "context": "a b c", "input": "q?", "answers": ["x"], "answer": ["1", "2"], "length": 3,
        "language": "en", "all_classes": None, "_id": "i", "id": 1, "options": ["a", "b", "c", "d"],
    }  # fmt: skip
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text(json.dumps(damaged(data, row)) + "\n")
    made = registry().make("task", task, {"path": str(file)})
    try:
        number, content = 0, made._load().content
        for example in made.build(content[number], "x"):
            assert isinstance(example.context, str)
    except KVBenchError as error:
        assert "\n" not in str(error)
    except Exception:  # what `examples` makes a sentence of; the next assertion sees that it does
        with pytest.raises(KVBenchError, match=r"Row 1 of [^\n]* is not as published"):
            list(made.examples(None, context_length=100, count=1, seed=0))


# -- sweeps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("policies: [full]\nseeds: [" + "9" * 5000 + "]\n", "cannot be read"),
        ("policies: [full]\nseeds: [" + "9" * 400 + "]\n", r"line 2, seeds\[0\]: this whole number has more"),
        ("policies: [full]\nseeds: [9999999999]\n", r"line 2, seeds\[0\]: 9999999999"),
        ("policies: [full]\ncontext_lengths: [99999999999]\n", r"context_lengths\[0\]"),
        ("policies: [{name: full, options: {a: .nan}}]\n", r"options.a: nan is no finite number"),
        ("policies: [{name: full, options: {a: !!binary aGk=}}]\n", "this is a bytes"),
        ("policies: [{name: full, options: {a: !!timestamp 2024-01-01}}]\n", "this is a date"),
        ("policies: [{name: full, options: {a: !!set {b, c}}}]\n", "this is a set"),
        ("policies: [{name: full, options: {1: b}}]\n", "the key 1 is no text"),
        ("policies: [full]\n? [a, b]\n: c\n", "is not YAML: found unhashable key"),
        ("policies: &a [*a]\n", r"policies\[0\]: this is an alias of what it stands in"),
        ("policies: " + "[" * 5000, "nested too deeply"),
        (LAUGHS, "more than 100000 values once its aliases are followed"),
        ("policies: !!python/object/apply:os.system [ls]\n", "is not YAML: could not determine a constructor"),
        ("policies: [full]\nseeds: [2024-99-99]\n", r"seeds\[0\]"), ("\0", "is not YAML"), ("", "is not a mapping"),
        ("- a\n", "is not a mapping"), ("policies: [\ud800]", "cannot be read"),
        ("policies: [full]\nbudgets: [{bytes: 1e400}]\n", "budgets"),
    ],
)  # fmt: skip
def test_a_malformed_sweep_is_told_by_line(tmp_path, text, told):
    file = tmp_path / "sweep.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(KVBenchError, match=told) as error:
        load_sweep(file)
    assert len(str(error.value)) < 2000


def test_dates_and_byte_order_marks_are_text(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_bytes(b"\xef\xbb\xbfpolicies: [{name: full, options: {day: 2024-01-01}}]\r\nseeds: [7]\r\n")
    sweep, _ = load_sweep(file)
    assert sweep.policies[0].options == {"day": "2024-01-01"} and sweep.seeds == [7]


def test_what_is_no_sweep_file_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "loop", "missing", "."):
        with pytest.raises(KVBenchError, match="cannot be read"):
            load_sweep(tmp_path / name)


@quick
@given(st.data())
def test_any_change_of_a_sweep_is_a_sweep_or_told(tmp_path, data):
    content = damaged(data, {
        "policies": ["full", {"name": "quest", "options": {"page_size": 16}}], "models": [{"name": "m", "dtype": None}],
        "budgets": [{"ratio": 0.1}, {"tokens": 5, "allocator": "ada"}], "tasks": ["vt"], "context_lengths": [512],
        "seeds": [1, 2], "examples": 3, "question": "aware", "probes": ["latency"], "batch_size": 1,
    })  # fmt: skip
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML
    try:
        load_sweep(file)
    except KVBenchError as error:
        assert str(file) in str(error)


# -- profiles and captures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 10**5, b"\xff", b"[]", b'{"rows": 3}', b'{"rows": [3]}', b'{"rows": []}', b'{"rows": [{"layer": 0}]}',
     *(b'{"rows": [{"layer": %b, "head": %b, "budget_share": %b}]}' % values for values in (
         (b"0", b"0", b"NaN"), (b"0", b"0", b"-1"), (b"1e999", b"0", b"1"), (b"0", b"3", b"1"), (b"true", b"0", b"1"),
         (b"0", b"0", b"1" + b"0" * 400)))],
)  # fmt: skip
def test_profiles_of_any_kind_are_one_sentence(tmp_path, content):
    file = tmp_path / "profile.json"
    file.write_bytes(content)
    with pytest.raises(KVBenchError, match=r"profile\.json is no sparsity profile \([^\n]*\): expected rows"):
        registry().make("budget", "profile", {"file": str(file)})

    class View:
        numbers, kv_heads, name = (0, 1), 2, "tiny"

    with pytest.raises(KVBenchError, match=r"profile\.json (is not readable|has the shape) [^\n]*\.$"):
        DuoAttention(DuoAttention.Options(profile=file)).begin(View())


@quick
@given(st.data())
def test_any_change_of_a_captures_manifest_is_refused_or_harmless(captured, tmp_path_factory, data):
    folder = Path(shutil.copytree(captured, tmp_path_factory.mktemp("captures") / "c"))
    file = folder / "manifest.json"
    file.write_text(json.dumps(damaged(data, json.loads(file.read_text()))))
    try:
        found = load_capture(folder)
        for number in found.layers:
            layer = found.layer(number)
            assert torch.isfinite(layer.prompt.keys).all() and layer.decode.queries.shape[2] == 8
        found.verify()
    except KVBenchError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def captured(loaded, tmp_path_factory):  # noqa: F811
    return make(loaded, tmp_path_factory.mktemp("capture") / "c").path


def test_vectors_that_are_not_finite_are_refused(captured, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(captured, tmp_path / "c"))
    file = folder / "layer-000.prompt.safetensors"
    tensors = load_file(file)
    tensors["keys"][0, 0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(KVBenchError, match="keys hold NaN or infinite values"):
        _ = load_capture(folder).layer(0).prompt.keys


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [2**31, -(2**31), 2**63, 10**30, float("inf"), float("-inf"), float("nan")])
def test_no_option_takes_numbers_that_compiled_code_cannot(value):
    for kind, classes in registry().classes.items():
        for name, cls in classes.items():
            for option in cls.Options.model_fields:
                try:
                    taken = getattr(registry().options(kind, name, {option: value}), option)
                except KVBenchError as error:
                    assert option in str(error) and "\n" not in str(error)
                else:
                    assert not isinstance(taken, int | float) or (isinstance(taken, float) and math.isfinite(taken))
