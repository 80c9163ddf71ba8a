"""The documents stay true: their commands exist, their code is the tested code."""

import ast
import re
import shlex
import textwrap
from importlib import import_module
from pathlib import Path

import pytest
import typer
import yaml

import kvbench
from kvbench.api import index as index_table
from kvbench.api import runs_table
from kvbench.cli import app
from kvbench.compare import leaderboard

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    for document in DOCUMENTS:
        for block in re.findall(r"^```\w*\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.removeprefix("$ ").split("&&"):
                    if part.strip().startswith("kvbench "):
                        yield pytest.param(shlex.split(part, comments=True)[1:], id=part.strip()[:60])


@pytest.mark.parametrize("arguments", list(commands()))
def test_every_command_in_the_documents_parses(arguments):
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]
    command.make_context(arguments[0], list(arguments[1:]))


def test_the_readme_shows_the_plugin_that_the_tests_install():
    plugin = (ROOT / "tests/plugin_package/kvbench_keynorm.py").read_text().strip()
    assert plugin in (ROOT / "README.md").read_text()


def test_links_and_figures_of_the_documents_exist():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def nav(entries):
    for entry in entries:
        inner = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from nav(inner) if isinstance(inner, list) else [inner]


def test_every_document_is_in_the_site_s_navigation():
    there = {file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")}
    listed = list(nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(there), "add it to nav in mkdocs.yml"


def test_every_public_name_is_in_the_reference():
    shown = {
        name
        for file in (ROOT / "docs/reference").glob("*.md")
        for name in re.findall("^::: (.+)$", file.read_text(), re.MULTILINE)
    }
    for name in kvbench.__all__:
        home = {"KVBenchError": "contract.errors", "hookimpl": "contract.markers"} | kvbench._HOMES
        assert f"kvbench.{home[name]}.{name}" in shown, f"add {name} to a page in docs/reference"
    for name in shown:
        module, _, member = name.rpartition(".")
        assert hasattr(import_module(module), member)


def test_ci_runs_the_readme_test_command():
    assert "-c constraints.txt tox && tox" in (ROOT / "README.md").read_text()
    script = (ROOT / ".ci/run").read_text()
    assert re.search(r"-c constraints.txt tox\n.*/tox\"\n", script)


def headings():
    """Column headings of the command line's tables without units, and the rows of `kvbench run`."""
    entries = runs_table._entries({}, None)
    found = {label for label, _, _ in entries} | {short for _, short, _ in entries} | set(index_table._HEADINGS)
    for file in sorted([*(ROOT / "kvbench/cli").glob("*.py"), *(ROOT / "kvbench/api").glob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.For) and "add_column" in ast.unparse(node.body[0]):
                found |= {part.value for part in ast.walk(node.iter) if isinstance(part, ast.Constant)}
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called == "Column" or called.endswith("add_column"):
                found |= {part.value for part in node.args if isinstance(part, ast.Constant)}
    found |= {name.replace("_", " ") for name in leaderboard.COLUMNS}
    words = {" ".join(heading.split()).replace(" @", "@") for heading in found if heading}
    return {re.sub(r",? ?\b(MiB|ms|s)$|^MiB ", "", heading) or heading for heading in words}


def test_every_heading_of_a_table_is_in_the_glossary():
    text = (ROOT / "docs/glossary.md").read_text()
    firsts = [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("|")]
    terms = {term.replace("`", "") for first in firsts for term in re.split(r", (?!p50)", first)}
    terms |= set(re.findall(r"`([^`]+)`", text))
    shown = headings()
    assert {"recall@k", "won / lost / tied", "effort", "floor ratio", "check"} <= shown
    assert shown - terms == set()


def test_the_page_for_authors_runs_as_it_stands():
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/authors.md").read_text(), flags=re.MULTILINE | re.DOTALL
    )
    exec(compile("\n".join(blocks), "docs/authors.md", "exec"), {"__name__": "authors"})


def test_what_the_documents_import_exists():
    for document in DOCUMENTS:
        blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        for node in [node for block in blocks for node in ast.walk(ast.parse(textwrap.dedent(block)))]:
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kvbench":
                module = import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{document.name} imports {missing} from {node.module}"
