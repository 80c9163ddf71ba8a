"""Saved indexes that are damaged, crafted or cannot be written: refused in one sentence, or as good as valid ones."""

import copy
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file
from test_indexes import NAMES, by_name, make, split, vectors

from kvbench.contract.errors import KVBenchError
from kvbench.contract.extension import LARGEST

GRAPHS = ("vamana", "robust_vamana", "cagra", "roargraph")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved index of every kind."""
    folder = tmp_path_factory.mktemp("saved")
    for name in NAMES:
        index = make(name, sq8=True) if name == "vamana" else make(name)
        index.build(vectors(24, 2, 60), vectors(25, 4, 40))
        index.save(folder / name)
    return folder


def fuzz(folder, examples, names, **environment):
    script = Path(__file__).with_name("index_fuzz.py")
    done = subprocess.run(
        [sys.executable, script, folder, str(examples), *names], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_damaged_files_are_refused_or_work(folder):
    fuzz(folder, 200, [name for name in NAMES if name not in GRAPHS])


def test_damaged_graphs_are_refused_or_stay_within_their_arrays(folder, tmp_path):
    # A cache of its own: numba's does not tell code with checks from code without.
    fuzz(folder, 200, GRAPHS, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))


def crafted(folder, name, path, **changes):
    """The saved index with some tensors replaced; each change is a function of the tensor."""
    header, _ = split((folder / name).read_bytes())
    tensors = load_file(folder / name)
    for tensor, change in changes.items():
        tensors[f"index.{tensor}"] = np.ascontiguousarray(change(tensors[f"index.{tensor}"]))
    save_file(tensors, path, metadata=header["__metadata__"])
    return path


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("roargraph", {"queries": lambda a: a[:, :0], "knn": lambda a: a[:, :0]}),
        ("roargraph", {"queries": lambda a: a * np.float32(np.nan)}),
        ("roargraph", {"knn": lambda a: np.full_like(a, -1)}),
        ("roargraph", {"knn": lambda a: a[:, :, ::-1]}),
        ("roargraph", {"knn": lambda a: np.where(a < 0, a, 0)}),
        ("roargraph", {"entries": lambda a: a[:, :0]}),
        ("vamana", {"entries": lambda a: a * 0 - 1}),
        ("vamana", {"scale": lambda a: a * 0}),
        ("vamana", {"low": lambda a: a * np.float32(np.inf)}),
        ("ivf", {"centroids": lambda a: a * np.float32(np.nan)}),
        ("ivf", {"centroids": lambda a: a[:, :0]}),
        ("ivfpq", {"centroids": lambda a: a * np.float32(np.nan)}),
        ("ivfpq", {"codebooks": lambda a: a + np.float32(3e38)}),
        ("sq8", {"scales": lambda a: a * np.float32(np.nan)}),
        ("hnsw", {"levels": lambda a: a * 0}),
    ],
)
def test_what_compiled_code_relies_on_is_checked(folder, tmp_path, name, changes):
    path = crafted(folder, name, tmp_path / "crafted", **changes)
    with pytest.raises(KVBenchError, match=rf"crafted is damaged: .*\(({next(iter(changes))}|knn|assigned)\)\.$"):
        by_name[name].load(path)


@pytest.mark.parametrize("content", ["[" * 5000, '{"name": "flat"}', '{"heads": NaN}', "7", '{"name": "\\ud800"}'])
def test_metadata_of_any_kind_is_one_sentence(tmp_path, content):
    path = tmp_path / "odd"
    save_file({"keys": vectors(1, 1, 2)}, path, metadata={"format": "kvbench-index", "version": "1", "index": content})
    with pytest.raises(KVBenchError, match=r"^\S*odd cannot be read as a kvbench index: [^\n]*\.$"):
        by_name["flat"].load(path)


def test_pipes_folders_and_loops_of_links_are_no_indexes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", "missing", ""):
        with pytest.raises(KVBenchError, match="cannot be read as a kvbench index"):
            by_name["flat"].load(tmp_path / name)


@pytest.mark.parametrize("name", ["ivf", "ivfpq", "hnsw"])
def test_keys_whose_squares_overflow_are_refused(name):
    # faiss ends the process on them.
    with pytest.raises(KVBenchError, match=r"key 0 of head 0 .* beyond 1e\+15"):
        make(name).build(vectors(3, 2, 60, scale=1e30))
    index = make(name)
    index.build(vectors(3, 2, 60, scale=1e13))
    assert (index.search(vectors(4, 2, 3, scale=1e13), 3).ids >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_efforts_and_candidate_lists_near_2_to_the_31_are_capped_at_the_keys(name):
    cls = by_name[name]
    given = {"starts", "entries", "eager", "neighbors", "lists", "construction_ef", cls.search_parameter}
    options = dict.fromkeys(given & set(cls.Options.model_fields), LARGEST)
    for option in options:  # one more is refused
        with pytest.raises(ValidationError, match=f"{option} is beyond {LARGEST}"):
            make(name, **{**options, option: LARGEST + 1})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = make(name, **options)
    keys, queries = vectors(5, 2, 70), vectors(6, 4, 40)
    index.build(keys, queries)
    index.insert(vectors(7, 2, 3))
    for effort in (LARGEST, LARGEST + 1):
        index.search(queries, 3, effort=effort)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB; compiling takes some


@pytest.mark.parametrize("seed", [-1, 2**31, 10**30])
def test_seeds_that_faiss_cannot_take_are_refused(seed):
    with pytest.raises(KVBenchError, match="seed"):
        make("ivf", seed=seed)


def child(work):
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_saving_on_a_full_disk_is_one_sentence_and_leaves_the_old_file(folder, tmp_path):
    index = by_name["flat"].load(folder / "flat")
    path = tmp_path / "index"
    index.save(path)
    before = path.read_bytes()

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(KVBenchError, match=r"cannot be written to .*index \(.*\): free some space"):
            index.save(path)

    assert child(full) == 0
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KVBenchError, match="cannot be written"):
        index.save(tmp_path / "missing" / "index")


@pytest.mark.parametrize("inserted", [0, 5])
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_index_grows_as_the_saved_one_does(name, inserted, tmp_path):
    live = make(name)
    live.build(vectors(5, 2, 300), vectors(6, 4, 200))
    if inserted:
        live.insert(vectors(7, 2, inserted))
    live.save(tmp_path / "index")
    loaded = by_name[name].load(tmp_path / "index")
    restored = by_name[name].restored(copy.deepcopy(live.saved()))
    assert loaded.nbytes == live.nbytes == restored.nbytes
    for seed, count in enumerate((1, 40, 90)):
        for index in (live, loaded, restored):
            index.insert(vectors(8 + seed, 2, count))
    queries = vectors(9, 4, 20)
    expected, state = live.search(queries, 10), live._state()
    for index in (loaded, restored):
        for ours, theirs in zip(index.search(queries, 10), expected, strict=True):
            assert np.array_equal(ours, theirs)
        assert {part: array.tobytes() for part, array in index._state().items()} == {
            part: array.tobytes() for part, array in state.items()
        }
