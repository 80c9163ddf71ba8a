"""The contract of tasks, and RULER's needle tasks."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from language import THINKS, make_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from kvbench.contract.errors import KVBenchError
from kvbench.tasks import Example, ForcedTask, Task, encode, fill, kvbench_tasks, prompt_length
from kvbench.tasks.metrics import string_match_all, string_match_part
from kvbench.tasks.ruler import (
    DEPTHS,
    NeedleTask,
    NiahMultikey1,
    NiahMultikey2,
    NiahMultikey3,
    NiahMultiquery,
    NiahMultivalue,
    NiahSingle1,
    NiahSingle2,
    NiahSingle3,
)
from kvbench.tasks.texts import NOISE, essays

pytestmark = pytest.mark.transformers

NEEDLE_TASKS = [
    NiahSingle1,
    NiahSingle2,
    NiahSingle3,
    NiahMultikey1,
    NiahMultikey2,
    NiahMultikey3,
    NiahMultivalue,
    NiahMultiquery,
]


@pytest.fixture(scope="module")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat_template=None)


def one(task, tokenizer, length=1024, index=0, seed=42):
    return list(task().examples(tokenizer, context_length=length, count=index + 1, seed=seed))[index]


# Prompts


def test_the_prompt_is_the_template_with_the_prefix_after_it(tokenizer):
    example = Example("x/1", "Some context.\n", "What is it?", "It is", ("7",), 8)
    prompt = encode(tokenizer, example)
    text = tokenizer.decode(prompt.input_ids)
    assert text == "<bos><|turn|>user\nSome context.\nWhat is it?<|end|>\n<|turn|>assistant\nIt is"
    assert prompt.input_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(prompt.input_ids[: prompt.context_tokens]) == "<bos><|turn|>user\nSome context.\n"
    assert prompt_length(tokenizer, example) == len(prompt.input_ids)


def test_without_a_template_the_text_follows_one_bos():
    tokenizer = make_tokenizer(chat_template=None)
    prompt = encode(tokenizer, Example("x/1", "Some context.\n", "What is it?", "It is", ("7",), 8))
    assert tokenizer.decode(prompt.input_ids) == "<bos>Some context.\nWhat is it? It is"
    assert tokenizer.decode(prompt.input_ids[: prompt.context_tokens]) == "<bos>Some context.\n"


def test_without_a_template_a_tokenizer_without_bos_gets_none():
    tokenizer = make_tokenizer(chat_template=None)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    prompt = encode(tokenizer, Example("x/1", "Some context.\n", "What is it?", "", ("7",), 8))
    assert tokenizer.decode(prompt.input_ids) == "Some context.\nWhat is it?"


@pytest.mark.parametrize(
    ("template", "opened"),
    [
        (THINKS, "<think>\n"),
        (THINKS.replace("<think>\n", "<think>"), "<think>"),
        (THINKS.replace("<think>", "<seed:think>"), "<seed:think>\n"),
        (THINKS.replace("<think>", "<|channel>thought"), "<|channel>thought\n"),
    ],
)
def test_a_turn_that_begins_inside_a_thinking_block_gets_no_answer_prefix(template, opened):
    tokenizer = make_tokenizer(template)
    example = Example("x/1", "Some context.\n", "What is it?", "It is", ("7",), 8)
    prompt = encode(tokenizer, example)
    header = f"<bos><|turn|>user\nSome context.\nWhat is it?<|end|>\n<|turn|>assistant\n{opened}"
    assert (tokenizer.decode(prompt.input_ids), prompt.prefix_left_out) == (header, True)
    assert prompt_length(tokenizer, example) == len(prompt.input_ids)
    told = encode(tokenizer, dataclasses.replace(example, thinking_prefix=True))
    assert (tokenizer.decode(told.input_ids), told.prefix_left_out) == (header + "It is", False)
    assert not encode(tokenizer, dataclasses.replace(example, answer_prefix="")).prefix_left_out


def test_a_thinking_block_that_the_template_closes_changes_nothing():
    tokenizer = make_tokenizer(THINKS.replace("<think>\n", "<think>\n\n</think>\n\n"))
    prompt = encode(tokenizer, Example("x/1", "A <think> is text.\n", "What is it?", "It is", ("7",), 8))
    assert tokenizer.decode(prompt.input_ids).endswith("assistant\n<think>\n\n</think>\n\nIt is")
    assert not prompt.prefix_left_out
    assert not encode(make_tokenizer(), Example("x/1", "A <think> is text.\n", "", "It", ("7",), 8)).prefix_left_out


def test_the_option_thinking_prefix_reaches_the_examples():
    tokenizer = make_tokenizer(THINKS)
    for option in (False, True):
        task = NiahSingle1(NiahSingle1.Options(thinking_prefix=option))
        (example,) = task.examples(tokenizer, context_length=512, count=1, seed=1)
        text = tokenizer.decode(encode(tokenizer, example).input_ids)
        assert text.endswith(example.answer_prefix if option else "<think>\n")
        assert 0.9 * 512 <= prompt_length(tokenizer, example) + example.max_new_tokens <= 512


def test_solved_questions_are_turns_of_their_own_and_belong_to_the_context(tokenizer, plain_tokenizer):
    example = Example("x/1", "Two.\n", "And?", " It is", ("7",), 8, solved=(("One.\nAnd?", " It is 1"),))
    prompt = encode(tokenizer, example)
    assert tokenizer.decode(prompt.input_ids) == (
        "<bos><|turn|>user\nOne.\nAnd?<|end|>\n<|turn|>assistant\nIt is 1<|end|>\n"
        "<|turn|>user\nTwo.\nAnd?<|end|>\n<|turn|>assistant\n It is"
    )
    assert tokenizer.decode(prompt.input_ids[: prompt.context_tokens]).endswith("<|turn|>user\nTwo.\n")
    plain = encode(plain_tokenizer, example)
    assert plain_tokenizer.decode(plain.input_ids) == "<bos>One.\nAnd? It is 1\nTwo.\nAnd? It is"
    assert plain_tokenizer.decode(plain.input_ids[: plain.context_tokens]) == "<bos>One.\nAnd? It is 1\nTwo.\n"


def test_a_token_across_the_border_belongs_to_the_question(tokenizer):
    whole = tokenizer(" statement", add_special_tokens=False)["input_ids"]
    assert len(whole) == 1, "the test needs a word that is one token"
    prompt = encode(tokenizer, Example("x/1", "A state", "ment?", "", ("7",), 8))
    assert tokenizer.decode(prompt.input_ids[: prompt.context_tokens]) == "<bos><|turn|>user\nA"
    assert tokenizer.decode(prompt.input_ids[prompt.context_tokens :]).startswith(" statement?<|end|>")


def test_text_that_the_template_trims_is_still_split_rightly(tokenizer):
    prompt = encode(tokenizer, Example("x/1", "\n\n  Some context.\n", "What is it?\n ", "", ("7",), 8))
    assert tokenizer.decode(prompt.input_ids[: prompt.context_tokens]) == "<bos><|turn|>user\nSome context.\n"


def test_text_beyond_ascii_is_split_rightly(tokenizer):
    prompt = encode(tokenizer, Example("x/1", "Ünïcödé 😀 文字\n", "Où?", "", ("7",), 8))
    assert tokenizer.decode(prompt.input_ids[: prompt.context_tokens]) == "<bos><|turn|>user\nÜnïcödé 😀 文字\n"


@given(context=st.text(max_size=60), question=st.text(max_size=30), prefix=st.text(max_size=10), chat=st.booleans())
@settings(max_examples=200, deadline=None)
def test_both_parts_are_exactly_the_whole_prompt(tokenizer, plain_tokenizer, *, context, question, prefix, chat):
    assume(context.strip() and question.strip())
    used = tokenizer if chat else plain_tokenizer
    prompt = encode(used, Example("x/1", context, question, prefix, ("7",), 8))
    before = used.decode(prompt.input_ids[: prompt.context_tokens])
    after = used.decode(prompt.input_ids[prompt.context_tokens :])
    if chat:
        message = (context + question).strip()
        assert before + after == f"<bos><|turn|>user\n{message}<|end|>\n<|turn|>assistant\n{prefix}"
        whole = used(before + after, add_special_tokens=False)["input_ids"]
        assert f"<bos><|turn|>user\n{context.lstrip()}".startswith(before)
    else:
        between = " " if prefix and not prefix[0].isspace() else ""
        assert before + after == f"<bos>{context}{question}{between}{prefix}"
        whole = [0, *used((before + after).removeprefix("<bos>"), add_special_tokens=False)["input_ids"]]
        assert f"<bos>{context}".startswith(before)
    assert prompt.input_ids == whole


def test_an_example_without_text_is_refused(tokenizer):
    with pytest.raises(KVBenchError, match="Example x/1 has neither context nor question"):
        encode(tokenizer, Example("x/1", " \n", "", "", ("7",), 8))


def test_a_template_that_changes_the_text_is_refused():
    tokenizer = make_tokenizer("{{ messages[0]['content'] | upper }}")
    with pytest.raises(KVBenchError, match="chat template changes the text"):
        encode(tokenizer, Example("x/1", "Some context.\n", "What is it?", "", ("7",), 8))


# Filling


def _example_of(units: int) -> Example:
    return Example("filled/1", "word " * units, "?", "", ("7",), 20)


@pytest.mark.parametrize("length", [100, 333, 1000, 4096])
def test_fill_reaches_the_length_and_never_passes_it(tokenizer, length):
    example = fill(tokenizer, _example_of, context_length=length)
    assert 0.9 * length <= prompt_length(tokenizer, example) + 20 <= length


def test_fill_takes_few_builds(tokenizer):
    built = []

    def build(units):
        built.append(units)
        return _example_of(units)

    fill(tokenizer, build, context_length=20_000)
    assert len(built) <= 6


def test_fill_stops_at_the_largest(tokenizer):
    with pytest.raises(KVBenchError, match="filled cannot fill 4096 tokens"):
        fill(tokenizer, _example_of, context_length=4096, largest=100)


def test_fill_names_the_smallest_length_that_works(tokenizer):
    with pytest.raises(KVBenchError, match="A context of 30 tokens is too small for filled") as error:
        fill(tokenizer, _example_of, context_length=30)
    least = int(re.search(r"at least (\d+)\.", str(error.value)).group(1))
    assert prompt_length(tokenizer, _example_of(1)) + 20 == least


def test_fill_copes_with_units_of_very_different_lengths(tokenizer):
    def build(units):
        return Example(
            "filled/1", "".join("a b c d e f " if n > 100 else "a " for n in range(units)), "?", "", ("7",), 20
        )

    example = fill(tokenizer, build, context_length=3000)
    assert 2700 <= prompt_length(tokenizer, example) + 20 <= 3000


# RULER


def test_niah_single_1_has_the_published_wording(tokenizer):
    example = one(NiahSingle1, tokenizer)
    key = re.search(r"for (\S.*) mentioned", example.question).group(1)
    (value,) = example.references
    assert re.fullmatch(r"[1-9]\d{6}", value)
    first, *lines, last = example.context.split("\n")
    assert first == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert last == ""
    assert lines.count(f"One of the special magic numbers for {key} is: {value}.") == 1
    assert lines.count(NOISE) == len(lines) - 1 == example.info["haystack_units"]
    assert NOISE == "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    assert example.question == f"What is the special magic number for {key} mentioned in the provided text?"
    assert example.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"
    assert example.max_new_tokens == 128
    (old,) = NiahSingle1(NiahSingle1.Options(release="2024")).examples(tokenizer, context_length=1024, count=1, seed=42)
    assert old.answer_prefix == example.answer_prefix.strip()


def test_niah_multiquery_has_the_published_plural_wording(tokenizer):
    example = one(NiahMultiquery, tokenizer)
    assert example.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    keys = re.search(r"What are all the special magic numbers for (.*) mentioned in", example.question).group(1)
    names = re.fullmatch(r"(.+), (.+), (.+), and (.+)", keys).groups()
    assert example.answer_prefix == f" The special magic numbers for {keys} mentioned in the provided text are"
    for name, value in zip(names, example.references, strict=True):
        assert f"One of the special magic numbers for {name} is: {value}." in example.context


def test_niah_multivalue_asks_for_the_four_values_of_one_key(tokenizer):
    example = one(NiahMultivalue, tokenizer)
    key = re.search(r"What are all the special magic numbers for (.*) mentioned in", example.question).group(1)
    found = re.findall(rf"One of the special magic numbers for {re.escape(key)} is: (\d{{7}})\.", example.context)
    assert sorted(found) == sorted(example.references)
    assert len(found) == 4


def test_niah_multikey_1_hides_four_keys_and_asks_for_one(tokenizer):
    example = one(NiahMultikey1, tokenizer)
    pairs = dict(re.findall(r"One of the special magic numbers for (.+?) is: (\d{7})\.", example.context))
    key = re.search(r"special magic number for (.*) mentioned", example.question).group(1)
    assert len(pairs) == 4
    assert example.references == (pairs[key],)


@pytest.mark.parametrize("task", [NiahSingle3, NiahMultikey3])
def test_uuid_tasks_use_uuids_and_their_wording(tokenizer, task):
    uuid4 = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    example = one(task, tokenizer, length=4096)
    assert "about the uuid afterwards" in example.context
    assert re.fullmatch(uuid4, example.references[0])
    key = re.search(r"special magic uuid for (.*) mentioned", example.question).group(1)
    assert bool(re.fullmatch(uuid4, key)) == (task is NiahMultikey3)
    assert example.context.count(f"One of the special magic uuids for {key} is: {example.references[0]}.") == 1


@pytest.mark.parametrize("task", [NiahMultikey2, NiahMultikey3])
def test_a_haystack_of_needles_holds_the_asked_key_once(tokenizer, task):
    example = one(task, tokenizer, length=4096)
    lines = example.context.split("\n")[1:-1]
    assert len(lines) == example.info["haystack_units"] + 1
    assert all(line.startswith("One of the special magic ") for line in lines)
    key = re.search(r"for (.*) mentioned", example.question).group(1)
    assert sum(f"for {key} is:" in line for line in lines) == 1


def test_depths_are_40_evenly_spaced_percents():
    assert len(set(DEPTHS)) == 40
    assert DEPTHS[:4] == (0, 3, 5, 8)
    assert DEPTHS[-1] == 100
    assert {b - a for a, b in itertools.pairwise(DEPTHS)} == {2, 3}


@pytest.mark.parametrize("task", [NiahSingle2, NiahSingle3])
def test_an_essay_needle_stands_once_at_its_stated_depth(tokenizer, task):
    depths = []
    for example in task().examples(tokenizer, context_length=2048, count=20, seed=3):
        body = example.context.split("\n", 1)[1].removesuffix("\n")
        assert body.count(example.info["needle"]) == 1
        before, after = body.split(example.info["needle"])
        assert example.info["depth"] in DEPTHS
        sentences = [len([s for s in re.split(r"(?<=[.!?])\s+", part.strip()) if s]) for part in (before, after)]
        assert sentences[0] == int(sum(sentences) * example.info["depth"] / 100)
        depths.append(example.info["depth"])
    assert len(set(depths)) > 8


def test_a_noise_needle_stands_at_its_stated_depth(tokenizer):
    for example in NiahSingle1().examples(tokenizer, context_length=2048, count=20, seed=3):
        lines = example.context.split("\n")[1:-1]
        position = lines.index(example.info["needle"])
        assert example.info["depth"] == pytest.approx(100 * position / (len(lines) - 1), abs=0.01)


def test_the_haystack_is_the_beginning_of_the_named_text(tokenizer):
    example = one(NiahSingle2, tokenizer)
    body = example.context.split("\n", 1)[1].removesuffix("\n")
    words = body.replace(example.info["needle"], "").split()
    assert tuple(words) == essays().words[: len(words)]
    assert len(words) == example.info["haystack_units"]
    assert example.info["haystack"].startswith("pydoc_data.topics of Python 3.")
    assert example.info["haystack_sha256"] == hashlib.sha256(" ".join(essays().words).encode()).hexdigest()
    assert NiahSingle2().data() == {key: example.info[key] for key in ("haystack", "haystack_sha256")}


def test_a_context_longer_than_the_text_repeats_it(tokenizer, monkeypatch, tmp_path):
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "I wrote. You read."}))
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    example = one(NiahSingle2, tokenizer)
    assert example.context.count("I wrote. You read.") > 50


@pytest.mark.parametrize("task", NEEDLE_TASKS)
@pytest.mark.parametrize("length", [1024, 2048, 8192])
def test_prompt_and_answer_fill_the_context(tokenizer, task, length):
    for example in task().examples(tokenizer, context_length=length, count=3, seed=1):
        used = len(encode(tokenizer, example).input_ids) + example.max_new_tokens
        assert 0.9 * length <= used <= length
        assert encode(tokenizer, example).input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_a_context_too_small_is_an_error(tokenizer, task):
    with pytest.raises(KVBenchError, match=f"A context of 150 tokens is too small for {task.name}"):
        next(task().examples(tokenizer, context_length=150, count=1, seed=1))


def test_seeds_and_counts(tokenizer):
    def made(count, seed):
        return list(NiahMultikey1().examples(tokenizer, context_length=1024, count=count, seed=seed))

    assert made(3, 1) == made(5, 1)[:3]
    contexts = [example.context for example in made(5, 1) + made(5, 2)]
    assert len(set(contexts)) == 10
    assert len({example.id for example in made(5, 1) + made(5, 2)}) == 10


def test_the_needles_do_not_depend_on_the_length(tokenizer):
    short, long = (one(NiahSingle1, tokenizer, length) for length in (1024, 2048))
    assert (short.question, short.references) == (long.question, long.references)


def test_examples_do_not_depend_on_the_hash_seed():
    # A tokenizer that needs no training: one token a byte.
    code = (
        "import hashlib; from tokenizers import Tokenizer, models, pre_tokenizers as p\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "from kvbench.tasks import kvbench_tasks\n"
        "b = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(p.ByteLevel.alphabet()))}, []))\n"
        "b.pre_tokenizer = p.ByteLevel(add_prefix_space=False)\n"
        "t = PreTrainedTokenizerFast(tokenizer_object=b)\n"
        "h = hashlib.sha256()\n"
        "for task in kvbench_tasks():\n"
        "    if task.name.startswith('niah'):\n"
        "        for e in task().examples(t, context_length=4096, count=2, seed=5): h.update(repr(e).encode())\n"
        "digest = h.hexdigest()\n"
    )
    here: dict[str, Any] = {}
    exec(code, here)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    there = subprocess.run(
        [sys.executable, "-c", code + "print(digest)"], env=os.environ | {"PYTHONHASHSEED": seed}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert there.stdout.strip() == here["digest"]
    assert len(here["digest"]) == 64


def test_ten_examples_of_2k_tokens_take_less_than_two_seconds_of_processor_time(tokenizer):
    one(NiahSingle2, tokenizer)
    start = time.process_time()
    list(NiahSingle2().examples(tokenizer, context_length=2048, count=10, seed=1))
    assert time.process_time() - start < 2


# Texts


def test_essays_come_from_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    assert essays().name.startswith("pydoc_data.topics")
    folder = tmp_path / "PaulGrahamEssays"
    folder.mkdir()
    (folder / "b.txt").write_text("second  essay\n")
    (folder / "a.txt").write_text("first\nessay")
    assert essays().words == ("first", "essay", "second", "essay")
    assert essays().name == "paul_graham_essays"
    assert essays().sha256 == hashlib.sha256(b"first essay second essay").hexdigest()
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "from\n\njson"}))
    assert essays().words == ("from", "json")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"text": ""}', '{"text": 3}', "{"])
def test_a_malformed_essay_file_is_named(monkeypatch, tmp_path, content):
    file = tmp_path / "PaulGrahamEssays.json"
    file.write_text(content)
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    with pytest.raises(KVBenchError, match=re.escape(str(file))):
        essays()


def test_a_missing_data_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path / "absent"))
    with pytest.raises(KVBenchError, match=r"KVBENCH_DATA names .*absent, which is not a folder"):
        essays()


# Metrics


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The numbers are 1234567 and 7654321.", ("1234567", "7654321"), 1.0),
        ("The number is 1234567.", ("1234567", "7654321"), 0.5),
        ("I do not know.", ("1234567",), 0.0),
        ("", ("1234567",), 0.0),
        ("AB-CD", ("ab-cd",), 1.0),
        ("apple, pear, plum", ("Apple", "fig", "PLUM", "kiwi"), 0.5),
    ],
)
def test_string_match_all(prediction, references, expected):
    assert string_match_all(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [("In PARIS.", ("Paris", "Lutetia"), 1.0), ("In Rome.", ("Paris", "Lutetia"), 0.0), ("", ("Paris",), 0.0)],
)
def test_string_match_part(prediction, references, expected):
    assert string_match_part(prediction, references) == expected


def test_a_needle_task_scores_the_share_of_values(tokenizer):
    example = one(NiahMultivalue, tokenizer)
    a, b, c, d = example.references
    assert NiahMultivalue().score(f" {a}, {b}, {c} and {d}.", example) == 1.0
    assert NiahMultivalue().score(f" {a}.", example) == 0.25


# Registration


def test_built_in_tasks_are_complete_and_have_distinct_names():
    tasks = kvbench_tasks()
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names)
    assert {task.name for task in NEEDLE_TASKS} <= set(names)
    for task in tasks:
        assert issubclass(task, Task | ForcedTask)
        assert task.summary and "\n" not in task.summary
        task.Options()


def test_importing_the_tasks_imports_nothing_heavy():
    code = (
        "import sys, kvbench.tasks; print([m for m in ('torch', 'transformers', 'numpy', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_third_party_needle_task_is_a_few_lines(tokenizer):
    class EightKeys(NeedleTask):
        name, summary, keys = "eight_keys", "Find one of eight numbers", 8

    example = one(EightKeys, tokenizer)
    assert len(re.findall("One of the special magic numbers for", example.context)) == 8


def test_the_task_of_the_documentation_works(tokenizer):
    page = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    names = {}
    exec(code, names)
    (task,) = names["kvbench_tasks"]()
    example = one(task, tokenizer, index=1)
    assert 0.9 * 1024 <= prompt_length(tokenizer, example) + example.max_new_tokens <= 1024
    box = re.search(r"box (\d+)\?", example.question).group(1)
    assert f"Box {box} is {example.references[0]}.\n" in example.context
    assert task().score(f" {example.references[0]}.", example) == 1.0


def test_the_documentation_names_every_task():
    page = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text("utf-8")

    def named(name: str) -> bool:
        forms = {name, name.removeprefix("longbench_"), "_" + name.removeprefix("scbench_")}  # tables of families
        return any(f"`{form}`" in page for form in forms)

    assert [task.name for task in kvbench_tasks() if not named(task.name)] == []


# The embedded model


@pytest.mark.real
def test_exact_attention_finds_the_needle():
    import torch

    from kvbench.models import load_model

    loaded = load_model("smollm2-135m", device="cpu")
    task = NiahSingle1()
    (example,) = task.examples(loaded.tokenizer, context_length=1024, count=1, seed=42)
    prompt = encode(loaded.tokenizer, example)
    ids = torch.tensor([prompt.input_ids])
    text = loaded.tokenizer.decode(prompt.input_ids)
    assert text.startswith("<|im_start|>system\n")
    assert text.count("<|im_start|>") == 3
    assert text.endswith(f"?<|im_end|>\n<|im_start|>assistant\n{example.answer_prefix}")
    with torch.no_grad():
        output = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=example.max_new_tokens, do_sample=False
        )
    answer = output[0, ids.shape[1] :]
    assert task.score(loaded.tokenizer.decode(answer, skip_special_tokens=True), example) == 1.0
    assert answer[-1] == loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(answer) < 20
