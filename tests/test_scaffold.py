"""What `kvbench new` writes works as it is, and nothing is written over."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvbench.plugins import KINDS
from kvbench.scaffold import render

ROOT = Path(__file__).parent.parent
PYTEST = """
import os, sys, pytest
codes = {}
for folder in sys.argv[1:]:
    os.chdir(folder)
    codes[os.path.basename(folder)] = int(pytest.main(["-q", "-p", "no:cacheprovider"]))
    for name in [name for name in sys.modules if name.startswith("test_")]:
        del sys.modules[name]
sys.exit(str({name: code for name, code in codes.items() if code}) if any(codes.values()) else 0)
"""


def test_every_kind_of_plugin_passes_its_own_tests_at_once(kvbench, tmp_path):
    """Installed as pip would: on the path, with their entry points; all in one process, since torch imports slowly."""
    site = tmp_path / "site"
    for kind in KINDS:
        code, out, _ = kvbench("new", kind, f"my_{kind}", "--output", tmp_path / "made", "--json")
        assert code == 0
        folder = Path(json.loads(out)["folder"])
        about = site / f"kvbench_my_{kind}-0.1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kvbench-my-{kind}\nVersion: 0.1.0\n")
        (about / "entry_points.txt").write_text(f"[kvbench]\nmy_{kind} = kvbench_my_{kind}\n")
        (site / f"kvbench_my_{kind}.py").symlink_to(folder / f"kvbench_my_{kind}.py")
    folders = sorted(map(str, (tmp_path / "made").iterdir()))
    assert len(folders) == len(KINDS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PYTEST, *folders], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.count(" passed") == len(KINDS) and "skipped" not in done.stdout


def test_the_policy_is_the_readmes():
    made = render("policy", "key_norm")["kvbench_key_norm.py"].replace("key_norm", "keynorm")
    assert made.strip() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_for_authors_shows_what_is_written(kind):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/authors.md").read_text(), flags=re.M | re.S)
    made = render(kind, f"my_{kind}")
    module = next(text for place, text in made.items() if place.startswith("kvbench_"))
    if kind == "policy":  # the README's, above
        assert "class KeyNorm" not in "".join(blocks)
    else:
        assert module in blocks


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("polcy", "mine", "'polcy' is no kind of plugin: choose policy, budget, index, task, probe, analysis"),
        ("policy", "my-policy", "'my-policy' cannot name a policy.*such as my_policy"),
        ("task", "3d", "'3d' cannot name a task"),
        ("task", "class", "'class' cannot name a task"),
        ("probe", "../x", "cannot name a probe"),
        ("policy", "quest", "There is a policy 'quest' already"),
        ("index", "quest", "There is a policy 'quest' already"),
        ("probe", "density", "There is a probe 'density' already"),
        ("budget", "there", "kvbench-there exists already, and nothing was written"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence(kvbench, tmp_path, kind, name, message):
    (tmp_path / "kvbench-there").mkdir()
    code, out, told = kvbench("new", kind, name, "--output", tmp_path)
    assert (code, out) == (2, "")
    assert re.search(message, " ".join(told.split()))
    assert [path.name for path in tmp_path.rglob("*")] == ["kvbench-there"]
