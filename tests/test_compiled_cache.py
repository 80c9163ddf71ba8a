"""The disk cache of compiled kernels: never another kernel's code or an older source's, and no need of a disk."""

import errno
import importlib.util
import sys
import warnings
from pathlib import Path

import numba
import pytest

from kvbench.indexes import compiled_cache
from kvbench.indexes.compiled import kernel

SOURCE = "def scaled(x):\n    return x * {}\n"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python's own cache tells sources of one second by size
    monkeypatch.setitem(sys.modules, "module", None)
    compiled_cache._warn.cache_clear()
    return tmp_path / "cache"


def compiled(folder, factor):
    """The kernel of a module whose source was edited last to multiply with `factor`, as a new process sees it."""
    file = folder / "module.py"
    file.write_text(SOURCE.format(factor))
    compiled_cache.digest_of.cache_clear()
    spec = importlib.util.spec_from_file_location("module", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["module"] = module  # as that of an imported kernel is: its code finds its globals by the name
    spec.loader.exec_module(module)
    return kernel(module.scaled)


def kept(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_code_of_a_source_before_an_edit_is_never_run(tmp_path, cache_folder, monkeypatch):
    assert compiled(tmp_path, 2)(10) == 20
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*cache.* \(No space left\)") as told:
            again = compiled(tmp_path, 3)
            assert (again(10), again(10.0)) == (30, 30.0)
        assert len(told) == 1
    assert compiled(tmp_path, 3)(10) == 30
    (file,) = kept(cache_folder)
    other = compiled(tmp_path, 3)
    assert other(10) == 30 and other.stats.cache_hits
    assert other(1.5) == 4.5 and file in kept(cache_folder) and len(kept(cache_folder)) == 2


def test_a_damaged_file_and_that_of_another_key_are_compiled_anew(tmp_path, cache_folder):
    assert (compiled(tmp_path, 2)(10), compiled(tmp_path, 2)(1.5)) == (20, 3.0)
    first, second = kept(cache_folder)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert (compiled(tmp_path, 2)(10), compiled(tmp_path, 2)(1.5)) == (20, 3.0)
    for damaged in (b"", content[:100], content[:-1] + b"\0", bytes(len(content))):
        for file in kept(cache_folder):
            file.write_bytes(damaged)
        assert compiled(tmp_path, 2)(10) == 20
    first.unlink()
    first.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert compiled(tmp_path, 2)(10) == 20


def test_without_a_folder_that_can_be_written_to_kernels_work(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "IPythonCacheLocator")
    with pytest.warns(RuntimeWarning, match="no locator available"):
        assert compiled(tmp_path, 2)(10) == 20
