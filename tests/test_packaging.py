"""The wheel holds the whole tree, under the names it is imported by."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAPPED = {
    "kvbench": "kvbench",
    "strategies": "kvbench/strategies",
    "indexes": "kvbench/indexes",
    "analysis": "kvbench/analysis",
}


def test_every_file_that_states_the_version_states_the_same():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[0] == version


def test_the_wheel_holds_the_tree(tmp_path):
    source = tmp_path / "source"
    for name in (*MAPPED, "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tree = {
        f"{imported}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, imported in MAPPED.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == tree
    assert {"kvbench/py.typed", "kvbench/strategies/baselines/full.py", "kvbench/indexes/base.py"} <= packed
