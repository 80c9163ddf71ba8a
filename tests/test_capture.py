"""A capture holds exactly the vectors that the model's attention saw, and readers refuse anything else."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from typer.testing import CliRunner
from zoo import tiny

import kvbench
from kvbench.capture.files import load_capture
from kvbench.capture.record import CaptureProbe, SourceText, capture, parse_layers, plan_capture, read_text
from kvbench.contract.errors import KVBenchError
from kvbench.models import LoadedModel

pytestmark = pytest.mark.transformers


class Letters:
    """One token for each character."""

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(character) % 90 for character in text]}


TEXT = SourceText("letters", "\n".join(f"line {i} of a short text" for i in range(40)))


@pytest.fixture(scope="module")
def loaded():
    model = tiny_model()
    return LoadedModel(model, Letters(), "tiny", "test", torch.device("cpu"), torch.float32, 4096)


def make(loaded, folder, *, chunk=16, **changes):
    settings = {"context_length": 60, "decode_tokens": 10, "layers": "0,2", **changes}
    return capture(plan_capture(loaded, TEXT, **settings), loaded, TEXT, folder, prefill_chunk=chunk)


def reference(model, ids, layer):
    """Post-rotary queries, and the keys and values of transformers' own cache, for all of `ids`."""
    seen = {}
    module = model.model.layers[layer].self_attn
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def hook(_, args, kwargs):
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        queries = module.q_proj(hidden).view(1, hidden.shape[1], 6, 8).transpose(1, 2)
        seen["queries"] = apply_rotary_pos_emb(queries, queries, *kwargs["position_embeddings"])[0]

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.inference_mode():
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    handle.remove()
    return {"queries": seen["queries"][0], "keys": cache.layers[layer].keys[0], "values": cache.layers[layer].values[0]}


@pytest.mark.parametrize("decoding", ["text", "greedy"])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_a_capture_holds_what_plain_transformers_computes(loaded, tmp_path, decoding, chunk):
    done = make(loaded, tmp_path / "c", decoding=decoding, chunk=chunk)
    text_ids = Letters()(TEXT.text)["input_ids"]
    ids = text_ids[:50] + list(done.manifest.decoded_ids)
    if decoding == "text":
        assert ids == text_ids[:60]
    for number in (0, 2):
        expected = reference(loaded.model, ids, number)
        layer = load_capture(done.path).layer(number)
        for name, tensor in expected.items():
            torch.testing.assert_close(getattr(layer.prompt, name), tensor[:, :50], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(getattr(layer.decode, name), tensor[:, 50:], atol=1e-4, rtol=1e-4)


def test_a_capture_is_described_verified_and_reused(loaded, tmp_path):
    done = make(loaded, tmp_path / "c")
    manifest = done.manifest
    assert (manifest.heads, manifest.kv_heads, manifest.head_dim, manifest.prompt_tokens) == (6, 2, 8, 50)
    assert manifest.config.text_sha256 == TEXT.sha256
    assert {file.name for file in manifest.files} == {p.name for p in done.path.iterdir()} - {"manifest.json"}
    done.verify()
    again = make(loaded, tmp_path / "c")
    assert again.reused
    assert again.manifest == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    with pytest.raises(KVBenchError, match=r"another capture \(decode_tokens 10, not 11"):
        make(loaded, tmp_path / "c", decode_tokens=11)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_vectors_are_stored_in_the_number_type_asked_for(loaded, tmp_path, dtype):
    layer = make(loaded, tmp_path / "c", dtype=dtype).layer(0)
    assert layer.prompt.queries.dtype == layer.decode.values.dtype == getattr(torch, dtype)


def test_only_the_asked_layers_keep_queries_and_the_policy_gets_what_it_asked_for(loaded, tmp_path):
    given = {}

    class Watch(kvbench.Probe):
        name, summary = "watch", "Notes how many queries a policy was given."

        def prefill(self, layer, queries, keys, values):
            kept = None if layer.prompt_queries is None else layer.prompt_queries.shape[2]
            given[layer.number] = queries.shape[2], kept
            return (yield)

    probe = CaptureProbe(tmp_path, [1])
    ids = torch.randint(3, 97, (1, 40))
    options = {"window": 8}
    with kvbench.attach(loaded.model, policy="snapkv", budget=24, options=options, probes=[Watch(), probe]):
        with_probe = loaded.model.generate(ids, max_new_tokens=8, do_sample=False)
    with kvbench.attach(loaded.model, policy="snapkv", budget=24, options=options):
        without = loaded.model.generate(ids, max_new_tokens=8, do_sample=False)
    assert given == {0: (8, None), 1: (8, 40), 2: (8, None)}
    assert torch.equal(with_probe, without)


def test_an_existing_folder_is_never_overwritten(loaded, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(KVBenchError, match="holds no capture"):
        make(loaded, folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


class Stopping:
    """Stops a model with Ctrl-C at its call number `after`, and counts the calls."""

    def __init__(self, model, after):
        self.after, self.calls = after, 0
        self._handle = model.register_forward_pre_hook(self._call)

    def _call(self, *_):
        self.calls += 1
        if self.calls > self.after:
            raise KeyboardInterrupt

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()


@pytest.mark.parametrize("decoding", ["text", "greedy"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_stopped_capture_goes_on_where_it_was_and_gives_the_same_bytes(tmp_path, monkeypatch, architecture, decoding):
    """Five chunks of the prompt and ten steps, stopped in the prompt and twice in the decoding."""
    model = tiny_model(architecture)
    loaded = LoadedModel(model, Letters(), "tiny", "test", torch.device("cpu"), torch.float32, 4096)
    settings = {"chunk": 10, "layers": "1,2" if architecture == "gemma3" else "0,2", "decoding": decoding}
    whole = make(loaded, tmp_path / "whole", **settings)
    monkeypatch.setattr("kvbench.capture.passing.EVERY_S", 0)
    for after in (3, 2 + 5, 1 + 3):  # what was read before is not read again, but for the prompt's last chunk
        with Stopping(model, after), pytest.raises(KeyboardInterrupt):
            make(loaded, tmp_path / "c", **settings)
        assert {path.name for path in tmp_path.iterdir()} == {"whole", ".c.partial"}
    with Stopping(model, 99) as counted:
        done = make(loaded, tmp_path / "c", **settings)
    assert counted.calls == 1 + 10 - 5 - 3
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "c"}
    assert done.manifest == whole.manifest
    done.verify()
    (again,) = tmp_path.glob("c/manifest.json")
    assert again.read_bytes() == (whole.path / "manifest.json").read_bytes()


def test_what_another_plan_or_a_damaged_file_left_is_read_anew(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("kvbench.capture.passing.EVERY_S", 0)
    for chunk in (10, 20):  # pieces of ten tokens are none of the second capture's
        with Stopping(loaded.model, 2), pytest.raises(KeyboardInterrupt):
            make(loaded, tmp_path / "c", chunk=chunk)
    (piece, *_) = sorted((tmp_path / ".c.partial" / "pieces").iterdir())
    piece.write_bytes(piece.read_bytes()[:-1])
    with Stopping(loaded.model, 99) as counted:
        done = make(loaded, tmp_path / "c", chunk=20)
    assert counted.calls == 3 + 10
    assert done.manifest == make(loaded, tmp_path / "whole", chunk=20).manifest


def test_a_failed_capture_leaves_nothing(loaded, tmp_path, monkeypatch):
    def fail(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(CaptureProbe, "finish", fail)
    with pytest.raises(KeyboardInterrupt):
        make(loaded, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "is no capture"),
        (lambda f: (f / "manifest.json").write_text("{"), "not JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is no capture"),
        (lambda f: _edit(f, schema=99), "schema version 99"),
        (lambda f: _edit(f, heads=0), "heads"),
        (lambda f: _edit(f, files=[]), "not those of its layers"),
        (lambda f: (f / "layer-000.prompt.safetensors").unlink(), "missing"),
        (lambda f: _cut(f / "layer-000.decode.safetensors"), r"has \d+ of \d+ bytes"),
    ],
)
def test_foreign_and_damaged_folders_are_refused(loaded, tmp_path, damage, message):
    folder = make(loaded, tmp_path / "c").path
    damage(folder)
    with pytest.raises(KVBenchError, match=message):
        load_capture(folder)


def _edit(folder: Path, **changes):
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _cut(file: Path):
    file.write_bytes(file.read_bytes()[:-8])


def test_a_changed_file_is_found_by_reading_or_verifying_it(loaded, tmp_path):
    done = make(loaded, tmp_path / "c")
    file = done.path / "layer-002.prompt.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(KVBenchError, match="SHA-256"):
        load_capture(done.path).verify()
    file.write_bytes(b"\xff" * len(content))
    with pytest.raises(KVBenchError, match=r"layer-002\.prompt"):
        _ = load_capture(done.path).layer(2).prompt.keys
    with pytest.raises(KVBenchError, match="has no layer 1: choose from 0, 2"):
        done.layer(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_tokens": 60}, "leave no prompt"),
        ({"decode_tokens": 0}, "leave no prompt"),
        ({"layers": "3"}, "no layer 3"),
        ({"layers": "first"}, "neither `all` nor"),
        ({"dtype": "int8"}, "not a number type"),
        ({"context_length": 5000}, "at most 4096"),
        ({"context_length": 4000}, "a longer text"),
    ],
)
def test_what_cannot_be_captured_is_said_before_anything_is_written(loaded, tmp_path, changes, message):
    with pytest.raises(KVBenchError, match=message):
        make(loaded, tmp_path / "c", **changes)
    assert list(tmp_path.iterdir()) == []


def test_the_seed_chooses_a_line_of_the_text(loaded):
    starts = {
        plan_capture(loaded, TEXT, context_length=60, decode_tokens=10, seed=seed).text_start for seed in (0, 1, 2)
    }
    assert len(starts) == 3
    assert all(start == 0 or TEXT.text[start - 1] == "\n" for start in starts)


def test_layers_are_sorted_and_counted_once():
    assert parse_layers("2, 0,2", 3) == (0, 2)
    assert parse_layers("all", 3) == (0, 1, 2)


def test_texts_are_read_from_files_or_from_python_itself(tmp_path):
    (tmp_path / "a.txt").write_text("é", "utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    assert read_text(str(tmp_path / "a.txt")).text == "é"
    assert len(read_text("default").text) > 1_000_000
    with pytest.raises(KVBenchError, match="not UTF-8"):
        read_text(str(tmp_path / "b.txt"))
    with pytest.raises(KVBenchError, match="cannot be read"):
        read_text(str(tmp_path / "missing.txt"))


@pytest.mark.parametrize(
    ("architecture", "seen"), [("gemma3", (1, 2)), ("falcon_h1", (0, 1, 2)), ("gemma3n_text", (1,))]
)
def test_all_layers_are_those_that_a_capture_sees_and_others_are_refused_before_it_runs(architecture, seen, tmp_path):
    model = tiny_model(architecture) if architecture == "gemma3" else tiny(architecture)
    loaded = LoadedModel(model, Letters(), "tiny", "test", torch.device("cpu"), torch.float32, 4096)
    made = make(loaded, tmp_path / "c", layers="all")
    assert made.manifest.config.layers == seen
    assert made.layer(seen[0]).prompt.keys.shape[1] == made.manifest.prompt_tokens
    if len(seen) < 3:
        with pytest.raises(KVBenchError, match=f"Layer 0 of tiny has no keys.*choose of {', '.join(map(str, seen))}, "):
            plan_capture(loaded, TEXT, context_length=60, decode_tokens=10, layers="0,1")


def test_a_model_of_which_nothing_can_be_captured_is_refused_before_it_runs():
    loaded = LoadedModel(
        tiny("deepseek_v32"), Letters(), "tiny", "test", torch.device("cpu"), torch.float32, 4096
    )  # fmt: skip
    with pytest.raises(KVBenchError, match=r"Deepseek.*so nothing of it can be captured"):
        plan_capture(loaded, TEXT, context_length=60, decode_tokens=10)


def test_a_batch_is_refused(loaded, tmp_path):
    probe = CaptureProbe(tmp_path, [0])
    with (
        kvbench.attach(loaded.model, policy="full", probes=[probe]),
        pytest.raises(KVBenchError, match="batch of one"),
    ):
        loaded.model(torch.randint(3, 97, (2, 20)))


def test_the_command_writes_a_manifest_and_json(loaded, tmp_path, monkeypatch):
    from kvbench import cli, models

    monkeypatch.setattr(models, "load_model", lambda *_, **__: loaded)
    (tmp_path / "t.txt").write_text(TEXT.text)
    arguments = ["capture", "--text", str(tmp_path / "t.txt"), "--context-length", "60", "--decode-tokens", "10"]
    result = CliRunner().invoke(cli.app, [*arguments, "--output", str(tmp_path / "c"), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["manifest"]["config"]["layers"] == [0, 1, 2]
    assert load_capture(document["folder"]).manifest.prompt_tokens == 50
    result = CliRunner().invoke(cli.app, [*arguments, "--output", str(tmp_path / "c"), "--rope-scaling", "ntk"])
    assert isinstance(result.exception, KVBenchError)


@pytest.mark.real
def test_the_embedded_model_is_extended_with_yarn_and_the_manifest_says_so(tmp_path):
    from kvbench.models import load_model

    text = read_text("default")
    loaded = load_model(context_length=8300, rope_scaling="yarn")
    settings = {"context_length": 8300, "decode_tokens": 4, "layers": "1", "rope_scaling": "yarn"}
    config = plan_capture(loaded, text, **settings)
    assert config.rope_scaling == "yarn"
    assert config.rope_parameters["factor"] == pytest.approx(8300 / 8192)
    short = SimpleNamespace(**{**vars(load_model(context_length=200, rope_scaling="yarn"))})
    assert plan_capture(short, text, context_length=200, decode_tokens=4, rope_scaling="yarn").rope_scaling is None
