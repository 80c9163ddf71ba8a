"""The lists of what is installed: read without importing the plugins, and never older than what they list."""

import json
import os
import resource
import subprocess
import sys
import textwrap

import pytest

from kvbench import catalogue, plugins

HEAVY = ("torch", "transformers", "faiss", "numba", "scipy", "matplotlib")
LISTS = ("policies", "budgets", "indexes", "tasks", "probes", "analyses", "models")
PLUGIN = """
from pathlib import Path
from kvbench import Extension, hookimpl

class Mine(Extension):
    name = "mine"
    summary = "{summary}"

@hookimpl
def kvbench_indexes():
    return [Mine]
"""
FIRST = PLUGIN.format(summary="First.")


def test_the_lists_import_nothing_heavy(tmp_path):
    script = f"""
        import contextlib, io, sys
        from kvbench.cli import main
        def kvbench(*arguments):
            sys.argv = ["kvbench", *arguments]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                main()
        commands = [["--help"], ["run", "--help"], ["policies", "quest"], *([name] for name in {LISTS})]
        for command in [["policies"]] if len(sys.argv) > 1 else commands:
            kvbench(*command)
        print([name for name in {HEAVY} if name in sys.modules])
    """
    environment = os.environ | {"KVBENCH_CACHE": str(tmp_path)}

    def imported(*arguments):
        command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path)
        return done.stdout.splitlines()[-1]

    assert "torch" in imported("the list is made")
    assert imported() == "[]"


def test_help_and_lists_take_less_than_a_second_of_processor_time(tmp_path):
    environment = os.environ | {"KVBENCH_CACHE": str(tmp_path)}

    def taken(*arguments):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "kvbench.cli", *arguments]
        subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    taken("policies")  # makes the list
    for command in ("--help", "--version", "policies", "budgets", "tasks", "models"):
        assert taken(command) < 1 or taken(command) < 1, command


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A folder on Python's path, where `install` puts a plugin; `listed` is what a new process would list."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path[:1], str(folder), *sys.path[1:]])
    monkeypatch.setattr(catalogue, "RACE_S", -1e6)  # the test's files are younger than its process
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    class Environment:
        loads = 0
        packages = folder

        def install(self, name="mine", text=FIRST, version="1.0", module="mine_plugin"):
            (folder / f"{name}-{version}.dist-info").mkdir(exist_ok=True)
            (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            (folder / f"{name}-{version}.dist-info" / "entry_points.txt").write_text(f"[kvbench]\n{name} = {module}\n")
            (folder / f"{module.split('.')[0]}.py").write_text(text)

        def listed(self):
            for module in ("mine_plugin", "mine_helper", "broken_plugin"):
                sys.modules.pop(module, None)
            monkeypatch.setattr(catalogue, "registry", self._loaded)
            return catalogue.catalogue()

        def _loaded(self):
            self.loads += 1
            self.found = plugins.registry.__wrapped__()
            return self.found

    return Environment()


def test_the_list_is_kept_and_is_what_the_plugins_registered(environment):
    environment.install()
    made, kept = environment.listed(), environment.listed()
    assert environment.loads == 1
    assert made == kept
    found = environment.found
    assert {kind: list(names) for kind, names in kept.entries.items()} == {
        kind: list(names) for kind, names in found.classes.items()
    }
    assert kept.find("index", "mine").summary == "First."
    quest = kept.find("policy", "quest")
    assert quest.options[0]["default"] == found.find("policy", "quest").Options().page_size


@pytest.mark.parametrize("change", ["edited", "edited to the same size and time", "helper", "installed", "removed",
                                    "upgraded", "another package", "data"])  # fmt: skip
def test_whatever_changes_shows_at_once(environment, change):
    packages = environment.packages
    (packages / "mine_helper.py").write_text("SUMMARY = 'Helped.'\n")
    helped = PLUGIN.replace('"{summary}"', "SUMMARY").replace(
        "from pathlib", "from mine_helper import SUMMARY\nfrom pathlib"
    )
    if change == "helper":
        environment.install(text=helped)
    elif change == "data":
        package = packages / "mine_plugin"
        package.mkdir()
        environment.install(module="mine_plugin.registered")
        (packages / "mine_plugin.py").unlink()
        (package / "summary.txt").write_text("First.")
        (package / "__init__.py").write_text("")
        (package / "registered.py").write_text(
            PLUGIN.replace('"{summary}"', "Path(__file__).with_name('summary.txt').read_text()")
        )
    elif change != "installed":
        environment.install()
    environment.listed()
    environment.listed()
    assert environment.loads == 1
    file = packages / "mine_plugin.py"
    if change == "edited":
        file.write_text(PLUGIN.format(summary="Second."))
    elif change == "edited to the same size and time":
        times = file.stat()
        file.write_text(PLUGIN.format(summary="Other."))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "helper":
        (packages / "mine_helper.py").write_text("SUMMARY = 'Mended.'\n")
    elif change == "installed":
        environment.install()
    elif change == "removed":
        (packages / "mine-1.0.dist-info" / "entry_points.txt").unlink()
    elif change == "upgraded":
        (packages / "mine-1.0.dist-info").rename(packages / "mine-1.1.dist-info")
    elif change == "another package":
        (packages / "other-1.0.dist-info").mkdir()
    elif change == "data":
        sys.modules.pop("mine_plugin.registered")
        (packages / "mine_plugin" / "summary.txt").write_text("Second, from a file.")
    found = environment.listed()
    assert environment.loads == 2
    summary = {
        "edited": "Second.", "edited to the same size and time": "Other.", "helper": "Mended.", "installed": "First.",
        "data": "Second, from a file.",
    }.get(change)  # fmt: skip
    if change == "removed":
        assert "mine" not in found.entries["index"]
    elif summary:
        assert found.find("index", "mine").summary == summary


def test_a_plugin_that_fails_is_reported_every_time_and_mended_shows(environment):
    environment.install("broken", "import no_such_module", module="broken_plugin")
    for _ in range(2):
        (failure,) = environment.listed().failures
        assert "plugin 'broken' (broken_plugin): ModuleNotFoundError" in failure
    assert environment.loads == 2
    environment.install("broken", PLUGIN.format(summary="Mended."), module="broken_plugin")
    found = environment.listed()
    assert not found.failures
    assert found.find("index", "mine").summary == "Mended."


def test_a_list_of_files_younger_than_the_process_is_not_kept(environment, monkeypatch):
    monkeypatch.setattr(catalogue, "RACE_S", 2.0)
    environment.install()
    environment.listed()
    environment.listed()
    assert environment.loads == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 99}'])
def test_a_damaged_list_is_made_anew(environment, tmp_path, text):
    environment.listed()
    (file,) = (tmp_path / "cache" / "catalogue").iterdir()
    content = json.loads(file.read_text())
    file.write_text(text)
    assert environment.listed().find("policy", "quest")
    content["entries"]["policy"][0].pop("summary")
    file.write_text(json.dumps(content))
    assert environment.listed().find("policy", "full").summary
    assert environment.loads == 3
    environment.listed()
    assert environment.loads == 3


def test_where_nothing_can_be_kept_the_list_is_made_every_time(environment, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    for _ in range(2):
        assert environment.listed().find("policy", "quest")
    assert environment.loads == 2
