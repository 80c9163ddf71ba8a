"""Vectors go out and come in as vector search has them, with exact neighbours; a stopped benchmark goes on."""

import json
import sys

import numpy as np
import pytest
import torch
from test_capture import TEXT, Letters
from tiny import tiny_model

import kvbench as kv
from kvbench.analysis import index_benchmark
from kvbench.capture.datasets import load_dataset
from kvbench.capture.export import export, ground_truth
from kvbench.capture.record import capture, plan_capture
from kvbench.models import LoadedModel

h5py = pytest.importorskip("h5py")


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    loaded = LoadedModel(tiny_model(), Letters(), "tiny", "test", torch.device("cpu"), torch.float32, 4096)
    config = plan_capture(loaded, TEXT, context_length=420, decode_tokens=20, layers="0,2")
    return capture(config, loaded, TEXT, tmp_path_factory.mktemp("captures") / "c")


@pytest.fixture(scope="module")
def folder(captured, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    export(captured, folder, ["hdf5", "fvecs", "npy"], k=10, layers=[2], heads=[4])
    return folder


def exact(queries, keys, k):
    return np.argsort(-(queries.astype(np.float64) @ keys.astype(np.float64).T), axis=1)[:, :k]


def test_an_exported_file_has_the_layout_and_the_exact_neighbours(captured, folder):
    layer = captured.layer(2)
    with h5py.File(folder / "layer-002.head-04.hdf5") as file:
        assert file.attrs["distance"] == "ip" and file.attrs["dimension"] == 8
        train, test = file["train"][:], file["test"][:]
        assert np.array_equal(train, layer.prompt.keys[1, 4:-64].numpy())
        assert np.array_equal(test, layer.decode.queries[4].numpy())
        assert np.array_equal(file["learn"][:], layer.prompt.queries[4].numpy())
        assert np.array_equal(file["neighbors"][:], exact(test, train, 10))
        products = np.take_along_axis(test @ train.T, exact(test, train, 10), axis=1)
        np.testing.assert_allclose(file["distances"][:], -products, rtol=1e-5)


def test_fvecs_and_npy_hold_the_same(folder):
    def vecs(name, dtype):
        rows = np.fromfile(folder / f"layer-002.head-04.{name}", "<i4")
        rows = rows.reshape(-1, rows[0] + 1)
        assert (rows[:, 0] == rows.shape[1] - 1).all()
        return np.ascontiguousarray(rows[:, 1:]).view(dtype)

    for name in ("train", "test", "learn", "distances"):
        array = np.load(folder / f"layer-002.head-04.{name}.npy", allow_pickle=False)
        assert np.array_equal(vecs(f"{name}.fvecs", "<f4"), array)
    neighbors = np.load(folder / "layer-002.head-04.neighbors.npy", allow_pickle=False)
    assert np.array_equal(vecs("neighbors.ivecs", "<i4"), neighbors)


def test_a_data_set_is_measured_against_its_own_neighbours(folder, tmp_path):
    found = kv.index("flat,ivf,roargraph", dataset=folder / "layer-002.head-04.hdf5", k=10, efforts={"ivf": [1000]},
                     output=tmp_path)  # fmt: skip
    assert {row["index"]: row["recall"] for row in found.rows if row["index"] != "roargraph"} == {"flat": 1, "ivf": 1}
    (flat, *_) = found.rows
    assert (flat["n_keys"], flat["n_queries"], flat["insert_s"], flat["recall_grown"]) == (332, 20, None, None)
    assert flat["qps"] == pytest.approx(1e6 / flat["us_per_query"])
    assert flat["us_p50"] <= flat["us_p95"]
    assert found.content["dataset"]["name"] == "layer-002.head-04.hdf5"
    shown = found._repr_html_()
    assert all(text in shown for text in ("QPS", "queries per second", "layer-002.head-04.hdf5, 332 vectors"))
    pytest.importorskip("pandas")
    assert list(found.to_pandas()["qps"]) == [row["qps"] for row in found.rows]


def write(path, distance="ip", neighbors=None, **arrays):
    with h5py.File(path, "w") as file:
        file.attrs["distance"] = distance
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
        if neighbors is not None:
            file.create_dataset("neighbors", data=neighbors)
    return path


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_angular_vectors_are_normalised_and_queries_set_aside_are_not_searched(tmp_path):
    train, test = gaussian(0, 200, 8) * 5, gaussian(1, 40, 8)
    unit = train / np.linalg.norm(train, axis=1, keepdims=True)
    path = write(tmp_path / "a.hdf5", "angular", exact(test, unit, 10), train=train, test=test)
    data = load_dataset(path, learn=30)
    found = data.read(10)
    assert (data.queries, data.learnt) == (10, 30)
    np.testing.assert_allclose(np.linalg.norm(found.keys, axis=1), 1, rtol=1e-5)
    assert np.array_equal(found.neighbors, exact(test, unit, 10)[30:])
    assert kv.index("flat,roargraph", dataset=path, learn=30, k=10, output=tmp_path / "o").rows[0]["recall"] == 1


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda p: p.write_text("no HDF5"), {}, "cannot be read as HDF5"),
        (lambda p: write(p, train=gaussian(0, 9, 4)), {}, "layout .it lacks the data set test"),
        (lambda p: write(p, train=gaussian(0, 9, 4), test=gaussian(1, 5, 3)), {}, "different dimensions"),
        (lambda p: write(p, "euclidean", train=gaussian(0, 9, 4), test=gaussian(1, 5, 4)), {}, "'euclidean'.*inner"),
        (lambda p: write(p, train=gaussian(0, 90, 4), test=gaussian(1, 5, 4), neighbors=np.zeros((5, 3), int)), {},
         "not the nearest by inner product"),
        (lambda p: write(p, train=gaussian(0, 90, 4), test=gaussian(1, 5, 4), neighbors=np.full((5, 3), 99)), {},
         "no rows of train"),
        (lambda p: write(p, train=gaussian(0, 9, 4) * np.nan, test=gaussian(1, 5, 4)), {}, "NaN"),
        (lambda p: write(p, train=gaussian(0, 9, 4), test=gaussian(1, 5, 4)), {"learn": 5}, "--learn 5 leaves none"),
        (lambda p: write(p, train=gaussian(0, 9, 4), test=gaussian(1, 5, 4)), {"indexes": "roargraph"}, "--learn 1000"),
        (lambda p: write(p, train=gaussian(0, 9, 4), test=gaussian(1, 5, 4)), {"k": 10}, "k = 10 does not fit the 9"),
        (lambda p: write(p, train=gaussian(0, 9, 4), test=gaussian(1, 5, 4)), {"heads": [0]}, "no layers or heads"),
    ],
)  # fmt: skip
def test_what_is_no_such_data_set_is_refused_alike_by_both(kvbench, tmp_path, make, settings, message):
    make(tmp_path / "d.hdf5")
    given = {"indexes": "flat", "k": 3, "output": tmp_path / "o", **settings}
    with pytest.raises(kv.KVBenchError, match=message) as raised:
        kv.index(dataset=tmp_path / "d.hdf5", **given)
    options = []
    for name, value in given.items():
        options += [f"--{name}" if name != "k" else "-k", value[0] if isinstance(value, list) else value]
    code, _, told = kvbench("index", "--dataset", tmp_path / "d.hdf5", *options)
    assert (code, told.strip().splitlines()[-1]) == (2, f"Error: {raised.value}")


def test_without_h5py_one_sentence_says_so(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(kv.KVBenchError, match=r"h5py is not installed.*kvbench\[hdf5\]"):
        load_dataset(folder / "layer-002.head-04.hdf5")


def test_a_table_of_scores_is_cut_into_blocks(monkeypatch):
    keys, queries = gaussian(0, 300, 8), gaussian(1, 50, 8)
    monkeypatch.setattr(index_benchmark, "BLOCK_BYTES", 4 * 300 * 7)
    monkeypatch.setattr("kvbench.capture.export.BLOCK_BYTES", 8 * 300 * 7)
    assert np.array_equal(index_benchmark.exact_top_k(queries, keys, 5), exact(queries, keys, 5))
    assert np.array_equal(ground_truth(keys, queries, 5)[0], exact(queries, keys, 5))


def test_a_stopped_benchmark_goes_on_and_gives_the_same(captured, tmp_path, monkeypatch):
    settings = {"capture": captured, "k": 10, "efforts": [2], "layers": [0, 2]}
    measure, seen = index_benchmark._measure, []

    def stopped(name, vectors, *rest):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append((vectors.layer, name))
        return measure(name, vectors, *rest)

    monkeypatch.setattr(index_benchmark, "_measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        kv.index("flat,ivf", output=tmp_path / "a", **settings)
    (place,) = (tmp_path / "a").iterdir()
    kept = [json.loads(file.read_text())["rows"] for file in sorted((place / ".parts").iterdir())]
    (place / ".parts" / "002-00.json").write_text("half of a")  # a part that cannot be read is measured again
    seen[:] = ["room for three", "more"]
    with pytest.raises(KeyboardInterrupt):
        kv.index("flat,ivf", output=tmp_path / "a", **settings)
    assert seen[2:] == [(2, "flat")]
    monkeypatch.setattr(index_benchmark, "_measure", measure)
    found = kv.index("flat,ivf", output=tmp_path / "a", **settings)
    assert [row for row in found.rows if row["layer"] == 0] == kept[0] + kept[1]  # their times, too
    whole = kv.index("flat,ivf", output=tmp_path / "b", **settings)
    lasting = ("index", "params", "layer", "head", "recall", "scanned", "bytes", "recall_grown")
    assert [[row[name] for name in lasting] for row in found.rows] == [
        [row[name] for name in lasting] for row in whole.rows
    ]
    assert not (found.folder / ".parts").exists()
