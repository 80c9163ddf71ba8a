"""`kvbench report` on runs of a tiny random model: numbers, texts, files, and the page in a browser."""

import csv
import json
import re
import shlex
import shutil
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, median

import numpy as np
import pytest
import typer
from language import save_model
from safetensors.numpy import load_file
from scipy import stats
from typer.testing import CliRunner

from kvbench.cli import app
from kvbench.contract.errors import KVBenchError
from kvbench.report import build
from kvbench.report.charts import charts
from kvbench.report.collect import collect
from kvbench.report.commands import FLAGS, run_command
from kvbench.report.page import board_rows, compose, markdown
from kvbench.runs.results import RunConfig

LENGTHS = (512, 640)
SCORES = {"full": [1, 1, 1, 1, 0, 1], "quest": [1, 0, 1, 1, 0, 1], "streaming_llm": [0, 0, 0, 1, 0, 0]}


def kvbench(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def rescore(run, scores):
    """Give a run's examples scores that differ: a random model answers nothing."""
    file = run / "examples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row, score in zip(rows, scores, strict=True):
        row["score"] = float(score)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit(run, **changes):
    content = json.loads((run / "run.json").read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    (run / "run.json").write_text(json.dumps(content))


def only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def table(file):
    with Path(file).open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of three policies at two lengths, with per-step traces, and the Mahalanobis distances of the model."""
    root = tmp_path_factory.mktemp("report")
    model = save_model(root / "tiny-llama")
    for length in LENGTHS:
        kvbench(
            "run", "--policy", "quest,streaming_llm", "--model", model, "--task", "infinitebench_passkey",
            "--context-length", length, "--examples", 6, "--ratio", 0.3, "-o", "page_size=8", "--probe", "latency",
            "--output", root / "runs",
        )  # fmt: skip
        for policy, scores in SCORES.items():
            rescore(only(root / "runs", f"{policy}-*-{length}-*"), scores)
    kvbench("capture", "--model", model, "--context-length", 300, "--output", root / "capture")
    for name in ("ood", "overlap"):
        kvbench("analyze", name, "--capture", root / "capture", "--output", root / "runs" / name)
    return root / "runs"


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("made")
    printed = kvbench("report", runs, "--format", "html,md,pdf", "--output", output, "--json")
    return output, json.loads(printed)


@pytest.fixture
def copied(runs, tmp_path):
    """Runs to damage."""
    return shutil.copytree(runs, tmp_path / "runs")


class Composed:
    """What a report of the folders would say, nothing drawn."""

    def __init__(self, *folders):
        self.found = collect(folders)
        self.charts = {chart.name: chart for chart in charts(self.found)}
        self.content = compose(self.found, list(self.charts.values()), "kvbench report")
        self.rows = {(row["policy"], str(row["context_length"])): row for row in board_rows(self.found)}
        self.markdown = markdown(self.content)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_document_names_what_was_written(report, runs):
    _, document = report
    assert all(Path(file).stat().st_size > 100 for file in document["files"])
    assert {Path(file).name for file in document["files"]} >= {
        "report.html", "report.md", "report.pdf", "leaderboard.csv", "accuracy-bytes.svg", "needles.png", "ood.csv",
    }  # fmt: skip
    assert [figure["name"] for figure in document["figures"]] == [
        "accuracy-bytes", "accuracy-latency", "recall-scanned", "needles", "latency", "recall-steps", "ood",
        "analysis-1",
    ]  # fmt: skip
    assert all(figure["drawn"] and not figure["missing"] for figure in document["figures"])
    assert document["problems"] == []
    assert len(document["runs"]) == 6
    for run in document["runs"]:
        length = Path(run["folder"]).name.split("-")[2]
        expected = None if run["policy"] == "full" else str(only(runs, f"full-*-{length}-*"))
        assert run["baseline"] == expected


def test_differences_are_paired_with_the_baseline_and_adjusted(report):
    rows = {(row["policy"], row["context_length"]): row for row in table(report[0] / "figures" / "leaderboard.csv")}
    p_values = []
    for policy in ("quest", "streaming_llm"):
        for length in LENGTHS:
            row = rows[policy, str(length)]
            change = np.subtract(SCORES[policy], SCORES["full"])
            wins, losses = int((change > 0).sum()), int((change < 0).sum())
            assert float(row["difference"]) == pytest.approx(change.mean())
            assert (row["pairs"], row["test"]) == ("6", "mcnemar")
            assert float(row["p_value"]) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
            assert float(row["difference_low"]) < change.mean() < float(row["difference_high"])
            assert float(row["accuracy"]) == pytest.approx(fmean(SCORES[policy]))
            p_values.append((float(row["p_value"]), float(row["p_holm"])))
    p_values.sort()
    largest = 0.0
    for rank, (p, adjusted) in enumerate(p_values):
        largest = max(largest, min(1, (len(p_values) - rank) * p))
        assert adjusted == pytest.approx(largest)
    assert rows["full", "512"]["difference"] == ""


def test_figures_hold_the_runs_own_numbers(report, runs):
    figures = report[0] / "figures"
    examples = {}
    for policy in SCORES:
        run = only(runs, f"{policy}-*-512-*")
        timings = {line["id"]: line for line in map(json.loads, (run / "timings.jsonl").read_text().splitlines())}
        lines = [json.loads(line) for line in (run / "examples.jsonl").read_text().splitlines()]
        examples[policy] = [{**line, **timings[line["id"]]} for line in lines]
    for row in table(figures / "accuracy-bytes.csv"):
        if row["context_length"] == "512":
            mine = examples[row["policy"]]
            assert float(row["total_bytes"]) == pytest.approx(fmean(sum(one["bytes"].values()) for one in mine))
    for row in table(figures / "latency.csv"):
        if row["context_length"] == "512":
            first = examples[row["policy"]][0]
            parts = [float(row[name]) for name in ("retrieval_s", "attention_s", "insertion_s")]
            assert parts == pytest.approx([first["probes"][n] for n in ("retrieval_s", "attention_s", "insertion_s")])
            assert float(row["other_s"]) == pytest.approx(max(median(first["step_s"]) - sum(parts), 0))
            assert float(row["prefill_s"]) == pytest.approx(fmean(one["prefill_s"] for one in examples[row["policy"]]))
    steps = [
        row for row in table(figures / "recall-steps.csv") if (row["policy"], row["context_length"]) == ("quest", "512")
    ]
    tensors = load_file(only(only(runs, "quest-*-512-*") / "traces", "*.safetensors"))
    assert [float(row["recall_at_k"]) for row in steps] == pytest.approx(
        [float(np.nanmean(step)) for step in tensors["column.recall_at_k"]]
    )
    assert [int(row["step"]) for row in steps] == list(range(1, len(steps) + 1))


def test_needles_are_averaged_by_depth_and_length(report, runs):
    def scores(label, length):
        run = only(runs, f"{label}-*-{length}-*")
        rows = [json.loads(line) for line in (run / "examples.jsonl").read_text().splitlines()]
        return [(row["info"]["depth"], row["score"]) for row in rows]

    both = table(report[0] / "figures" / "needles.csv")  # depths drawn at random: bands of 20%
    assert {row["label"] for row in both} == set(SCORES)
    for row in both:
        low = float(row["depth_percent"].split("–")[0])
        mine = [score for depth, score in scores(row["label"], row["context_length"]) if depth // 20 * 20 == low]
        assert (float(row["accuracy"]), int(row["examples"])) == (pytest.approx(fmean(mine)), len(mine))


# -- commands ----------------------------------------------------------------------------------------------------------


def test_every_field_of_a_configuration_is_in_its_command_or_follows_from_it():
    handled = {"policy", "policy_options", "budget", "task_options", "probes", "share_prefill", "prompt_attention"}
    follows = {"model_fingerprint", "weights", "task_data", "plugins"}  # from the model, the task and what is installed
    assert set(RunConfig.model_fields) == set(FLAGS) | handled | follows


def test_the_command_of_a_run_makes_that_very_run(runs):
    folders = sorted(runs.glob("*-infinitebench_passkey-*"))
    for folder in (folders[0], folders[2]):
        config = json.loads((folder / "run.json").read_text())["config"]
        printed = kvbench(*shlex.split(run_command(config, folder.parent))[1:], "--json")
        assert Path(json.loads(printed)["runs"][0]["folder"]) == folder
    assert sorted(runs.glob("*-infinitebench_passkey-*")) == folders


def test_options_of_every_kind_come_back_from_a_configuration(runs):
    config = json.loads((only(runs, "quest-*-512-*") / "run.json").read_text())["config"]
    asked = {
        **config, "batch_size": 4, "share_prefill": True, "prefill_chunk": 64, "question": "agnostic",
        "task": "needle_grid", "task_options": {"depths": [0.0, 12.5]},
        "budget": {**config["budget"], "ratio": None, "bytes": 2**20},
    }  # fmt: skip
    arguments = shlex.split(run_command(asked))[2:]
    parameters = typer.main.get_command(app).commands["run"].make_context("run", arguments).params
    for name in ("batch_size", "share_prefill", "prefill_chunk", "question", "task", "context_length", "seed"):
        assert str(parameters[name]) == str(asked[name]), name
    alone = shlex.split(run_command({**asked, "batch_size": 1, "share_prefill": False}))
    assert "--no-share-prefill" in alone
    assert not {"--share-prefill", "--no-share-prefill"} & {*shlex.split(run_command(config))}
    assert parameters["size_bytes"] == str(2**20)
    assert (parameters["ratio"], parameters["baseline"]) == (None, False)
    assert list(parameters["task_option"]) == ["depths=0.0,12.5"]
    assert list(parameters["option"]) == ["page_size=8"]
    assert list(parameters["probe"]) == ["latency"]


def test_every_command_that_the_page_shows_parses(report):
    commands = re.findall(r'<div class="command"><pre>(kvbench [^<]*)</pre>', (report[0] / "report.html").read_text())
    assert len(commands) > 10
    group = typer.main.get_command(app)
    for line in {line.replace("&#39;", "'") for line in commands}:
        name, *arguments = shlex.split(line)[1:]
        group.commands[name].make_context(name, arguments)


# -- what is missing, partial or damaged -------------------------------------------------------------------------------


def test_a_partial_run_is_marked_wherever_it_is_shown(copied, tmp_path):
    run = only(copied, "quest-*-512-*")
    for name in ("examples.jsonl", "timings.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:4]) + lines[4][:30])
    edit(run, status="interrupted", metrics={})
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    shown = Composed(copied)
    row = shown.rows["quest", "512"]
    assert (row["status"], row["examples"], row["pairs"]) == ("interrupted", 4, 4)
    marks = [row["marks"] for row in shown.content.board.rows]
    assert sorted(marks) == [[]] * 5 + [["partial: 4 of 6 examples, interrupted"]]
    assert shown.markdown.count("(partial: 4 of 6 examples, interrupted)") == 2
    for chart in shown.charts.values():
        if chart.name not in ("ood", "analysis-1"):
            assert {row["label"] for row in chart.rows} >= {"quest (partial)", "full"}, chart.name
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_without_a_baseline_there_are_no_differences_and_the_command_that_runs_it(copied):
    shutil.rmtree(only(copied, "full-*-512-*"))
    shown = Composed(copied)
    assert shown.rows["quest", "512"]["difference"] is shown.rows["quest", "512"]["p_holm"] is None
    assert shown.rows["quest", "640"]["difference"] is not None
    assert "no baseline" in shown.markdown
    (command,) = [command for _, command in shown.content.glance if command]
    assert re.search("kvbench run --policy full .*--context-length 512 ", command)


def test_a_difference_that_so_few_examples_cannot_show_is_not_called_none(copied):
    rescore(only(copied, "streaming_llm-*-640-*"), [0] * 6)
    rescore(only(copied, "full-*-640-*"), [1] * 6)
    text = next(line for line, _ in Composed(copied).content.glance if "640" in line)
    assert "Too few examples to tell: " in text
    assert "streaming_llm (−100.0 points, n = 6)" in text
    assert "fewer than 8 examples in a table of 4 comparisons" in text  # 4 * 2 / 2**8 < 5% < 4 * 2 / 2**7
    assert "Not told apart" not in text


def test_the_page_recommends_and_says_what_it_cannot_tell(report):
    text = (report[0] / "report.html").read_text()
    assert "No budget here is shown within 1 point of exact attention." in text
    assert "6 examples without a loss cannot rule out" in text or "too few to be sure" in text
    assert "## Which policy?" in (report[0] / "report.md").read_text()


def test_a_baseline_of_other_examples_is_none(copied):
    edit(only(copied, "full-*-512-*"), config={"seed": 7})
    shown = Composed(copied)
    assert shown.rows["quest", "512"]["difference"] is None
    assert shown.rows["quest", "640"]["difference"] is not None


def test_a_baseline_near_zero_is_pointed_out(copied):
    rescore(only(copied, "full-*-512-*"), [0] * 6)
    lines = [line for line, _ in Composed(copied).content.glance]
    assert [("cannot tell policies apart" in line) for line in lines if "512" in line] == [True]
    assert [("cannot tell policies apart" in line) for line in lines if "640" in line] == [False]


def test_seeds_are_runs_of_their_own_and_truncated_examples_are_counted(copied, tmp_path):
    other = shutil.copytree(only(copied, "full-*-512-*"), copied / "full-seed-7")
    edit(other, config={"seed": 7})
    rows = [json.loads(line) for line in (other / "examples.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        row["info"] |= {"truncated_tokens": 12, "prefix_left_out": "why"}
    (other / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rescore(other, [1, 1, 0, 0, 0, 0])
    shown = Composed(copied)
    lines = "\n".join(line for line, _ in shown.content.glance)
    assert "full, seed 7 scores 33.3% on 6 examples; full, seed 42 scores 83.3% on 6 examples" in lines
    assert "cut to fit the context: 2 of full, seed 7" in lines
    assert lines.count("no answer prefix was given, since the chat template opens a thinking block") == 1
    assert "Seed" in [column.title for column in shown.content.board.columns]
    assert shown.rows["quest", "512"]["difference"] == pytest.approx(-1 / 6)  # against the same seed


def test_missing_probes_name_the_command_that_records_them(copied, tmp_path):
    for run in copied.glob("*-infinitebench_passkey-*"):
        shutil.rmtree(run / "traces", ignore_errors=True)
        for name in ("examples.jsonl", "timings.jsonl"):
            rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
            for row in rows:
                for key in ("trace", "probes", "probed_step_s"):
                    row.pop(key, None)
            (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        edit(run, config={"probe_examples": 0, "probes": []})
    shutil.rmtree(copied / "ood")
    shutil.rmtree(copied / "overlap")
    made = build([copied], tmp_path / "out", ["html"])
    found = {chart.name: chart for chart in made.charts}
    assert {name for name, chart in found.items() if chart.paint is None} == {"recall-scanned", "recall-steps", "ood"}
    assert "not split" in (tmp_path / "out/figures/latency.svg").read_text()
    assert all("--probe latency" in command for command in found["latency"].remedy)
    assert all("--probe-examples 1" in command for command in found["recall-steps"].remedy)
    assert "kvbench analyze ood" in (tmp_path / "out/report.html").read_text()
    assert not (tmp_path / "out/figures/ood.svg").exists()


def test_a_damaged_run_is_named_and_the_others_are_shown(copied):
    (only(copied, "quest-*-512-*") / "run.json").write_text("{")
    (only(copied, "quest-*-640-*") / "examples.jsonl").write_text('{"id": "a", "score": 1}\n')
    shown = Composed(copied)
    assert len(shown.found.runs) == 4
    assert len(shown.found.problems) == 2
    assert all("quest" in problem for problem in shown.found.problems)
    assert "Not everything could be shown" in shown.markdown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere is no folder"),
        (("empty",), "There is no run in"),
        (("damaged",), "no readable run"),
        (("empty", "--format", "docx"), "choose from html, md, pdf"),
        (("good", "--format", ","), "--format names no format: choose from html, md, pdf"),
        (("good", "--output", "file"), "file is a file: give --output a folder"),
    ],
)
def test_bad_input_is_one_sentence(runs, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("damaged").mkdir()
    Path("damaged/run.json").write_text("[]" if message == "no readable run" else "{}")
    Path("damaged/run.json").write_text("{")
    Path("file").write_text("in the way")
    Path("good").symlink_to(only(runs, "full-*-512-*"))
    with pytest.raises(KVBenchError, match=re.escape(message)):
        CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False)


# -- formats -----------------------------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.stack, self.problems = [], [], []
        self.void = {"meta", "link", "br", "img", "input", "path", "use", "image"}

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.void:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.void and self.stack.pop() != tag:
            self.problems.append(tag)


def test_the_page_is_self_contained_well_formed_and_labelled(report):
    tags = _Tags()
    text = (report[0] / "report.html").read_text()
    tags.feed(text)
    assert not tags.problems
    assert not tags.stack
    links = [value for _, found in tags.found for key, value in found.items() if key in ("src", "href", "xlink:href")]
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = [found["id"] for _, found in tags.found if "id" in found]
    assert len(ids) == len(set(ids))
    assert all(link[1:] in ids for link in links if link.startswith("#"))
    pictures = [found for tag, found in tags.found if tag == "svg"]
    assert len(pictures) == 7
    for picture in pictures:
        assert picture["role"] == "img"
        title, description = picture["aria-labelledby"].split()
        assert re.search(f"<desc id='{description}'>[^<]*[0-9][^<]*</desc>", text)
        assert {title, description} <= set(ids)
    heads = [found for tag, found in tags.found if tag == "th"]
    assert all("scope" in head for head in heads)
    (picture,) = [found for tag, found in tags.found if tag == "img"]
    assert re.search(r"overlap.*\d", picture["alt"])
    assert "data-theme" not in dict(tags.found[0][1])


def test_what_users_and_files_say_is_text_not_markup(copied, tmp_path):
    hostile = '<script>document.title="taken"</script> $x_1$ | `rm`'
    runs = [only(copied, "quest-*-512-*"), only(copied, "full-*-512-*")]
    for run in runs:
        edit(run, config={"model": hostile})
    made = build(runs, tmp_path / "out", ["html", "md"])
    text = (tmp_path / "out/report.html").read_text()
    assert text.count("<script>") == 1
    assert "&lt;script&gt;document" in text
    outside_code = re.sub(
        r"^```.*?^```|`kvbench run [^\n]*", "", (tmp_path / "out/report.md").read_text(), flags=re.M | re.S
    )
    assert "<script>" not in outside_code.replace("\\<script", "")
    assert made.found.runs[0].config["model"] == hostile


def test_markdown_links_to_its_figures_and_holds_the_table(report):
    output = report[0]
    text = (output / "report.md").read_text()
    titles = re.findall(r"^#+ (.*)", text, flags=re.M)
    anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 20
    assert all(target in anchors or (output / target).exists() for target in targets)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 6
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_the_pdf_has_pages_and_fonts_that_a_paper_accepts(report):
    content = (report[0] / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type /Page\b", content)) >= 9
    assert b"/Type3" not in content
    assert b"/CIDFontType2" in content


# -- the page in a browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; skips where there is none."""
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in found:
        pytest.skip("no chromium and chromedriver here: install Debian's packages chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
            "disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1]))
        yield driver
        driver.quit()


@pytest.fixture
def opened(browser, report):
    """Open the page at a width, in light or dark."""

    def open_page(width=1280, scheme="light"):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        features.append({"name": "prefers-reduced-motion", "value": "reduce"})  # no scrolling under a click
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get((report[0] / "report.html").resolve().as_uri())
        browser.execute_script("localStorage.clear()")
        browser.get_log("browser")
        browser.refresh()
        return browser

    return open_page


def test_it_loads_without_errors_or_network_and_shows_its_figures(opened):
    driver = opened()
    assert driver.get_log("browser") == []
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    sizes = driver.execute_script(
        "return [...document.querySelectorAll('svg.chart')].map(s => [s.getBoundingClientRect().width,"
        "s.getBoundingClientRect().height, s.querySelectorAll('path,use').length, s.querySelectorAll('text').length])"
    )
    assert len(sizes) == 7
    assert all(width > 300 and height > 100 and marks > 10 and texts > 5 for width, height, marks, texts in sizes)
    assert driver.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth > 0)") == [True]


def column(driver, title):
    """The sorting values of a column, top to bottom by task and length, and its heading."""
    heads = driver.execute_script(
        "return [...document.querySelectorAll('#board thead th')].map(h => h.innerText.trim())"
    )
    (place,) = [place for place, head in enumerate(heads) if head.startswith(title)]
    values = driver.execute_script(
        "return [...document.querySelectorAll('#board tbody')].map(b => [...b.querySelectorAll('tr:not(.group)')]"
        f".filter(r => r.checkVisibility()).map(r => r.cells[{place}].dataset.value))"
    )
    return values, driver.find_elements("css selector", "#board thead th")[place]


def is_sorted(groups, order):
    """Whether each task and length is in order by itself, what has no value last, either way."""
    for values in groups:
        numbers = [float(value) for value in values if value]
        assert all(value == "" for value in values[len(numbers) :])
        if numbers != sorted(numbers, reverse=order == "descending"):
            return False
    return len(groups) == len(LENGTHS)


def test_any_column_sorts_by_click(opened):
    driver = opened()
    count = len(driver.find_elements("css selector", "#board thead th"))
    for title, first in (("Accuracy", "descending"), ("TTFT", "ascending"), ("Difference", "descending")):
        for order in (first, "ascending" if first == "descending" else "descending"):
            head = column(driver, title)[1]
            driver.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", head)
            head.find_element("css selector", "button").click()
            assert is_sorted(column(driver, title)[0], order)
            assert head.get_attribute("aria-sort") == order
            assert driver.find_element("id", "said").text.endswith(f"{order}.")
            assert len(driver.find_elements("css selector", "#board [aria-sort]")) == 1
    assert count == len(driver.find_elements("css selector", "#board tbody[data-group='0'] tr:nth-child(2) > *"))
    region = "return document.getElementById('board').parentElement"
    assert driver.execute_script(f"{region}.scrollWidth <= {region.removeprefix('return ')}.clientWidth")
    driver.find_element("id", "board-all").click()
    assert driver.execute_script(f"{region}.scrollWidth > {region.removeprefix('return ')}.clientWidth")


def test_runs_are_found_by_words_and_by_task_and_length(opened):
    driver = opened()
    driver.find_element("id", "board-find").send_keys("quest 30%")
    assert [len(group) for group in column(driver, "Accuracy")[0]] == [1, 1]
    driver.find_element("css selector", "#board-group option[value='1']").click()
    assert [len(group) for group in column(driver, "Accuracy")[0]] == [0, 1]
    driver.find_element("id", "board-find").clear()
    driver.find_element("id", "board-find").send_keys("nothing like it")
    assert [len(group) for group in column(driver, "Accuracy")[0]] == [0, 0]


def test_examples_are_searched_and_stand_beside_each_other(opened, runs):
    driver = opened()
    rows = [json.loads(line) for line in (only(runs, "quest-*-640-*") / "examples.jsonl").read_text().splitlines()]
    driver.find_element("css selector", "#examples-group option[value='1']").click()
    driver.find_element("id", "examples-find").send_keys(rows[1]["references"][0])
    (card,) = driver.find_elements("css selector", ".example")
    assert card.find_element("css selector", "h3").text == rows[1]["id"]
    assert "infinitebench_passkey" in card.text
    assert [name.text.split("\n")[0] for name in card.find_elements("css selector", "h4")] == list(SCORES)
    texts = driver.execute_script(
        "return [...arguments[0].querySelectorAll('details pre, .answer:nth-child(2) pre')].map(e => e.textContent)",
        card,
    )
    assert texts == [rows[1]["prompt"], rows[1]["prediction"] or "(nothing)"]
    assert rows[1]["references"][0] in rows[1]["prompt"]
    assert "What is the pass key?" in rows[1]["prompt"]
    driver.find_element("id", "examples-runs").send_keys("quest")
    assert len(driver.find_elements("css selector", ".answer")) == 1
    driver.find_element("id", "examples-find").clear()
    driver.find_element("id", "examples-find").send_keys(" ")
    driver.find_element("id", "examples-differ").click()
    differing = sum(len(set(scores)) > 1 for scores in zip(*SCORES.values(), strict=True))
    assert len(driver.find_elements("css selector", ".example")) == differing


def test_the_keyboard_reaches_and_sorts_the_table(opened):
    from selenium.webdriver.common.keys import Keys

    driver = opened()
    body = driver.find_element("css selector", "body")
    body.send_keys(Keys.TAB)
    assert driver.switch_to.active_element.text == "Skip to the results"
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert driver.switch_to.active_element.get_attribute("id") == "main"
    for _ in range(40):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        if driver.switch_to.active_element.text.startswith("Accuracy"):
            break
    button = driver.switch_to.active_element
    assert driver.execute_script("return getComputedStyle(arguments[0]).outlineStyle", button) == "solid"
    for key, order in ((Keys.ENTER, "descending"), (Keys.SPACE, "ascending")):
        driver.switch_to.active_element.send_keys(key)
        groups, head = column(driver, "Accuracy")
        assert head.get_attribute("aria-sort") == order
        assert is_sorted(groups, order)
        assert driver.switch_to.active_element == button


def test_a_phone_scrolls_the_tables_not_the_page(opened):
    driver = opened(390)
    assert driver.execute_script("return document.documentElement.scrollWidth") == 390
    outside = driver.execute_script(
        "return [...document.querySelectorAll('p, li, h1, h2, h3, pre, summary, button')].filter(e => "
        "!e.closest('.scroll, .skip, .unseen') && e.getBoundingClientRect().right > 391).map(e => e.textContent)"
    )
    assert outside == []
    assert driver.execute_script("return parseFloat(getComputedStyle(document.body).fontSize)") >= 16
    board = "document.getElementById('board').parentElement"  # cards, which need no scrolling
    assert driver.execute_script(f"return {board}.scrollWidth <= {board}.clientWidth")
    driver.execute_script(
        "const by = document.getElementById('board-sort'); by.value = [...by.options].find("
        "one => one.text === 'TTFT, s').value; by.dispatchEvent(new Event('change'))"
    )
    assert is_sorted(column(driver, "TTFT, s")[0], "ascending")
    for details in driver.find_elements("css selector", "details"):
        driver.execute_script("arguments[0].open = true", details)
    assert driver.execute_script("return document.documentElement.scrollWidth") == 390


def luminance(rgb):
    """Relative luminance (WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_button_and_have_contrast(opened, scheme):
    driver = opened(scheme=scheme)

    def colours():
        found = driver.execute_script(
            "const probe = document.createElement('i'); document.body.append(probe); const found = {};"
            "for (const name of ['paper', 'surface', 'ink', 'muted', 'link', 'bad', 'good', 'note', 'focus']) {"
            "probe.style.color = `var(--${name})`; found[name] = getComputedStyle(probe).color }"
            "probe.remove(); return found"
        )
        return {name: luminance([float(v) for v in re.findall(r"[\d.]+", text)[:3]]) for name, text in found.items()}

    def contrast(first, second):
        return (max(first, second) + 0.05) / (min(first, second) + 0.05)

    def dark():
        return colours()["paper"] < 0.1

    assert dark() == (scheme == "dark")
    for _ in range(2):
        found = colours()
        for ink in ("ink", "muted", "link", "bad", "good"):
            for paper in ("paper", "surface", "note"):
                assert contrast(found[ink], found[paper]) >= 4.5, (ink, paper)
        assert contrast(found["focus"], found["paper"]) >= 3
        before = dark()
        driver.find_element("id", "theme").click()
        assert dark() != before
    driver.find_element("id", "theme").click()
    driver.refresh()
    assert dark() == (scheme == "light")  # the choice is kept


def test_links_open_what_they_lead_to(opened):
    driver = opened()
    driver.find_element("css selector", "#board tbody th a").click()
    target = driver.execute_script("return location.hash.slice(1)")
    place = driver.find_element("id", target)
    assert place.is_displayed()
    assert place.find_element("css selector", ".command pre").text.startswith("kvbench run --policy")
