"""What identifies a plugin's code: edits that can change results change it, others don't."""

import importlib
import os
import sys
import time
from importlib.metadata import Distribution

import pytest

from kvbench.contract.errors import KVBenchError
from kvbench.identity import Identity, _tops, differences, identity
from kvbench.plugins import registry

POLICY = """
from __future__ import annotations
from typing import TYPE_CHECKING
import kvbench
from {helpers} import SIZE
if TYPE_CHECKING:
    from {only_typing} import Nothing

class Mine(kvbench.KVCachePolicy):
    name, summary = "mine", "Mine."

    def prefill(self, layer, queries, keys, values):
        from {inside} import other
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write modules below a folder of the search path, and import one anew."""
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)

    def files(**contents):
        for name, text in contents.items():
            file = tmp_path / f"{name.replace('__', '/').replace('INIT', '__init__')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        importlib.invalidate_caches()

    def load(name):
        for module in set(sys.modules) - known:
            del sys.modules[module]
        importlib.invalidate_caches()
        _tops.cache_clear()
        return importlib.import_module(name).Mine

    files.load, files.path = load, tmp_path
    yield files
    for module in set(sys.modules) - known:
        del sys.modules[module]
    _tops.cache_clear()


def distribution(folder, name, version, *records, top=None):
    """What an installer leaves in a folder of the search path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{record},,\n" for record in records))
    if top:
        (info / "top_level.txt").write_text(f"{top}\n")
    return Distribution.at(info)


def test_a_single_file_without_a_distribution_is_itself_and_the_files_that_it_imports(write):
    write(
        lone_policy=POLICY.format(helpers="lone_helpers", only_typing="lone_types", inside="lone_inside"),
        lone_helpers="SIZE = 3\n", lone_types="class Nothing: ...\n", lone_inside="other = 1\n",
        lone_unrelated="x = 1\n",
    )  # fmt: skip
    first = identity(write.load("lone_policy"))
    assert (first.distribution, first.version) == (None, None)
    assert len(first.source) == 16
    assert identity(write.load("lone_policy")) == first
    for changes in ({"lone_unrelated": "x = 2\n"}, {"lone_types": "class Nothing: x = 1\n"}):
        write(**changes)
        assert identity(write.load("lone_policy")) == first
    seen = {first.source}
    for changes in (
        {"lone_helpers": "SIZE = 4\n"}, {"lone_inside": "other = 2\n"},
        {"lone_policy": (write.path / "lone_policy.py").read_text() + "# changed\n"},
    ):  # fmt: skip
        write(**changes)
        seen.add(identity(write.load("lone_policy")).source)
    assert len(seen) == 4


def test_a_package_is_followed_through_relative_imports_but_not_into_what_registers_it(write):
    write(
        packaged__INIT="from packaged.policy import Mine\nfrom packaged.neighbour import x\n",
        packaged__policy=POLICY.format(helpers=".helpers", only_typing=".types", inside=".deep.inside"),
        packaged__helpers="from . import second\nSIZE = 1\n", packaged__second="x = 1\n", packaged__types="",
        packaged__deep__INIT="", packaged__deep__inside="from ..third import *\nother = 1\n", packaged__third="",
        packaged__neighbour="x = 1\n",
    )  # fmt: skip
    distribution(write.path, "kv-packaged", "2.5", "packaged/__init__.py", "packaged/policy.py", top="packaged")
    first = identity(write.load("packaged"))
    assert (first.distribution, first.version) == ("kv-packaged", "2.5")
    for name, changes in (
        ("neighbour", False),
        ("__init__", False),
        ("second", True),
        ("deep/inside", True),
        ("third", True),
    ):
        file = write.path / "packaged" / f"{name}.py"
        file.write_text(file.read_text() + "\n# changed\n")
        after = identity(write.load("packaged"))
        assert (after != first) == changes, name
        first = after


def test_an_editable_install_is_its_source_wherever_that_lies(write, tmp_path_factory):
    """Only a .pth file is recorded, as setuptools, hatch and flit do it."""
    site = tmp_path_factory.mktemp("site-packages")
    write(
        edited_policy=POLICY.format(helpers="edited_helpers", only_typing="t", inside="t"), edited_helpers="SIZE = 1\n"
    )
    origin = distribution(site, "kv-edited", "0.3.dev1", "__editable__.kv_edited.pth")
    first = identity(write.load("edited_policy"), origin)
    assert (first.distribution, first.version) == ("kv-edited", "0.3.dev1")
    write(edited_helpers="SIZE = 2\n")
    assert identity(write.load("edited_policy"), origin).source != first.source


def test_a_namespace_package_belongs_to_the_distribution_that_brought_the_module(write):
    write(
        spaced__kv__policy=POLICY.format(helpers="spaced.kv.helpers", only_typing="t", inside="t"),
        spaced__kv__helpers="SIZE = 1\n", spaced__web__app="x = 1\n",
    )  # fmt: skip
    distribution(write.path, "spaced-kv", "1.0", "spaced/kv/policy.py", "spaced/kv/helpers.py")
    distribution(write.path, "spaced-web", "9.0", "spaced/web/app.py")
    first = identity(write.load("spaced.kv.policy"))
    assert (first.distribution, first.version) == ("spaced-kv", "1.0")
    write(spaced__kv__helpers="SIZE = 2\n")
    changed = identity(write.load("spaced.kv.policy"))
    assert changed.source != first.source
    write(spaced__web__app="x = 2\n")
    assert identity(write.load("spaced.kv.policy")) == changed


def test_a_base_class_of_another_package_counts(write):
    write(
        based_policy="import base_of_it\nclass Mine(base_of_it.Base): ...\n",
        base_of_it="import kvbench\nclass Base(kvbench.KVCachePolicy):\n    name, summary = 'b', 'B.'\n",
    )
    first = identity(write.load("based_policy"))
    write(base_of_it=(write.path / "base_of_it.py").read_text() + "    x = 1\n")
    assert identity(write.load("based_policy")) != first


def test_source_that_cannot_be_read_is_said(write, tmp_path):
    space = {"__name__": "nowhere_at_all"}
    exec("import kvbench\nclass Mine(kvbench.KVCachePolicy):\n    name, summary = 'n', 'N.'\n", space)
    found = identity(space["Mine"])
    assert found.source is None
    assert str(found) == "no distribution, source unreadable"
    write(gone_policy=POLICY.format(helpers="gone_helpers", only_typing="t", inside="t"), gone_helpers="SIZE = 1\n")
    cls = write.load("gone_policy")
    (write.path / "gone_policy.py").unlink()
    assert identity(cls).source is None


def test_bytecode_and_archives_are_read_too(write, tmp_path):
    import py_compile
    import zipfile

    write(compiled_policy="import kvbench\nclass Mine(kvbench.KVCachePolicy):\n    name, summary = 'c', 'C.'\n")
    source = write.path / "compiled_policy.py"
    py_compile.compile(str(source), str(source.with_suffix(".pyc")))
    source.unlink()
    assert identity(write.load("compiled_policy")).source
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr(
            "zipped_policy.py", "import kvbench\nclass Mine(kvbench.KVCachePolicy):\n    name, summary = 'z', 'Z.'\n"
        )
    sys.path.insert(0, str(tmp_path / "packed.zip"))
    try:
        assert identity(write.load("zipped_policy")).source
    finally:
        sys.path.remove(str(tmp_path / "packed.zip"))


def test_a_file_written_after_it_was_loaded_is_refused(write):
    write(late_policy="import kvbench\nclass Mine(kvbench.KVCachePolicy):\n    name, summary = 'l', 'L.'\n")
    cls = write.load("late_policy")
    loaded = time.time() + 1
    identity(cls, loaded=loaded)
    os.utime(write.path / "late_policy.py", (loaded + 5, loaded + 5))
    with pytest.raises(KVBenchError, match=r"late_policy\.py was written after this process had loaded it"):
        identity(cls, loaded=loaded)


def test_of_built_ins_an_edit_reaches_what_imports_it_only(monkeypatch):
    found = registry()
    before = {name: found.identity("policy", name) for name in ("quest", "snapkv", "ivf", "full")}
    assert {code.distribution for code in before.values()} == {"kvbench"}
    assert len({code.source for code in before.values()}) == 4
    reads = []
    closure = sys.modules["kvbench.identity"]._content
    monkeypatch.setattr(
        "kvbench.identity._content", lambda spec, loaded: reads.append(spec.name) or closure(spec, loaded)
    )
    identity(found.find("policy", "ivf"))
    assert {"kvbench.strategies.selecting.index_retrieval", "kvbench.indexes.ivf"} <= set(reads)
    assert not {
        "kvbench.strategies.selecting.quest",
        "kvbench.strategies",
        "kvbench.indexes.hnsw",
        "kvbench.tasks",
    } & set(reads)


def test_differences_are_told_by_role():
    old = {"policy": Identity(distribution="a", version="1", source="0" * 16)}
    new = {"policy": Identity(distribution="a", version="2", source="1" * 16), "task": old["policy"]}
    assert differences(old, new) == [
        f"policy (a 1, source {'0' * 16} -> a 2, source {'1' * 16})", "task (its code was not recorded)",
    ]  # fmt: skip
    assert differences(new, new) == []
