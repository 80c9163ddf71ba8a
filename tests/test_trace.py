"""A request trace replayed: hits against a plain store, waiting against formulas, service times against their parts."""

import json
import math
import random

import pytest
from language import save_model

from kvbench.contract.errors import KVBenchError
from kvbench.report.charts import write
from kvbench.report.charts.prefixes import prefix_charts
from kvbench.report.collect import collect
from kvbench.serving.costs import FORMS, Costs
from kvbench.serving.queueing import waiting_times
from kvbench.serving.replay import first_token, replay, serve
from kvbench.serving.requests import BLOCK, Request, read_requests, statistics, write_requests
from kvbench.serving.stores import BlockStore, ContextStore
from kvbench.serving.synthetic import conversation


@pytest.fixture(scope="module")
def made():
    return conversation()


def test_the_made_trace_has_the_published_statistics(made):
    found = statistics(made)
    assert found["requests"] == 12_031
    assert found["mean_input_tokens"] == pytest.approx(12_035, abs=0.5)
    assert found["mean_output_tokens"] == pytest.approx(343, abs=0.5)
    assert found["block_hit_ratio"] == pytest.approx(0.374, abs=0.0005)


def test_a_trace_is_read_as_it_was_written(made, tmp_path):
    write_requests(tmp_path / "trace.jsonl", made[:50])
    assert read_requests(tmp_path / "trace.jsonl") == made[:50]


GOOD = {"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]}


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ("{", "line 2"),
        ("[]", "line 2: it is no JSON object"),
        ({**GOOD, "timestamp": -1}, "line 2: timestamp"),
        ({**GOOD, "timestamp": 4}, "line 2: timestamp 4 is before the previous line's 5"),
        ({**GOOD, "timestamp": math.nan}, "line 2: timestamp"),
        ({**GOOD, "input_length": 0}, "line 2: input_length"),
        ({**GOOD, "input_length": "600"}, "line 2: input_length"),
        ({**GOOD, "output_length": -1}, "line 2: output_length"),
        ({**GOOD, "hash_ids": [1]}, None),  # a prompt's last block may be left out where it is not full
        ({**GOOD, "hash_ids": []}, "line 2: 0 hash_ids are not the 2 blocks of 600 tokens"),
        ({**GOOD, "hash_ids": [1, 2, 3]}, "line 2: 3 hash_ids are not the 2 blocks"),
        ({**GOOD, "hash_ids": [1, "2"]}, "line 2: hash_ids.1"),
        ({"timestamp": 5}, "line 2: input_length"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, second, told):
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + (second if isinstance(second, str) else json.dumps(second)) + "\n")
    if told is None:
        assert len(read_requests(file)) == 2
        return
    with pytest.raises(KVBenchError, match=told) as error:
        read_requests(file)
    assert "\n" not in str(error.value)


def test_files_that_are_no_trace_are_refused(tmp_path):
    with pytest.raises(KVBenchError, match="cannot be read"):
        read_requests(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(KVBenchError, match="holds no request"):
        read_requests(tmp_path / "empty.jsonl")


def some(count=400, seed=0):
    """Requests of a few conversations, prompts of up to eight blocks."""
    draw, known, fresh, found = random.Random(seed), [()], 0, []
    for place in range(count):
        blocks = list(draw.choice(known[-20:]))[: draw.randint(0, 6)]
        while len(blocks) < draw.randint(1, 8):
            blocks.append(fresh := fresh + 1)
        known.append(tuple(blocks))
        found.append(Request(float(place), max(len(blocks), 1) * BLOCK - draw.choice((0, 100)), 5, tuple(blocks)))
    return [one for one in found if one.blocks]


@pytest.mark.parametrize("room", [3, 40, 200, None])
def test_blocks_leave_in_the_order_of_their_last_use(room):
    """Against a list of blocks with the time of their last use, searched from end to end."""
    used, clock, expected = {}, 0, []
    requests = some()
    for request in requests:
        hits = 0
        for block in request.blocks:
            if block not in used:
                break
            hits += 1
        expected.append(min(hits * BLOCK, request.input_tokens))
        for block in request.blocks[::-1]:
            clock += 1
            used[block] = clock
        while room is not None and len(used) > room:
            del used[min(used, key=used.get)]
    store = BlockStore(None if room is None else room * 1000 + 999, 1000)
    assert [store.take(request) for request in requests] == expected
    assert store.held == 1000 * len(used)
    if room is None:
        assert sum(expected) > 0.1 * sum(one.input_tokens for one in requests)


@pytest.mark.parametrize("room", [9, 60, None])
def test_contexts_are_hit_whole_or_not_at_all(room):
    """Against a list of contexts, the latest used last, searched for the longest that a prompt begins with."""
    held, expected = [], []
    requests = some(seed=1)
    for request in requests:
        whole = list(request.blocks[: request.input_tokens // BLOCK])
        fitting = [blocks for blocks in held if whole[: len(blocks)] == blocks]
        best = max(fitting, key=len, default=[])
        expected.append(len(best) * BLOCK)
        if best:
            held.remove(best)
            held.append(best)
        if whole and whole != best and (room is None or len(whole) <= room):
            held.append(whole)
        while room is not None and sum(map(len, held)) > room:
            held.pop(0)
    store = ContextStore(None if room is None else room * BLOCK, lambda tokens: tokens)
    assert [store.take(request) for request in requests] == expected
    assert store.held == BLOCK * sum(map(len, held))
    assert sum(expected) > 0


@pytest.mark.parametrize("exponential", [False, True])
def test_waiting_is_that_of_the_queue_by_its_formula(exponential):
    """Pollaczek and Khinchine: M/D/1 waits ρ/(2μ(1 − ρ)), M/M/1 ρ/(μ(1 − ρ))."""
    draw, rate, busy, at, arrivals = random.Random(3), 0.7, 1.0, 0.0, []
    for _ in range(20_000):
        at += draw.expovariate(rate)
        arrivals.append(at)
    times = [draw.expovariate(1 / busy) if exponential else busy for _ in arrivals]
    waited = waiting_times(arrivals, times, 1)
    expected = rate * busy / (1 - rate * busy) * busy * (1.0 if exponential else 0.5)
    assert sum(waited) / len(waited) == pytest.approx(expected, rel=0.08)
    two = waiting_times(arrivals, times, 2)
    assert 0 < sum(two) < 0.2 * sum(waited)


def costs(label, **coefficients):
    """Costs that were measured without an error, of these coefficients."""
    measured = {
        name: [
            (held, new, sum(a * x for a, x in zip(coefficients.get(name, ()), features(held, new), strict=False)))
            for held in (500, 1000, 2000, 4000) for new in (50, 700)
        ]
        for name, (features, _) in FORMS.items()
    }  # fmt: skip
    return Costs(label, measured, 10.0)


EXACT = {
    "prefill": (0.1, 1e-3, 1e-8), "load": (0.01, 1e-6), "save": (0.02, 1e-6), "state_bytes": (0, 10.0),
    "extend": (0.05, 1e-3, 1e-8), "step": (0.02, 1e-6),
}  # fmt: skip
INDEXED = {**EXACT, "index": (0.0, 1e-3, 0.0), "save": (0.02, 2e-6), "state_bytes": (0, 12.0), "step": (0.02, 1e-7)}


def test_fits_find_what_was_measured_and_requests_take_their_parts():
    full, ours = costs("full", **EXACT), costs("ours", **INDEXED)
    for name, fit in ours.fits.items():
        assert fit.worst < 1e-6, name
        assert fit.coefficients == pytest.approx(INDEXED[name], rel=1e-4, abs=1e-9)
    anew = 0.1 + 1e-3 * 3000 + 1e-8 * 3000**2 + 1e-3 * 3000
    assert first_token(ours, full, "keys", 0, 3000) == pytest.approx(anew, rel=1e-4)
    hit = 0.01 + 1e-6 * 2048 + 0.05 + 1e-3 * 952 + 1e-8 * 952 * 3000
    assert first_token(ours, full, "index", 2048, 3000) == pytest.approx(hit, rel=1e-4)
    assert first_token(ours, full, "keys", 2048, 3000) == pytest.approx(hit + 1e-3 * 3000, rel=1e-4)
    requests = [Request(0.0, 3000, 101, tuple(range(6))), Request(9.0, 3500, 1, tuple(range(7)))]
    served = serve(requests, ours, full, "index", None)
    assert served.hits == [0, 5 * BLOCK]
    assert served.held == [round(12 * 5 * BLOCK), round(12 * 11 * BLOCK)]
    steps = 100 * (0.02 + 1e-7 * 3050.5)
    assert served.busy_s[0] == pytest.approx(anew + steps + 0.02 + 2e-6 * 3000, rel=1e-4)


def test_a_replay_says_what_an_index_is_worth():
    requests = some()
    full, ours = costs("full", **EXACT), costs("ours", **INDEXED)
    found = replay(requests, [full, ours], limit=None, servers=2, speed=0.1)
    rows = {(row["policy"], row["kept"]): row for row in found["rows"]}
    assert set(rows) == {
        ("full", "nothing"), ("full", "keys"), ("ours", "nothing"), ("ours", "keys"), ("ours", "index"),
    }  # fmt: skip
    assert rows["full", "nothing"]["token_hit_ratio"] == 0
    assert rows["ours", "keys"]["token_hit_ratio"] >= rows["ours", "index"]["token_hit_ratio"] > 0
    assert rows["full", "keys"]["block_hit_ratio"] == pytest.approx(statistics(requests)["block_hit_ratio"])
    for row in rows.values():
        assert row["ttft_s"]["p50"] <= row["ttft_s"]["p90"] <= row["ttft_s"]["p99"]
    worth = found["break_even"][1]
    paid, gained = worth["paid_once_s"]["against_rebuilding"], worth["gained_by_a_hit_s"]["against_rebuilding"]
    assert worth["hits_against_rebuilding"] == pytest.approx(paid / gained)
    assert worth["hits_against_full"] == pytest.approx(
        worth["paid_once_s"]["against_full"] / worth["gained_by_a_hit_s"]["against_full"]
    )
    slower = replay(requests, [full, costs("slower", **{**INDEXED, "step": (0.03, 1e-6)})], limit=None, speed=0.1)
    assert slower["break_even"][1]["hits_against_full"] is None
    assert any("simulation" in note for note in found["notes"])
    with pytest.raises(KVBenchError, match="A store of 100 bytes holds no block of 512 tokens, which take 5120 bytes"):
        replay(requests, [full, ours], limit=100)
    slow = replay(requests, [full], limit=None, speed=50.0)
    assert any("cannot keep up" in note and "--speed" in note for note in slow["notes"])


@pytest.mark.transformers
def test_the_command_measures_replays_and_draws(kvbench, tmp_path):
    place, output = save_model(tmp_path / "model", max_position_embeddings=4096), tmp_path / "out"
    write_requests(tmp_path / "trace.jsonl", some(30))
    arguments = ("trace", tmp_path / "trace.jsonl", "--store", "1MiB", "--output", output)
    code, _, err = kvbench(*arguments)
    assert (code, "give one of --measure and --results DIR" in err) == (2, True)
    code, _, err = kvbench(*arguments, "--results", tmp_path)
    assert code == 2
    measured = ("--measure", "--model", place, "--policy", "quest", "--lengths", "400,512", "-o", "page_size=8")
    code, out, err = kvbench(*arguments, *measured)
    assert code == 0, err
    assert "A simulation:" in " ".join(out.split())
    for name in ("trace.json", "trace.csv", "reuse.csv", "trace.svg", "trace.png"):
        assert (output / name).stat().st_size > 100
    code, again, err = kvbench(*arguments, "--results", output / "runs", "--json")
    assert code == 0, err
    document = json.loads(again)
    assert [(row["policy"], row["kept"]) for row in document["rows"]] == [
        ("full", "nothing"), ("full", "keys"), ("quest", "nothing"), ("quest", "keys"), ("quest", "index"),
    ]  # fmt: skip
    assert all(fit["points"] >= 4 for fits in document["fits"].values() for fit in fits.values())
    code, _, err = kvbench(*arguments, "--results", output / "runs", "--policy", "pqcache")
    assert (code, "has no run of pqcache" in err) == (2, True)
    (chart,) = [one for one in prefix_charts(collect([output / "runs"])) if "400 tokens, 100" in one.title]
    assert {row["policy"] for row in chart.rows} == {"full", "quest"}
    assert "s with a hit" in chart.summary
    assert "50 to 80%" in chart.caption
    write(chart, output)
    assert (output / f"{chart.name}.svg").stat().st_size > 1000
