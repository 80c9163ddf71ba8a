"""What plain `pip install kvbench` brings is what the main job needs; all else is an extra, named before any work."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from kvbench.contract.errors import KVBenchError
from kvbench.contract.extras import EXTRAS, check_extras, need
from kvbench.plugins import registry

ROOT = Path(__file__).parent.parent
FOLDERS = ("kvbench", "strategies", "indexes", "analysis")
PLAIN = {
    "accelerate": None,  # transformers reads GGUF with it
    "torch": "torch", "transformers": "transformers", "numpy": "numpy", "safetensors": "safetensors",
    "pydantic": "pydantic", "pluggy": "pluggy", "faiss-cpu": "faiss", "numba": "numba", "scipy": "scipy",
    "jinja2": "jinja2", "matplotlib": "matplotlib", "filelock": "filelock",
    "gguf": None,  # the same
    "platformdirs": "platformdirs", "psutil": "psutil", "pyyaml": "yaml", "rich": "rich", "typer": "typer",
    "wonderwords": "wonderwords",
}  # fmt: skip
"""Dependency -> the module that a run, a sweep, a comparison, an analysis or a report imports."""
ALSO = {"PIL", "huggingface_hub", "llvmlite", "markupsafe", "pydantic_core", "pytest", "tokenizers"}
"""What comes with a dependency (matplotlib, transformers, numba, jinja2, pydantic), or runs it (pytest)."""
OPTIONAL = {"kvbench/integrations/lm_eval.py": {"lm_eval", "tqdm"}}
"""Files that are imported only where their package is there."""


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name(requirement):
    return re.match(r"[\w.-]+", requirement).group().lower()


def _optional(node):
    """Whether what a statement imports may be missing: it is for type checkers, or there is another way."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    handlers = node.handlers if isinstance(node, ast.Try) else []
    return any(isinstance(one.type, ast.Name) and one.type.id == "ImportError" for one in handlers)


def imports(text):
    """The top-level modules that a source imports and cannot do without."""
    tree = ast.parse(text)
    guarded = {id(inner) for node in ast.walk(tree) if _optional(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in guarded:
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level and id(node) not in guarded:
            yield node.module.partition(".")[0]


def test_plain_dependencies_are_those_of_the_main_job():
    assert {name(requirement) for requirement in project()["dependencies"]} == set(PLAIN)


def test_every_import_is_of_a_plain_dependency_or_asks_for_its_extra_by_name():
    plain = {module for module in PLAIN.values() if module} | ALSO | set(sys.stdlib_module_names) | {"kvbench"}
    used, wrong = set(), []
    for file in (file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))):
        text, known = file.read_text("utf-8"), plain | OPTIONAL.get(file.relative_to(ROOT).as_posix(), set())
        named = set(re.findall(r"^ *(?:import|from) ([A-Za-z_]\w*)", text, re.MULTILINE))
        used |= named
        if not named <= known:  # parsing all files would take seconds
            wrong += [f"{file} imports {module}" for module in imports(text) if module not in known]
    assert sorted(set(wrong)) == []
    assert {module for module in PLAIN.values() if module} <= used, "a dependency that nothing imports"


def test_every_optional_package_is_in_the_extra_that_its_error_names():
    extras = project()["optional-dependencies"]
    for module, extra in EXTRAS.items():
        assert module.replace("-", "_") in {name(one).replace("-", "_") for one in extras[extra]}, module


def test_what_is_missing_is_told_with_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    told = (
        r"^kvbench leaderboard needs the package duckdb, which is not installed: run "
        r"pip install 'kvbench\[leaderboard\]'\.$"
    )
    with pytest.raises(KVBenchError, match=told):
        need("duckdb", "kvbench leaderboard")


def test_a_package_that_is_there_and_broken_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "trackio.py").write_text("import no_such_module_of_trackio")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(KVBenchError, match=r"which cannot be imported \(No module named 'no_such_module_of_trackio'\)"):
        need("trackio", "--trackio")
    check_extras("--trackio", "trackio")  # looks, and imports nothing


@pytest.mark.parametrize(
    ("task", "module", "extra"),
    [
        ("longbench_gov_report", "rouge_score", "metrics"), ("longbench_dureader", "jieba", "chinese"),
        ("longbench_lcc", "rapidfuzz", "metrics"), ("classeval", "rapidfuzz", "metrics"),
        ("scbench_repoqa", "nltk", "metrics"),
        ("scbench_summary_with_needles", "rouge_score", "metrics"),
        ("infinitebench_longbook_sum_eng", "rouge_score", "metrics"),
    ],
)  # fmt: skip
def test_a_task_names_its_missing_package_before_any_work(monkeypatch, task, module, extra):
    monkeypatch.setattr("kvbench.contract.extras.find_spec", lambda name: None if name == module else object())
    with pytest.raises(KVBenchError, match=rf"{module}, which is not installed: run pip install 'kvbench\[{extra}\]'"):
        registry().make("task", task, {}).data()


def test_a_file_of_examples_names_its_missing_package_before_any_work(monkeypatch, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"input": "a", "outputs": ["b"], "metric": "chrf"}\n')
    monkeypatch.setattr("kvbench.contract.extras.find_spec", lambda _: None)
    with pytest.raises(KVBenchError, match=r"The metric chrf needs the package sacrebleu"):
        registry().make("task", "jsonl", {"path": str(file)}).data()
