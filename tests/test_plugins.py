"""A third party's package, installed beside kvbench, is found and run like a built-in; a broken one is only named."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from language import save_model
from prepared import Prepared

from kvbench.contract.errors import KVBenchError
from kvbench.plugins import registry

PACKAGE = Path(__file__).parent / "plugin_package"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    python, packages = installed(PACKAGE, tmp_path_factory.mktemp("environment"))
    prepared = Prepared(python)
    yield prepared, packages
    prepared.close()


def installed(package, place):
    """A virtual environment that sees this one's packages, with a plugin built and installed into it."""
    source = shutil.copytree(package, place / "source")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    python = place / "venv" / "bin" / "python"
    packages = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()
    )  # fmt: skip
    (packages / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    install = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", packages, source], check=True)
    return python, packages


def test_the_policy_of_another_package_is_listed_and_runs(environment, tmp_path):
    python, _ = environment
    listed = subprocess.run(
        [python.python, "-m", "kvbench.cli", "policies", "keynorm", "--json"],
        check=True, capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    assert json.loads(listed.stdout)[0]["options"][0]["name"] == "window"

    save_model(tmp_path / "model")
    done = python.kvbench(
        "run", "--policy", "keynorm", "--ratio", "0.2", "-o", "window=24", "--model", tmp_path / "model",
        "--task", "infinitebench_passkey", "--context-length", 512, "--examples", 1,
        "--output", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout)["runs"][0]
    assert ours["policy"] == "keynorm"
    assert 0 < ours["metrics"]["density"] < 0.4


def test_an_edited_plugin_runs_anew_and_says_so(environment, tmp_path):
    python, packages = environment
    save_model(tmp_path / "model")

    def run():
        done = python.kvbench(
            "run", "--policy", "keynorm", "--tokens", 60, "--model", tmp_path / "model", "--no-baseline",
            "--task", "infinitebench_passkey", "--context-length", 512, "--examples", 1,
            "--output", tmp_path / "out", "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["runs"][0], " ".join(done.stderr.split())

    first, told = run()
    code = first["config"]["plugins"]["policy"]
    assert (code["distribution"], code["version"]) == ("kvbench-keynorm", "0.1.0")
    assert "Changed since" not in told
    again, told = run()
    assert (again["folder"], again["metrics"], "Changed since" in told) == (first["folder"], first["metrics"], False)
    module = packages / "kvbench_keynorm.py"
    before = module.read_text()
    module.write_text(before.replace("largest=False", "largest=True"))
    try:
        changed, told = run()
    finally:
        module.write_text(before)
    assert changed["folder"] != first["folder"]
    after = changed["config"]["plugins"]["policy"]["source"]
    assert f"policy (kvbench-keynorm 0.1.0, source {code['source']} -> kvbench-keynorm 0.1.0, source {after})" in told
    assert f"Changed since {first['folder']}, so this run starts anew in {changed['folder']}: policy" in told
    assert Path(first["folder"], "run.json").exists()


def test_a_plugin_that_fails_to_import_is_named_and_leaves_the_others(environment):
    python, packages = environment
    broken = packages / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[kvbench]\nbroken = broken_plugin\n")
    (packages / "broken_plugin.py").write_text("raise RuntimeError('no such device')\n")
    try:
        listed = python.kvbench("policies")
        assert listed.returncode == 0
        assert "keynorm" in listed.stdout
        assert "quest" in listed.stdout
        warning = " ".join(listed.stderr.split())
        assert "plugin 'broken' (broken_plugin): RuntimeError: no such device" in warning
        asked = python.kvbench("run", "--policy", "brokenpolicy")
        assert asked.returncode == 2
        assert "Unknown policy 'brokenpolicy'" in asked.stderr
        assert "no such device" in asked.stderr
    finally:
        shutil.rmtree(broken)


def test_the_plugin_is_about_thirty_lines_of_policy():
    code = [
        line for line in (PACKAGE / "kvbench_keynorm.py").read_text().splitlines()
        if line.strip() and not line.strip().startswith(('"""', "#"))
    ]  # fmt: skip
    assert len(code) <= 35


def test_a_choice_of_numbers_takes_the_text_of_the_command_line():
    assert registry().options("policy", "kivi", {"bits": "4"}).bits == 4
    with pytest.raises(KVBenchError, match="bits='5'"):
        registry().options("policy", "kivi", {"bits": "5"})
