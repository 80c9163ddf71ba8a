"""Whatever the files of a model hold: a result or one sentence, no traceback, and nothing of it is run."""

import random
import re
import shutil
import sys
from pathlib import Path

import pytest
from language import make_tokenizer
from model_fuzz import EVIL, mutate, write_gguf
from tiny import tiny_model

from kvbench.contract.errors import KVBenchError, check_output
from kvbench.models import load_model
from kvbench.runs.commit import commit

pytestmark = pytest.mark.transformers

FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect")
RUNS: list[str] = []
_watching = []


def _audit(event, arguments):
    if _watching and event in FORBIDDEN and "uname" not in str(arguments):
        RUNS.append(f"{event} {arguments}")


sys.addaudithook(_audit)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model as safetensors, and as GGUF."""
    plain, packed, tokenizer = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("packed"), make_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=1024, eos_token_id=1)
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    write_gguf(model, tokenizer, packed / "model.gguf")
    return {"plain": plain, "packed": packed}


@pytest.fixture
def run(kvbench, tmp_path, monkeypatch):
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    commit()  # asks git once in a process, where kvbench runs from its checkout

    def command(folder):
        """The exit code and the sentence of a run of this model."""
        RUNS.clear()
        _watching.append(True)
        code, _, err = kvbench("run", "--model", folder, "--policy", "streaming_llm", "--no-baseline", "--json",
                               "--context-length", 512, "--task", "infinitebench_passkey", "--examples", 1,
                               "--probe-examples", 0, "--output", tmp_path / "out")  # fmt: skip
        _watching.clear()
        assert not RUNS
        assert not (tmp_path / "ran").exists()
        errors = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert code in (0, 2), err
        assert len(errors) == (code == 2), err
        assert "Traceback" not in err
        return code, (errors or [""])[0]

    return command


@pytest.fixture
def copied(folders, tmp_path):
    def copy(kind):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders[kind], folder)
        (folder / "modeling_evil.py").write_text(EVIL.format(str(tmp_path / "ran")))
        return folder

    return copy


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_the_model_as_it_is_runs(kind, copied, run):
    assert run(copied(kind)) == (0, "")


@pytest.mark.parametrize(
    ("name", "rounds"),
    [("config.json", 14), ("tokenizer.json", 8), ("tokenizer_config.json", 10), ("generation_config.json", 6),
     ("chat_template.jinja", 6), ("model.safetensors", 14)],
)  # fmt: skip
def test_mutated_files_are_a_result_or_one_sentence(name, rounds, copied, run):
    lots, codes = random.Random(name), set()
    for _ in range(rounds):
        folder = copied("plain")
        mutate(folder / name, lots)
        codes.add(run(folder)[0])
    assert 2 in codes or name == "generation_config.json"


def test_a_mutated_gguf_is_a_result_or_one_sentence(copied, run):
    lots = random.Random(0)
    for _ in range(12):
        folder = copied("packed")
        mutate(folder / "model.gguf", lots)
        run(folder)


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("config.json", '"num_hidden_layers": 3', '"num_hidden_layers": 2000000', "hidden_layers=2000000: expected"),
        ("config.json", '"max_position_embeddings": 1024', '"max_position_embeddings": -4', "=-4: expected a whole"),
        ("config.json", '"hidden_act": "silu"', '"hidden_act": "llama"', r"could not be loaded \(it lacks llama\)"),
        ("config.json", '"model_type": "llama"', '"model_type": "t5"', "is an encoder-decoder model"),
        ("chat_template.jinja", "{%", "{% nothing %}{%", "The chat template of .* cannot be rendered"),
        ("generation_config.json", '"bos_token_id": 1', '"eos_token_id": {"a": 1}', "eos_token_id"),
    ],
)  # fmt: skip
def test_what_transformers_lets_through_is_named(name, old, new, said, copied, run):
    folder = copied("plain")
    file = folder / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    code, err = run(folder)
    assert code == 2
    assert re.search(said, err)


@pytest.mark.parametrize("name", ["x" * 300, "{loop}", "{loop}/y", "a\0b"])
def test_names_that_no_file_can_have_are_one_sentence(name, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    path = name.format(loop=tmp_path / "loop")
    with pytest.raises(KVBenchError, match=r"There is no model .*: check the path"):
        load_model(path)
    with pytest.raises(KVBenchError, match="--output"):
        check_output(Path(path))


def test_a_check_of_no_policy_is_an_error(kvbench, folders):
    for text in ("", ","):
        code, _, err = kvbench("check", "--model", folders["plain"], "--policy", text)
        assert (code, "names no policy" in err) == (2, True)
