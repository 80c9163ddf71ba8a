"""The index benchmark measures what it says, against exact search written here in float64."""

import csv
import json

import numpy as np
import pytest
import torch
from test_capture import TEXT, Letters
from tiny import tiny_model
from typer.testing import CliRunner

from kvbench.analysis.index_benchmark import (
    COLUMNS,
    IndexBenchmark,
    check_benchmark,
    exact_top_k,
    load_vectors,
    recall_at_k,
    run,
)
from kvbench.analysis.index_results import Point, at_recall, curves, document, folder_name, write
from kvbench.capture.record import capture, plan_capture
from kvbench.contract.errors import KVBenchError
from kvbench.models import LoadedModel


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    loaded = LoadedModel(tiny_model(), Letters(), "tiny", "test", torch.device("cpu"), torch.float32, 4096)
    config = plan_capture(loaded, TEXT, context_length=420, decode_tokens=20, layers="0,2")
    return capture(config, loaded, TEXT, tmp_path_factory.mktemp("captures") / "c")


SMALL = IndexBenchmark(("flat", "ivf"), k=10, efforts={"ivf": (1, 3, 1000, 2000)}, passes=1)


@pytest.fixture(scope="module")
def rows(captured):
    return run(captured, SMALL)


def test_rows_have_the_promised_columns_for_every_layer_head_and_effort(rows):
    assert all(tuple(row) == COLUMNS for row in rows)
    flat = [row for row in rows if row["index"] == "flat"]
    assert [(row["layer"], row["head"]) for row in flat] == [(layer, head) for layer in (0, 2) for head in range(6)]
    assert all(row["recall"] == 1 and row["scanned"] == 1 for row in flat)
    assert all((row["n_keys"], row["n_queries"], row["k"]) == (400 - 68, 20, 10) for row in rows)
    # 2000 probes find what 1000 found, so they are no new point.
    assert {row["params"]["nprobe"] for row in rows if row["index"] == "ivf"} == {1, 3, 1000}
    assert all(row["us_per_query"] > 0 and row["build_s"] >= 0 and row["insert_s"] >= 0 for row in rows)


def test_the_whole_index_is_described(captured, rows):
    flat, ivf = ([row for row in rows if row["index"] == name] for name in ("flat", "ivf"))
    assert all(row["recall_grown"] == 1 for row in flat) and all(0 < row["recall_grown"] <= 1 for row in ivf)
    assert all(row["parallel_efficiency"] > 0 and row["unreached"] == 0 for row in rows)
    graph = run(captured, IndexBenchmark(("vamana",), k=10, layers=(2,), efforts={"vamana": (10,)}, passes=1,
                                        options={"vamana": {"degree": 1}}))  # fmt: skip
    assert 0 < graph[0]["unreached"] < 1


def test_recall_is_that_of_decoding_queries_against_float64_search(captured, rows):
    from kvbench.plugins import registry

    layer = captured.layer(2)
    keys = layer.prompt.keys[:, 4:-64].numpy()
    index = registry().make("index", "ivf", {})
    index.build(keys, heads=6)
    queries = layer.decode.queries.numpy()
    found = index.search(queries, 10, effort=3)
    for head in range(6):
        exact = np.argsort(-(queries[head].astype(np.float64) @ keys[head // 3].astype(np.float64).T))[:, :10]
        expected = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.ids[head], exact, strict=True)])
        row = next(
            r for r in rows
            if (r["index"], r["layer"], r["head"]) == ("ivf", 2, head) and r["params"]["nprobe"] == 3
        )  # fmt: skip
        assert row["recall"] == pytest.approx(expected)
        assert row["scanned"] == pytest.approx(found.evaluations[head].mean() / keys.shape[1])


def test_exact_search_and_recall_by_hand():
    keys = np.array([[1, 0], [0, 1], [2, 0], [0, -1]], np.float32)
    assert exact_top_k(np.array([[1, 0.1]], np.float32), keys, 3).tolist() == [[2, 0, 1]]
    assert recall_at_k(np.array([[2, -1, 3]]), np.array([[2, 0, 1]])) == pytest.approx(1 / 3)


def test_heads_read_the_keys_of_their_group(captured):
    layer = captured.layer(0)
    vectors = load_vectors(layer, IndexBenchmark(("flat",), heads=(3, 5)), 6, 2)
    assert np.array_equal(vectors.keys, layer.prompt.keys[1:2, 4:-64].numpy())
    assert np.array_equal(vectors.queries, layer.decode.queries[[3, 5]].numpy())
    assert np.array_equal(vectors.training, layer.prompt.queries[[3, 5]].numpy())
    row = run(captured, IndexBenchmark(("flat",), k=10, heads=(3, 5), layers=(0,), passes=1))[0]
    assert (row["head"], row["recall"]) == (3, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indexes": ()}, "No index"),
        ({"indexes": ("ifv",)}, "did you mean ivf"),
        ({"heads": (0, 1, 3)}, "unequal numbers"),
        ({"heads": (6,)}, "no head 6"),
        ({"layers": (1,)}, "has no layer 1"),
        ({"k": 400}, "does not fit the 332 keys"),
        ({"efforts": {"hnsw": (1,)}}, "not measured"),
        ({"efforts": {"ivf": (0,)}}, "effort 0"),
        ({"options": {"ivf": {"listz": 1}}}, "listz"),
    ],
)
def test_what_cannot_be_measured_is_refused(captured, changes, message):
    config = IndexBenchmark(**{"indexes": ("flat", "ivf"), "k": 10, **changes})
    with pytest.raises(KVBenchError, match=message):
        check_benchmark(captured, config)


def point(recall, scanned):
    return Point("x", 1, recall, None, scanned, None, scanned * 100, None)


def test_the_cost_of_a_recall_is_interpolated_only_between_measured_points():
    assert at_recall([point(0.9, 0.1), point(1.0, 0.2)], "scanned") == pytest.approx(0.15)
    assert at_recall([point(0.9, 0.1), point(1.0, 0.2)], "us_per_query") == pytest.approx(15)
    assert at_recall([point(0.5, 0.1), point(0.94, 0.2)], "scanned") is None
    assert at_recall([point(0.97, 0.1), point(1.0, 0.2)], "scanned") == 0.1
    assert at_recall([], "scanned") is None


def test_curves_average_layers_and_heads_with_intervals(rows):
    points = curves(rows)["ivf"]
    assert [p.effort for p in points] == [1, 3, 1000]
    first = [row["recall"] for row in rows if row["index"] == "ivf" and row["params"]["nprobe"] == 1]
    assert points[0].recall == pytest.approx(np.mean(first))
    low, high = points[0].recall_ci95
    assert low <= points[0].recall <= high


def test_results_are_written_as_json_tables_and_figures(captured, rows, tmp_path):
    content = document(captured, SMALL, rows)
    write(content, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"index.json", "rows.csv", "curves.csv", "curves.svg", "curves.png"}
    with (tmp_path / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert len(lines) == len(rows)
    assert json.loads((tmp_path / "index.json").read_text())["rows"] == json.loads(json.dumps(rows))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert folder_name(captured, SMALL) != folder_name(captured, IndexBenchmark(("flat",), k=10))


def test_the_command_prints_a_table_or_json(captured, tmp_path):
    from kvbench import cli

    arguments = ["index", "--indexes", "flat,ivf", "--capture", str(captured.path), "-k", "10", "--layers", "0"]
    arguments += ["--efforts", "ivf=1,4", "-o", "ivf.lists=8", "--heads", "0,3", "--output", str(tmp_path)]
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found["rows"][0]) == set(COLUMNS)
    assert {row["params"]["lists"] for row in found["rows"] if row["index"] == "ivf"} == {8}
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "flat: recall 0.95 at 100.0% scanned" in result.output
    for wrong in (["--efforts", "many"], ["-o", "lists=8"], ["--heads", "x"]):
        assert isinstance(CliRunner().invoke(cli.app, [*arguments, *wrong]).exception, KVBenchError)
