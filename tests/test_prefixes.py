"""A store of contexts: found by their tokens, one's own only, and whole whatever happens while one is written."""

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from saving_process import go_on
from test_session import padded_batch
from tiny import budgeted_policies, shared_model, small_options, tiny_model, tokens

import kvbench
from kvbench.contract.errors import KVBenchError
from kvbench.plugins import registry

pytestmark = pytest.mark.transformers

QUEST = {"policy": "quest", "options": {"page_size": 4}, "budget": 24}
HERE = Path(__file__).parent


def kept(store, ids, mask=None, model=None, **given):
    """Read and save a context."""
    with kvbench.attach(model or shared_model(), **{**QUEST, **given}) as session, torch.no_grad():
        session.model(ids, attention_mask=mask)
        return store.save(session)


@pytest.fixture
def store(tmp_path):
    return kvbench.PrefixStore(tmp_path / "store")


def test_the_longest_context_is_found_and_goes_on_as_without_the_store(store):
    ids = tokens(1, 60)
    lengths = [kept(store, ids[:, :length]).tokens for length in (30, 44, 60)]
    assert lengths == [30, 44, 60]
    with kvbench.attach(shared_model(), **QUEST) as session:
        assert store.find(session, ids).tokens == 44  # a token is left to be read
        assert store.find(session, torch.cat([ids, ids], dim=1)).tokens == 60
        assert store.find(session, ids[:, 1:]) is None
        assert store.find(session, ids[:, :30]) is None
        assert store.load(session, ids).tokens == 44
        ours = go_on_with(session, ids[:, 44:])
    with kvbench.attach(shared_model(), **QUEST) as session:
        with torch.no_grad():
            session.model(ids[:, :44])
        assert torch.equal(go_on_with(session, ids[:, 44:]), ours)


def go_on_with(session, ids):
    with torch.no_grad():
        return session.model(ids, past_key_values=session.cache).logits


def test_padded_rows_are_found_whatever_stands_in_their_padding(store):
    ids, mask = padded_batch()
    kept(store, ids, mask)
    more = torch.cat([ids, tokens(3, 4, seed=9)], dim=1)
    longer = torch.cat([mask, mask.new_ones(3, 4)], dim=1)
    with kvbench.attach(shared_model(), **QUEST) as session:
        assert store.find(session, more.masked_fill(longer == 0, 7), longer).tokens == ids.shape[1]
        assert store.find(session, more) is None


def test_others_contexts_are_not_found_and_the_reason_is_said(store):
    ids = tokens(1, 60)
    kept(store, ids[:, :40])
    for given, told in (
        ({"model": tiny_model(seed=1)}, "was saved from another model"),
        ({"policy": "snapkv", "options": {"window": 8}}, "with policy 'quest', and this session has 'snapkv'"),
        ({"options": {"page_size": 8}}, "page_size=4, and this session has 8"),
        ({"budget": 25}, "a budget of tokens=24, and this session has tokens=25"),
    ):
        model = given.pop("model", None) or shared_model()
        with kvbench.attach(model, **{**QUEST, **given}) as session:
            assert store.find(session, ids) is None
            with pytest.raises(KVBenchError, match=told):
                store.load(session, ids)
    session = kvbench.attach(shared_model(), **QUEST)
    with session, pytest.raises(KVBenchError, match="holds no context that these 30 tokens begin with"):
        store.load(session, ids[:, :30])


def test_a_damaged_context_is_refused_and_stays(store):
    ids = tokens(1, 60)
    path = kept(store, ids[:, :40]).path
    path.write_bytes(path.read_bytes()[:-100])
    with kvbench.attach(shared_model(), **QUEST) as session:
        with pytest.raises(KVBenchError, match="no saved state that can be read"):
            store.load(session, ids)
        assert session.cache is None
    assert path.exists()


def test_the_least_recently_used_contexts_leave(tmp_path):
    one = kept(kvbench.PrefixStore(tmp_path / "one"), tokens(1, 40)).bytes
    store = kvbench.PrefixStore(tmp_path / "store", limit=int(2.5 * one))
    contexts = [tokens(1, 40, seed=seed) for seed in range(3)]
    for ids in contexts[:2]:
        kept(store, ids)
        time.sleep(0.02)
    with kvbench.attach(shared_model(), **QUEST) as session:
        more = [torch.cat([ids, ids], dim=1) for ids in contexts]
        store.load(session, more[0])
        time.sleep(0.02)
        kept(store, contexts[2], model=tiny_model())
        assert [store.find(session, ids) is not None for ids in more] == [True, False, True]
        assert len(store.prefixes()) == 2
    with pytest.raises(KVBenchError, match=r"holds \d+ bytes, and the store .* takes 1000"):
        kept(kvbench.PrefixStore(tmp_path / "store", limit=1000), contexts[0])


def test_what_a_policy_chose_without_the_question_is_said(store):
    said = {}
    for name in budgeted_policies():
        policy = registry().find("policy", name)(
            registry().options("policy", name, small_options(registry().find("policy", name)))
        )
        said[name] = policy.query_aware
    assert {name for name, text in said.items() if text} == {
        "chunkkv", "criticalkv", "double_sparsity", "duo_attention", "expected_attention", "h2o", "kascade",
        "oracle_future", "r_kv", "rocketkv", "snapkv", "squeezed_attention", "tova", "triattention",
    }  # fmt: skip
    assert kept(store, tokens(1, 40)).query_aware == ""
    found = kept(store, tokens(1, 40), budget=kvbench.Budget(tokens=24, allocator="ada"))
    assert found.query_aware == "budget 'ada' is shared by what the prompt's last queries attend to"
    assert kept(store, tokens(1, 40), policy="snapkv", options={"window": 8}).query_aware == said["snapkv"]


SAVING = """
import sys, torch, kvbench
from tiny import shared_model, tokens
store = kvbench.PrefixStore(sys.argv[1])
with kvbench.attach(shared_model(), policy="quest", options={"page_size": 4}, budget=24) as session, torch.no_grad():
    session.model(tokens(1, 400))
    print("ready", flush=True)
    for _ in range(int(sys.argv[2])):
        store.save(session)
"""


def saving(store, times, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        [sys.executable, "-c", SAVING, store.folder, str(times)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment, **more,
    )  # fmt: skip


def test_a_process_that_is_killed_while_it_saves_leaves_the_old_context_whole(store):
    ids = tokens(1, 400)
    kept(store, ids)
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    with kvbench.attach(shared_model(), **QUEST) as session:
        for seed in range(2):
            process = saving(store, 10**6)
            assert process.stdout.readline() == "ready\n"
            time.sleep(random.Random(seed).uniform(0.0, 0.4))
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert store.load(session, longer).tokens == 400
        (store.folder / f".a.kv~{socket.gethostname()}~{process.pid}~0123").mkdir()
        (store.folder / f".b.kv~{socket.gethostname()}~{os.getpid()}~0123").mkdir()  # of one that lives
        (store.folder / f".a.kv~{socket.gethostname()}~{process.pid}~0123" / ".tmp0123").touch()
    kept(store, ids)  # and removes what was left
    assert [path.name[:3] for path in store.folder.iterdir() if path.suffix != ".kv"] == [".b."]
    assert len(store.prefixes()) == 1


def test_two_processes_save_and_load_the_same_context(store):
    ids = tokens(1, 400)
    kept(store, ids)
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    writers = [saving(store, 15) for _ in range(2)]
    with kvbench.attach(shared_model(), **QUEST) as session:
        expected = None
        while any(process.poll() is None for process in writers):
            store.load(session, longer)
            found = go_on(shared_model(), session.cache, longer, None, 2)[0]
            assert expected is None or torch.equal(found, expected)
            expected = found
    for process in writers:
        assert process.returncode == 0, process.stderr.read()
    assert len(list(store.folder.iterdir())) == 1


def test_a_disk_that_is_full_leaves_the_store_as_it_was(store):
    path = kept(store, tokens(1, 400)).path
    before = path.read_bytes()

    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = saving(store, 1, preexec_fn=little_room)
    _, told = process.communicate()
    assert "KVBenchError: The state cannot be written to" in told
    assert "File too large" in told
    assert list(store.folder.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_store_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KVBenchError, match="is a file: give folder a folder"):
        kvbench.PrefixStore(tmp_path / "file")
    with pytest.raises(KVBenchError, match="0 bytes holds no context"):
        kvbench.PrefixStore(tmp_path, limit=0)
    with kvbench.attach(shared_model(), **QUEST) as session, pytest.raises(KVBenchError, match="read a prompt of"):
        kvbench.PrefixStore(tmp_path).save(session)
