"""The analyses against float64 formulas written out here, on captured vectors and on the traces of runs."""

import csv
import json
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import distance
from scipy.special import softmax
from test_capture import TEXT, Letters
from test_cli import model_folder  # noqa: F401
from tiny import tiny_model, tokens

from kvbench.analysis.studies import documents as studies
from kvbench.capture.files import load_capture
from kvbench.capture.record import capture, plan_capture
from kvbench.contract.errors import KVBenchError
from kvbench.engine.attach import attach
from kvbench.engine.generation import generate
from kvbench.models import LoadedModel
from kvbench.plugins import registry

HEADS, GROUPS, D = 6, 2, 8


def make(folder, architecture="llama", changes=None, **settings):
    loaded = LoadedModel(
        tiny_model(architecture, **(changes or {})), Letters(), "tiny", "test", torch.device("cpu"), torch.float32, 4096
    )
    config = plan_capture(loaded, TEXT, **{"context_length": 420, "decode_tokens": 40, "layers": "0,2", **settings})
    return capture(config, loaded, TEXT, folder)


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    return make(tmp_path_factory.mktemp("captures") / "c")


def analyse(captured, name, **options):
    return studies.analyse_capture(name, captured, options)


def vectors(captured, layer):
    found = captured.layer(layer)
    return {
        f"{part}_{name}": getattr(getattr(found, part), name).double().numpy()
        for part in ("prompt", "decode") for name in ("queries", "keys")
    }  # fmt: skip


def weights(captured, layer, head, step):
    """Exact attention of the query decoded at `step` over all tokens up to itself."""
    v = vectors(captured, layer)
    keys = np.concatenate([v["prompt_keys"][head // 3], v["decode_keys"][head // 3][: step + 1]])
    return softmax(keys @ v["decode_queries"][head][step] / np.sqrt(D))


def test_ood_is_scipys_distance_from_half_of_the_keys_and_says_its_samples(captured):
    document = analyse(captured, "ood", shrinkage=0.1, seed=3)
    row = next(row for row in document["rows"] if (row["layer"], row["head"]) == (2, 4))
    v = vectors(captured, 2)
    keys, queries, decoding = v["prompt_keys"][1], v["prompt_queries"][4], v["decode_queries"][4]
    rng = np.random.default_rng(3)
    key_order, query_order = rng.permutation(380), rng.permutation(380)

    def medians(sample, *points):
        covariance = 0.9 * np.cov(sample.T) + 0.1 * np.trace(np.cov(sample.T)) / D * np.eye(D)
        inverse = np.linalg.inv(covariance)
        return [np.median(distance.cdist(p, sample.mean(0)[None], "mahalanobis", VI=inverse)) for p in points]

    of_keys = medians(keys[key_order[:190]], keys[key_order[190:]], queries[query_order[190:]], decoding)
    of_queries = medians(queries[query_order[:190]], queries[query_order[190:]], decoding)
    names = ("keys_median", "queries_median", "decode_to_keys_median", "prompt_queries_median", "decode_queries_median")
    assert [row[name] for name in names] == pytest.approx([*of_keys, *of_queries], rel=1e-6)
    assert row["queries_over_keys"] == pytest.approx(of_keys[1] / of_keys[0])
    assert (row["key_samples"], row["query_samples"], row["keys_measured"], row["dimension"]) == (190, 190, 190, D)
    assert (row["shrinkage"], row["seed"], row["key_rank"], row["decode_queries_measured"]) == (0.1, 3, D, 40)
    for distribution, vectors_ in {(b["distribution"], b["vectors"]) for b in document["histogram"]}:
        bins = [b for b in document["histogram"] if (b["distribution"], b["vectors"]) == (distribution, vectors_)]
        assert sum(b["share"] for b in bins) == pytest.approx(1)
        assert [b["high"] for b in bins[:-1]] == [b["low"] for b in bins[1:]]


def test_recovery_follows_its_definition_for_every_k_with_and_without_sinks(captured):
    document = analyse(captured, "recovery", ks="5,50", steps=4)
    steps = [0, 13, 26, 39]
    for row in document["rows"]:
        if (row["layer"], row["head"]) != (2, 4):
            continue
        sinks, k = row["sinks_left_out"], row["k"]
        rows = [weights(captured, 2, 4, step)[sinks:] for step in steps]
        first = np.argsort(-rows[0])[:k]
        dynamic = [np.sort(w)[::-1][:k].sum() / w.sum() for w in rows[1:]]
        static = [w[first].sum() / w.sum() for w in rows[1:]]
        with_new = [w[sorted({*first, *range(380 - sinks, len(w))})].sum() / w.sum() for w in rows[1:]]
        expected = {"dynamic": dynamic, "static": static, "static_and_generated": with_new}
        assert {name: row[name] for name in expected} == pytest.approx({n: np.mean(x) for n, x in expected.items()})
    assert {(row["k"], row["sinks_left_out"]) for row in document["rows"]} == {(5, 0), (5, 4), (50, 0), (50, 4)}
    assert len(document["rows"]) == 2 * HEADS * 4


def test_sparsity_counts_tokens_and_shares_the_budget_by_the_largest_weights_of_all_heads(captured):
    rows = analyse(captured, "sparsity", steps=2, ratio=0.1)["rows"]
    everything = {
        step: {(n, h): np.pad(weights(captured, n, h, step), (0, 39 - step)) for n in (0, 2) for h in range(HEADS)}
        for step in (0, 39)
    }
    for percent in (90, 95, 99):
        row = next(row for row in rows if (row["layer"], row["head"]) == (2, 1))
        needed = [
            np.searchsorted(np.cumsum(np.sort(everything[step][2, 1])[::-1]), percent / 100) + 1 for step in (0, 39)
        ]
        assert row[f"tokens_for_{percent}"] == np.mean(needed)
    given = {(row["layer"], row["head"]): row["budget_share"] for row in rows}
    expected = dict.fromkeys(given, 0.0)
    for by_head in everything.values():
        ranked = sorted(((w, place) for place, row in by_head.items() for w in row), reverse=True)
        for _, place in ranked[: 42 * len(given)]:
            expected[place] += 1 / (42 * 2)
    assert given == pytest.approx(expected)
    assert np.mean(list(given.values())) == pytest.approx(1)


def test_overlap_counts_common_tokens_between_steps_heads_and_layers(captured):
    document = analyse(captured, "overlap", k=20, steps=4)
    sets = {
        (n, h): [set(np.argsort(-weights(captured, n, h, step))[:20]) for step in range(4)]
        for n in (0, 2) for h in range(HEADS)
    }  # fmt: skip

    def common(a, b):
        return np.mean([len(x & y) / 20 for x, y in zip(a, b, strict=True)])

    for row in document["rows"]:
        mine = sets[row["layer"], row["head"]]
        others = [sets[row["layer"], h] for h in range(HEADS) if h != row["head"]]
        assert row["next_step"] == pytest.approx(common(mine[:-1], mine[1:]))
        assert row["last_step"] == pytest.approx(len(mine[0] & mine[-1]) / 20)
        assert row["other_heads"] == pytest.approx(np.mean([common(mine, other) for other in others]))
        deeper = None if row["layer"] == 2 else common(mine, sets[2, row["head"]])
        assert row["next_captured_layer"] == pytest.approx(deeper)
    between = np.mean([common(sets[0, h], sets[2, h]) for h in range(HEADS)])
    assert [row["overlap"] for row in document["layers"]] == pytest.approx([1, between, between, 1])
    lag = [row["overlap"] for row in document["lags"] if (row["layer"], row["head"], row["lag"]) == (2, 3, 2)]
    assert lag == pytest.approx([common(sets[2, 3][:-2], sets[2, 3][2:])])


def test_recall_over_steps_with_and_without_insertion_is_that_of_the_index_against_exact_search(captured):
    document = analyse(captured, "recall", indexes="ivf,flat", k=10, sinks=2, window=16, points=5,
                       index_options={"ivf": {"nprobe": 2}})  # fmt: skip
    v = vectors(captured, 2)
    keys = np.concatenate([v["prompt_keys"], v["decode_keys"]], axis=1)

    def best(query, start, stop):
        return set(np.argsort(-(keys[1][start:stop] @ query))[:10])

    fixed, growing = (registry().make("index", "ivf", {"nprobe": 2}) for _ in range(2))
    for index in (fixed, growing):
        index.build(keys[:, 2:364].astype(np.float32), heads=HEADS)
    measured = {
        row["step"]: row for row in document["rows"] if (row["index"], row["layer"], row["head"]) == ("ivf", 2, 5)
    }
    assert sorted(measured) == [1, 11, 21, 30, 40]
    for step in range(40):
        stop = 380 + step + 1 - 16
        growing.insert(keys[:, stop - 1 : stop].astype(np.float32))
        if step + 1 not in measured:
            continue
        query = v["decode_queries"][:, step : step + 1].astype(np.float32)
        first, second = fixed.search(query, 10).ids[5, 0], growing.search(query, 10).ids[5, 0]
        exact = v["decode_queries"][5][step]
        row = measured[step + 1]
        assert row["recall_prompt"] == pytest.approx(len(best(exact, 2, 364) & set(first)) / 10)
        assert row["recall_inserted"] == pytest.approx(len(best(exact, 2, stop) & set(second)) / 10)
        assert row["recall_stale"] == pytest.approx(len(best(exact, 2, stop) & set(first)) / 10)
        assert row["keys"] == stop - 2
    exact_rows = [row for row in document["rows"] if row["index"] == "flat"]
    assert all(row["recall_prompt"] == row["recall_inserted"] == row["scanned_inserted"] == 1 for row in exact_rows)
    assert {row["insert_us_per_token"] > 0 for row in document["times"]} == {True}


def test_a_capture_holds_every_shorter_prompt(captured, tmp_path):
    shorter = make(tmp_path / "short", decode_tokens=120)
    options = {"indexes": "flat", "k": 5, "window": 8, "points": 3, "steps": 90}
    ours = analyse(captured, "recall", prompts="300", **options)["rows"]
    theirs = analyse(shorter, "recall", **options)["rows"]
    same = ("step", "keys", "layer", "head", "prompt_tokens", "recall_stale")
    assert [[row[name] for name in same] for row in ours] == [[row[name] for name in same] for row in theirs]
    assert {row["prompt_tokens"] for row in ours} == {300}
    assert max(row["step"] for row in ours) == 90


def test_insertion_comes_in_blocks_where_asked(captured):
    rows = analyse(captured, "recall", indexes="flat", k=5, window=8, points=40, insert_every=16)["rows"]
    assert {row["step"]: row["keys"] - 368 for row in rows} == {
        step: 16 * (step // 16) for step in range(1, 41)
    }  # fmt: skip


def test_construction_measures_every_length_on_the_first_keys(captured):
    rows = analyse(captured, "construction", indexes="ivf,flat", contexts="100,380", window=10)["rows"]
    assert [(row["index"], row["context"], row["layer"], row["keys"]) for row in rows[:4]] == [
        ("ivf", 100, 0, 86), ("ivf", 380, 0, 366), ("flat", 100, 0, 86), ("flat", 380, 0, 366),
    ]  # fmt: skip
    keys = captured.layer(2).prompt.keys[:, 4:90].numpy()
    index = registry().make("index", "ivf", {})
    index.build(keys, heads=HEADS)
    assert next(row["bytes"] for row in rows if (row["layer"], row["context"]) == (2, 100)) == index.nbytes
    assert all(row["build_s"] > 0 and row["peak_bytes"] >= 0 and row["insert_us_per_token"] > 0 for row in rows)
    contexts = {row["context"] for row in analyse(captured, "construction", indexes="flat", window=10)["rows"]}
    assert contexts == {380, 190, 95, 47}


def test_a_models_own_scaling_is_captured_and_used(tmp_path):
    scaled = make(tmp_path / "c", "gemma3", {"query_pre_attn_scalar": 2}, layers="1,2")
    assert scaled.scaling == pytest.approx(2**-0.5)
    v = vectors(scaled, 2)
    keys = np.concatenate([v["prompt_keys"][0], v["decode_keys"][0][:1]])
    w = softmax(keys @ v["decode_queries"][0][0] / np.sqrt(2))
    row = analyse(scaled, "sparsity", steps=1)["rows"][HEADS]
    assert row["tokens_for_90"] == np.searchsorted(np.cumsum(np.sort(w)[::-1]), 0.9) + 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ood", {"shrinkage": 2}, "shrinkage=2 of analysis 'ood' is not valid"),
        ("odd", {}, "Unknown analysis 'odd': did you mean ood"),
        ("recovery", {"ks": "400"}, "k = 400 tokens needs two decoding steps and a longer prompt than 380"),
        ("recovery", {"ks": "0"}, "greater than or equal to 1"),
        ("recovery", {"ks": ""}, "at least 1 item"),
        ("overlap", {"k": 380}, "Overlap of the top 380 needs two decoding steps"),
        ("recall", {"indexes": "floot"}, "Unknown index 'floot': did you mean flat"),
        ("recall", {"prompts": "60"}, "A prompt of 60 tokens, with 4 sinks and a window of 64, leaves nothing"),
        ("recall", {"index_options": {"ivf": {"nprobe": 1}}}, "Options of index 'ivf', which is not measured"),
        ("construction", {"contexts": "60,400"}, "do not fit a captured prompt of 380"),
    ],
)
def test_what_a_capture_cannot_serve_is_refused(captured, name, options, message):
    with pytest.raises(KVBenchError, match=re.escape(message)):
        analyse(captured, name, **options)


def test_heads_without_a_covariance_are_marked_and_none_at_all_is_an_error(captured, tmp_path, monkeypatch):
    few = make(tmp_path / "few", context_length=20, decode_tokens=6)
    with pytest.raises(KVBenchError, match="No head has a covariance: 7 samples are too few for a covariance of dim"):
        analyse(few, "ood")
    assert len(analyse(few, "ood", shrinkage=0.2)["rows"]) == 2 * HEADS
    flat = make(tmp_path / "flat")
    layer = type(flat).layer

    def broken(self, number):
        found = layer(self, number)
        queries = found.prompt.queries
        if number == 0:  # layers with unequal numbers of heads
            queries[0, :, 3] = 0.5
        queries[1, 7, 0] = torch.nan
        return type(found)(number, _Replaced(found.prompt, queries), found.decode)

    monkeypatch.setattr(type(flat), "layer", broken)
    document = analyse(flat, "ood")
    reasons = {row["head"]: row["missing"] for row in document["rows"] if row["layer"] == 0}
    assert "singular (rank 7 of 8)" in reasons[0]
    assert "NaN or infinite" in reasons[1]
    assert reasons[2] == ""
    (partial,) = document["partial"]
    assert partial.startswith("3 of 12 heads could not be measured, since: The ")
    assert "is singular (rank 7 of 8): use the pseudo-inverse" in partial and "(1 head)" in partial
    assert "hold NaN or infinite values: measure vectors that are finite (2 heads)" in partial
    studies.write(document, tmp_path / "out")
    assert "PARTIAL: 3 of 12 heads could not be measured" in (tmp_path / "out" / "ood.svg").read_text()
    full_rank = analyse(flat, "ood", pseudo_inverse=True)["rows"][0]
    assert (full_rank["query_rank"], full_rank["missing"]) == (7, "")


class _Replaced:
    def __init__(self, part, queries):
        self.queries, self.keys, self.values = queries, part.keys, part.values


@pytest.mark.parametrize("name", ["ood", "recovery", "recall", "sparsity", "overlap", "construction"])
def test_every_analysis_writes_its_tables_and_a_figure_with_text_and_units(captured, tmp_path, name):
    options = {"recall": {"indexes": "flat", "k": 5, "points": 4}, "construction": {"indexes": "ivf"},
               "recovery": {"ks": "5,50"}, "overlap": {"k": 5}}.get(name, {})  # fmt: skip
    document = studies.analyse_capture(name, captured, options, layers=[2], heads=[0, 3])
    assert {row["layer"] for row in document["rows"]} == {2}
    studies.write(document, tmp_path)
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert len(rows) == len(document["rows"])
    assert set(rows[0]) == set(document["rows"][0])
    assert json.loads((tmp_path / f"{name}.json").read_text())["summary"] == document["summary"]
    svg = (tmp_path / f"{name}.svg").read_text()
    assert f"{name}: tiny, 380 + 40 tokens" in svg
    assert "<text" in svg
    assert re.search(r"\((share|σ|tokens|%|s, log|MiB)|share in common|layer|over the uniform", svg)
    assert round(Image.open(tmp_path / f"{name}.png").info["dpi"][0]) == 300


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model_folder):  # noqa: F811
    """Runs of `quest` and `flat`, of one example each out of two, with the traces of a short generation."""
    from kvbench.contract.budget import Budget
    from kvbench.models import load_model
    from kvbench.runs.results import Run
    from kvbench.runs.runner import Request, environment_of, plan
    from kvbench.runs.traces import write_trace

    loaded = load_model(str(model_folder), context_length=512)
    folders = []
    for policy in ("quest", "flat"):
        request = Request(
            policy=policy, policy_options={}, budget=Budget(ratio=0.5), task="niah_single_1", task_options={},
            context_length=512, examples=2, seed=1, probes=("overlap",) if policy == "quest" else (),
        )  # fmt: skip
        config = plan(request, loaded)
        run = Run(tmp_path_factory.mktemp("runs"), config, environment_of(loaded))
        with run.writing():
            names = ("recall", "recovery", *config.probes)
            with attach(loaded.model, policy=policy, budget=config.budget, probes=names) as session:
                generation = generate(session, tokens(1, 200)[0].tolist(), prompt_tokens=200, max_new_tokens=12)
            columns = {name: c for probe in session.probes for name, c in probe.trace().items() if c}
            write_trace(run.path / "traces" / "000000.safetensors", columns, example="a", prompt_tokens=200)
            run.append({
                "id": "a", "score": 1.0, "prediction": "", "references": [], "prompt_tokens": 200, "info": {},
                "generated_tokens": 12, "prefill_s": generation.prefill_s, "index_s": generation.index_s,
                "step_s": generation.step_s, "bytes": generation.bytes, "peak_memory_bytes": 1,
                "probes": {name: value for probe in session.probes for name, value in probe.result().items()},
                "probed_step_s": [2 * step for step in generation.step_s], "trace": "traces/000000.safetensors",
            })  # fmt: skip
        folders.append(run.path)
    return folders


def test_a_runs_traces_are_shown_by_step_and_by_head(run_folder, tmp_path):
    from kvbench.runs.traces import read_trace

    document = studies.analyse_runs("recovery", run_folder, {})
    trace = read_trace(next((run_folder[0] / "traces").iterdir()))
    mine = [row for row in document["rows"] if row["run"] == "quest"]
    for name in ("recovered_mass", "dynamic_mass", "static_mass_without_sinks"):
        column = trace.columns[name]
        assert [row[name] for row in mine] == pytest.approx(np.nanmean(column, axis=(1, 2)), rel=1e-6)
        head = next(row for row in document["heads"] if (row["run"], row["layer"], row["head"]) == ("quest", 1, 2))
        assert head[name] == pytest.approx(np.nanmean(column[:, 1, 2]), rel=1e-6)
    assert [row["step"] for row in mine] == [int(p) - trace.prompt_tokens for p in trace.positions]
    assert {row["run"] for row in document["rows"]} == {"quest", "flat"}
    assert all(row["recovered_mass"] <= row["dynamic_mass"] + 1e-6 for row in document["rows"])
    studies.write(document, tmp_path)
    assert "recovered mass" in (tmp_path / "recovery.svg").read_text()
    assert (tmp_path / "recovery-heads.csv").exists()
    studies.write(studies.analyse_runs("recall", run_folder, {}), tmp_path)
    assert {row["run"] for row in studies.analyse_runs("overlap", run_folder[:1], {})["rows"]} == {"quest"}


def test_a_run_without_the_probe_names_the_command_that_records_it(run_folder):
    with pytest.raises(KVBenchError, match=r"has no trace of tokens_for_90: this command records it.*--probe sparsity"):
        studies.analyse_runs("sparsity", run_folder[:1], {})
    with pytest.raises(KVBenchError, match="needs vectors, which no run stores"):
        studies.analyse_runs("ood", run_folder, {})
    with pytest.raises(KVBenchError, match="Options go with an analysis of vectors"):
        studies.analyse_runs("recall", run_folder, {"k": 3})
    with pytest.raises(KVBenchError, match="same run was given twice"):
        studies.analyse_runs("recall", [run_folder[0]] * 2, {})


def test_the_command_that_is_named_makes_that_run(run_folder, kvbench, monkeypatch):
    config = json.loads((run_folder[0] / "run.json").read_text())["config"]
    with pytest.raises(KVBenchError) as told:
        studies.analyse_runs("sparsity", run_folder[:1], {})
    words = shlex.split(str(told.value).partition("a choice: ")[2])
    planned = []

    def execute(configs, *_, **__):
        planned.extend(config.model_dump(mode="json") for config in configs)
        raise KVBenchError("stop here")

    monkeypatch.setattr("kvbench.runs.runner.execute", execute)
    assert kvbench(*words[1:])[0] == 2
    (plugins,) = (one["plugins"] for one in planned)
    assert {name: found for name, found in plugins.items() if name != "probe sparsity"} == config["plugins"]
    assert planned == [{**config, "probes": ["overlap", "sparsity"], "plugins": plugins}]


def test_an_unfinished_run_is_marked_partial_and_an_empty_one_refused(run_folder, tmp_path):
    import shutil

    partial = shutil.copytree(run_folder[0], tmp_path / "partial")
    content = json.loads((partial / "run.json").read_text())
    (partial / "run.json").write_text(json.dumps({**content, "status": "interrupted"}))
    document = studies.analyse_runs("recall", [partial], {})
    assert document["partial"] == ["quest: 1 of 2 examples, interrupted"]
    studies.write(document, tmp_path / "out")
    assert "PARTIAL: quest: 1 of 2 examples, interrupted" in (tmp_path / "out" / "recall.svg").read_text()
    shutil.rmtree(partial / "traces")
    (partial / "examples.jsonl").write_bytes(b"")
    with pytest.raises(KVBenchError, match=r"has no finished example: this command records it.*kvbench run"):
        studies.analyse_runs("recall", [partial], {})
    with pytest.raises(KVBenchError, match="is no readable run"):
        studies.analyse_runs("recall", [tmp_path / "nothing"], {})


# -- the command -----------------------------------------------------------------------------------------------------


def test_analyze_captures_first_and_reuses_the_capture(kvbench, model_folder, tmp_path):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i % 97}" for i in range(4000)))
    small = ("--model", model_folder, "--text", text, "--context-length", 300, "--decode-tokens", 8, "--layers", "1",
             "--output", tmp_path / "out")  # fmt: skip
    code, out, err = kvbench("analyze", "recovery", *small, "-o", "ks=5,20", "-o", "steps=4", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["schema"], document["analysis"], document["options"]["ks"]) == (1, "recovery", [5, 20])
    assert {row["layer"] for row in document["rows"]} == {1}
    assert len(list((tmp_path / "out").glob("capture-*"))) == 1
    made = load_capture(next((tmp_path / "out").glob("capture-*"))).manifest
    assert made.prompt_tokens == 292
    code, out, err = kvbench("analyze", "sparsity", *small)
    assert code == 0, err
    assert "budget share" in " ".join(out.split())
    assert len(list((tmp_path / "out").glob("capture-*"))) == 1
    assert {p.suffix for p in (tmp_path / "out").glob("sparsity*")} == {".csv", ".json", ".svg", ".png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ood", "--capture", "nowhere"), "is no capture"),
        (("recall", "--run", "nowhere"), "is no readable run"),
        (("recall", "--run", "a", "--capture", "b"), "one source"),
        (("recall", "--run", "a", "--layers", "1"), "leave them out"),
        (("recal",), "did you mean recall"),
        (("recall", "-o", "indices=ivf"), "its options are: indexes, k"),
        (("ood", "-o", "shrinkage=much"), "shrinkage='much' of analysis 'ood' is not valid"),
    ],
)
def test_bad_input_of_analyze_is_one_sentence_and_exit_code_2(kvbench, tmp_path, arguments, message):
    code, out, err = kvbench("analyze", *arguments, "--output", tmp_path)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
