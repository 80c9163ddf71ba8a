"""`kvbench leaderboard` on folders written here."""

import csv
import json

import duckdb
import pytest
from test_compare import store

from kvbench.compare import leaderboard as board
from kvbench.contract.budget import Budget


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    store(root / "a", [1] * 4, policy="full", budget=None)
    store(root / "a", [1, 0, 0, 0], policy="quest")
    store(root / "b" / "deep", [1, 1, 0, 0], policy="quest", context_length=4096)
    store(root / "b", [1, 1, 1, 0], policy="snapkv", budget=Budget(tokens=64, allocator="pyramid"), task="vt", seed=7)
    return root


@pytest.fixture
def rows(kvbench, folder):
    def run(*arguments):
        code, out, err = kvbench("leaderboard", folder, "--json", *arguments)
        assert (code, err) == (0, ""), err
        return json.loads(out)["rows"]

    return run


def test_all_runs_below_a_folder_come_best_first(rows, kvbench, folder):
    # Tasks and lengths are apart, and the best comes first in each.
    assert [(row["task"], row["context_length"], row["policy"], row["accuracy"]) for row in rows()] == [
        ("qa", 512, "full", 1), ("qa", 512, "quest", 0.25), ("qa", 4096, "quest", 0.5), ("vt", 512, "snapkv", 0.75),
    ]  # fmt: skip
    assert [row["accuracy"] for row in rows("--mixed")] == [1, 0.75, 0.5, 0.25]
    assert [row["accuracy"] for row in rows("--limit", "1")] == [1, 0.5, 0.75]
    assert [row["accuracy"] for row in rows("--limit", "1", "--mixed")] == [1]
    assert [row["ttft_s"] for row in rows("--sort", "ttft_s", "--columns", "ttft_s")] == [2.25] * 4
    first, *_, second = rows("--columns", "all")
    assert set(first) == set(board.COLUMNS)
    stored = json.loads((folder / "a").joinpath(first["folder"], "run.json").read_text())
    assert first["ttft_s"] == stored["metrics"]["ttft_s"]["total"]
    assert [first["accuracy_low"], first["accuracy_high"]] == stored["metrics"]["accuracy"]["ci95"]
    assert (first["allocator"], first["ratio"], second["tokens"], second["allocator"]) == (None, None, 64, "pyramid")
    code, out, _ = kvbench("leaderboard", folder)
    assert code == 0
    for text in (
        "4 runs, ranked within each of 3", "policy", "snapkv", "64 tokens pyramid", "m, qa, 4096 tokens", "75.0%",
        "30.1% to 95.4%", "10 bytes", "125.0 ms",
    ):  # fmt: skip
        assert text in out, out
    assert "4 runs of 3 tasks and lengths in one list" in kvbench("leaderboard", folder, "--mixed")[1]
    code, out, _ = kvbench("leaderboard", folder, "--columns", "policy,resident_bytes", "--where", "task=vt")
    assert (code, "resident bytes" in out, "accuracy" in out, "│ quest" in out) == (0, True, False, False)


def test_a_family_of_tasks_has_one_score_where_all_were_run(kvbench, tmp_path):
    for task, quest in (("vt", [1, 1, 0, 0]), ("cwe", [1] * 8), ("qa", [0] * 4)):
        store(tmp_path, [1] * len(quest), policy="full", budget=None, task=task)
        store(tmp_path, quest, policy="quest", task=task)
    store(tmp_path, [1] * 8, policy="snapkv", task="cwe")
    document = json.loads(kvbench("leaderboard", tmp_path, "--json")[1])
    means = {row["policy"]: row for row in document["averages"]}
    assert {name: row["score"] for name, row in means.items()} == {"full": 1, "quest": 0.75, "snapkv": None}
    assert (means["snapkv"]["lacks"], means["full"]["tasks"]) == (["vt"], ["cwe", "vt"])
    out = kvbench("leaderboard", tmp_path)[1]
    for text in ("RULER, mean of 2 of its 13 tasks", "not run: vt"):
        assert text in out, out
    full = next(tmp_path.glob("full-vt-*"))
    code, out, err = kvbench("compare", full, tmp_path, "--where", "policy~*", "--columns", "difference,p_holm")
    assert code == 0
    assert "snapkv ratio 0.1 uniform has no mean over RULER at 512 tokens: it lacks vt" in " ".join(err.split())
    for text in ("RULER, mean of 2 of its 13 tasks", "-25.0%", "p (Holm)"):
        assert text in out, out
    assert "won / lost / tied" not in out
    document = json.loads(kvbench("compare", full, tmp_path, "--json")[1])
    assert [(row["task"], row["difference"], row["n"]) for row in document["averages"]] == [
        ("RULER, mean of 2 of its 13 tasks", -0.25, 12)
    ]
    code, _, err = kvbench("compare", full, tmp_path, "--where", "policy=ivf")
    assert (code, "meets policy=ivf" in " ".join(err.split())) == (2, True)


@pytest.mark.parametrize(
    ("conditions", "policies"),
    [
        (["policy=quest"], ["quest", "quest"]),
        (["policy!=quest"], ["full", "snapkv"]),
        (["context_length>=4096"], ["quest"]),
        (["accuracy > 0.25", "accuracy<0.75"], ["quest"]),
        (["task~v*"], ["snapkv"]),
        (["policy~*u*", "seed=42"], ["full", "quest", "quest"]),
        (["tokens<=64"], ["snapkv"]),
        (["policy='; DROP TABLE runs; --"], []),
        (["policy=quest' OR '1'='1"], []),
    ],
)
def test_conditions_filter(rows, conditions, policies):
    found = rows(*[part for condition in conditions for part in ("--where", condition)])
    assert [row["policy"] for row in found] == policies


def test_sorting_columns_and_limit(rows):
    found = rows("--sort", "policy,-context_length", "--columns", "policy,context_length", "--limit", "3")
    assert [tuple(row.values()) for row in found] == [("full", 512), ("quest", 4096), ("quest", 512)]


def test_exports_hold_the_same_rows(rows, kvbench, folder, tmp_path):
    expected = rows()
    for name in ("board.csv", "board.parquet", "board.md"):
        assert kvbench("leaderboard", folder, "--export", tmp_path / "new" / name)[0] == 0
    with (tmp_path / "new" / "board.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["policy"] for row in read] == [row["policy"] for row in expected]
    assert [float(row["accuracy"]) for row in read] == [row["accuracy"] for row in expected]
    parquet = duckdb.read_parquet(str(tmp_path / "new" / "board.parquet"))
    assert [dict(zip(parquet.columns, row, strict=True)) for row in parquet.fetchall()] == expected
    lines = (tmp_path / "new" / "board.md").read_text().splitlines()
    assert lines[0].startswith("| model | policy | allocator |")
    assert (len(lines), lines[2].split(" | ")[1]) == (6, "full")
    assert board.markdown(["a"], [["x|y\nz"], [None], [0.123456]]).splitlines()[2:] == [
        "| x\\|y z |",
        "|  |",
        "| 0.1235 |",
    ]


def test_a_name_that_looks_like_a_formula_is_text_in_the_exported_csv(kvbench, tmp_path):
    store(tmp_path / "runs", [1, 0], policy="=cmd|' /C calc'!A0", budget=None)
    assert kvbench("leaderboard", tmp_path / "runs", "--export", tmp_path / "board.csv")[0] == 0
    with (tmp_path / "board.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["policy"], row["accuracy"], row["ratio"]) == ("'=cmd|' /C calc'!A0", "0.5", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--where", "polcy=quest"), "Unknown column 'polcy': choose policy"),
        (("--where", "policy"), "not of the form column=value"),
        (("--where", "accuracy>high"), "compares a number with 'high'"),
        (("--sort", 'accuracy"; DROP TABLE x'), "Unknown column 'accuracy\"; DROP TABLE x'"),
        (("--columns", "policy,1=1"), "Unknown column '1=1'"),
        (("--export", "board.xlsx"), "end it in .csv, .parquet or .md"),
        (("--export", "/proc/board.csv"), "Cannot write to /proc/board.csv"),
    ],
)
def test_bad_input_is_one_sentence(kvbench, folder, arguments, message):
    code, _, err = kvbench("leaderboard", folder, *arguments)
    assert (code, message in " ".join(err.split())) == (2, True), err


def test_a_folder_that_cannot_be_read_leaves_the_others_alone(kvbench, tmp_path):
    store(tmp_path, [1], policy="full", budget=None)
    damaged = store(tmp_path, [1], policy="quest")
    (damaged / "run.json").write_text('{"schema": 99}')
    code, out, err = kvbench("leaderboard", tmp_path, "--json")
    assert (code, len(json.loads(out)["rows"])) == (0, 1)
    assert "schema version 99" in " ".join(err.split())
    assert "There is no run in" in kvbench("leaderboard", tmp_path / "nowhere")[2]
