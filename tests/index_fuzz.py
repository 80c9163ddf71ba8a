"""Damages saved indexes in every way and uses what loads; run by test_index_files.py with numba's bounds checks on.

`python index_fuzz.py FOLDER EXAMPLES NAME...`: FOLDER holds a saved index of each name.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as read_tensors
from safetensors.numpy import save as write_tensors

from kvbench.contract.errors import KVBenchError
from kvbench.indexes import kvbench_indexes

CLASSES = {index.name: index for index in kvbench_indexes()}
JUNK = st.sampled_from(
    [None, True, -1, 0, 1, 2, 3, 61, 2**16, 2**31 - 1, 2**31, 2**63, 10**30, 1.5, 1e300, "", "4", [], [2], {"a": 1}]
)  # fmt: skip
WHOLE = st.sampled_from([-(2**31), -2, -1, 0, 1, 3, 58, 59, 60, 61, 255, 2**31 - 1])
REAL = st.sampled_from([float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e20, 1e-45, 0.0, -1.0, 5.0])
SIZE = st.sampled_from([0, 1, 2, 3, 4, 8, 59, 60, 61, 64, 256])
KIND = st.sampled_from(["value", "fill", "part", "shape", "type", "drop", "add", "swap", "about", "option"])
TYPES = st.sampled_from(["float32", "float64", "float16", "int8", "uint8", "int16", "int32", "int64", "uint64", "bool"])


def damage(data, about, tensors):
    """One random change, in place; the metadata's fields count as much as the tensors."""
    kind = data.draw(
        st.sampled_from(["value", "fill", "part", "shape", "type", "drop", "add", "swap", "about", "option"])
    )
    if kind == "about":
        about[data.draw(st.sampled_from(sorted(about)))] = data.draw(JUNK)
    elif kind == "option":
        options = about["options"]
        if isinstance(options, dict) and options:
            options[data.draw(st.sampled_from(sorted(options)))] = data.draw(JUNK)
    elif tensors:
        name = data.draw(st.sampled_from(sorted(tensors)))
        array = tensors[name]
        if kind in ("value", "fill", "part"):
            value = data.draw(REAL if array.dtype.kind == "f" else WHOLE)
            if array.dtype.kind != "f":
                low, high = (
                    (0, 1) if array.dtype.kind == "b" else (np.iinfo(array.dtype).min, np.iinfo(array.dtype).max)
                )
                value = min(max(value, int(low)), int(high))
            changed = array.copy()
            if kind == "fill":
                changed[...] = value
            elif changed.size:
                flat = changed.reshape(-1)
                place = data.draw(st.integers(0, flat.size - 1))
                flat[place : place + 1 if kind == "value" else None : data.draw(st.sampled_from([1, 2, 64]))] = value
            tensors[name] = changed
        elif kind == "shape":
            shape = list(array.shape)
            if shape and data.draw(st.booleans()):
                shape[data.draw(st.integers(0, len(shape) - 1))] = data.draw(SIZE)
            elif shape and data.draw(st.booleans()):
                shape.pop()
            else:
                shape.append(data.draw(SIZE))
            tensors[name] = np.resize(array, shape) if array.size else np.zeros(shape, array.dtype)
        elif kind == "type":
            with np.errstate(all="ignore"):
                tensors[name] = array.astype(data.draw(TYPES))
        elif kind == "drop":
            del tensors[name]
        elif kind == "add":
            tensors[data.draw(st.sampled_from(["waiting", "keys", "index.", "index.more", "more"]))] = array
        else:
            other = data.draw(st.sampled_from(sorted(tensors)))
            tensors[name], tensors[other] = tensors[other], array


def use(index):
    """What loads must search and grow as any other index does."""
    keys, heads = index.keys, index.heads
    random = np.random.default_rng(0)
    queries = random.standard_normal((heads, 2, keys.d)).astype(np.float32)
    for more in (0, 1, 3, 40):
        new = np.asarray(random.standard_normal((keys.groups, more, keys.d)), np.float32)
        index.insert(new)
        for k, effort in ((1, None), (5, 2), (keys.n + 3, 2**31)):
            found = index.search(queries, k, effort=effort)
            ids = found.ids.reshape(-1, k)
            assert ids.min() >= -1 and ids.max() < keys.n
            assert np.isfinite(found.scores[found.ids >= 0]).all()
            for row in ids:
                real = row[row >= 0]
                assert len(np.unique(real)) == len(real)
                assert len(real) or not keys.n, "nothing was found"
    assert index.nbytes >= 0


def main(folder, examples, names):
    saved = {}
    for name in names:
        content = (folder / name).read_bytes()
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        saved[name] = metadata, read_tensors(content)
    loaded = refused = 0

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def check(data):
        nonlocal loaded, refused
        name = data.draw(st.sampled_from(names))
        metadata, tensors = saved[name][0].copy(), dict(saved[name][1])
        about = json.loads(metadata["index"])
        for _ in range(data.draw(st.integers(1, 3))):
            damage(data, about, tensors)
        metadata["index"] = json.dumps(about)
        content = write_tensors({key: np.ascontiguousarray(array) for key, array in tensors.items()}, metadata)
        if data.draw(st.integers(0, 9)) == 0:
            place = data.draw(st.integers(0, len(content) - 1))
            cut = data.draw(st.booleans())
            content = content[:place] + (b"" if cut else bytes([data.draw(st.integers(0, 255))]) + content[place + 1 :])
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(content)
            try:
                index = CLASSES[name].load(file.name)
            except KVBenchError as error:
                refused += 1
                assert str(error).endswith(".") and "\n" not in str(error), str(error)
                return
            loaded += 1
            use(index)

    check()
    print(f"{loaded} loaded, {refused} refused")
    assert loaded > examples // 20 and refused > examples // 5


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
