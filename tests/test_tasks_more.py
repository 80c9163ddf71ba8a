"""The other tasks: RULER beyond needles, the needle grid, ∞-Bench, and users' files."""

import json
import re
from typing import get_args

import pytest
from test_tasks import one

from kvbench.contract.errors import KVBenchError
from kvbench.tasks import encode, prompt_length
from kvbench.tasks.infinitebench import CodeRun, KVRetrieval, MathFind, NumberString, Passkey
from kvbench.tasks.jsonl import JsonLines, Metric
from kvbench.tasks.metrics import METRICS, exact_match, f1
from kvbench.tasks.ruler import NeedleGrid
from kvbench.tasks.ruler_more import CommonWords, FrequentWords, HotpotQA, Squad, VariableTracking
from kvbench.tasks.texts import NOISE

RULER = [VariableTracking, CommonWords, FrequentWords]
INFINITE = [Passkey, NumberString, KVRetrieval, MathFind, CodeRun]


@pytest.mark.parametrize("task", [*RULER, *INFINITE, NeedleGrid])
@pytest.mark.parametrize("length", [2048, 5000])
def test_prompt_and_answer_fill_the_context(tokenizer, task, length):
    for example in task().examples(tokenizer, context_length=length, count=3, seed=1):
        used = len(encode(tokenizer, example).input_ids) + example.max_new_tokens
        assert 0.9 * length <= used <= length


@pytest.mark.parametrize("task", [*RULER, *INFINITE, NeedleGrid])
def test_seeds_and_counts(tokenizer, task):
    def made(count, seed):
        return list(task().examples(tokenizer, context_length=2048, count=count, seed=seed))

    assert made(2, 1) == made(3, 1)[:2]
    assert len({example.context for example in made(3, 1) + made(3, 2)}) == 6


@pytest.mark.parametrize("task", [*RULER, *INFINITE])
def test_a_context_too_small_is_an_error(tokenizer, task):
    with pytest.raises(KVBenchError, match=f"too small for {task.name}"):
        next(task().examples(tokenizer, context_length=64, count=1, seed=1))


# RULER


def of_release(task, release, tokenizer, length):
    made = task(task.Options(release=release))
    return next(iter(made.examples(tokenizer, context_length=length, count=1, seed=42)))


@pytest.mark.parametrize("release", ["2024", "2025"])
def test_vt_has_the_published_wording_and_one_chain(tokenizer, release):
    old = release == "2024"
    example = of_release(VariableTracking, release, tokenizer, 2048)
    opening = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    empty, demonstration, text = example.context.split(opening)
    assert empty == ""
    assert re.search(r"[A-Z](\n+)$", demonstration).group(1) == ("\n\n\n\n" if old else "\n\n")
    demonstration = demonstration.rstrip("\n")
    space = " " if old else "\n"
    for part, letters, answer in ((demonstration, 3, None), (text, 5, example.references)):
        start = re.search(rf"VAR ([A-Z]{{{letters}}}) = (\d{{5}}){space}", part)
        chain = [start.group(1)]
        for name, before in re.findall(rf"VAR ([A-Z]{{{letters}}}) = VAR ([A-Z]{{{letters}}}) ", part):
            assert before == chain[-1]
            chain.append(name)
        assert len(set(chain)) == 5
        assert answer is None or tuple(chain) == answer
        asked = part if answer is None else part + example.question
        assert (
            f"\nQuestion: Find all variables that are assigned the value {start.group(2)} in the text above." in asked
        )
    assigned = "assgined" if old else "assigned"
    value = re.search(r"variables are \w+ the value (\d+)", demonstration).group(1)
    assert demonstration.endswith(
        f" in the text above. Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
        f"are {assigned} the value {value}, they are: {'' if old else ' '}"
        + " ".join(re.findall(r"VAR ([A-Z]{3}) =", demonstration))
    )
    value = re.search(r"the value (\d+)", example.question).group(1)
    assert example.answer_prefix == (
        f"{'' if old else ' '}Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
        f"are {assigned} the value {value}, they are:{'' if old else ' '}"
    )
    assert text.count(NOISE) == example.info["haystack_units"]
    assert example.max_new_tokens == 30


def test_vt_has_each_assignment_on_its_own_line(tokenizer):
    lines = one(VariableTracking, tokenizer, length=2048).context.split("\n")
    assert sum(re.fullmatch(r"VAR [A-Z]{3,5} = (\d{5}|VAR [A-Z]{3,5} )", line) is not None for line in lines) == 10
    assert all(line == NOISE for line in lines if "grass" in line)


@pytest.mark.parametrize("release", ["2024", "2025"])
@pytest.mark.parametrize(("length", "common", "other"), [(2048, 6, 1), (8192, 30, 3)])
def test_cwe_repeats_ten_words(tokenizer, length, common, other, release):
    example = of_release(CommonWords, release, tokenizer, length)
    opening = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    question = "Question: What are the 10 most common words in the above list?"
    prefix = "Answer: The top 10 words that appear most often in the list are:"
    assert example.question == question
    if release == "2024":
        empty, solved, listed = example.context.split(opening)
        assert empty == ""
        assert example.solved == ()
        assert example.answer_prefix == prefix
        assert f"{question} {prefix}1. " in solved
    else:
        empty, listed = example.context.split(opening)
        ((asked, answer),) = example.solved
        assert empty == ""
        assert asked.startswith(f"{opening}1. ")
        assert asked.endswith(f"\n{question}")
        assert example.answer_prefix == f" {prefix}"
        assert re.fullmatch(re.escape(f" {prefix}") + r"( \d+\. \S+( \S+)*?){10}", answer)
        text = tokenizer.decode(encode(tokenizer, example).input_ids)
        assert f"{question}<|end|>\n<|turn|>assistant\n{prefix} 1. " in text  # the test's template trims
        assert text.endswith(f"{question}<|end|>\n<|turn|>assistant\n {prefix}")
    found = [entry.strip() for entry in re.split(r"(?:^| )\d+\. ", listed)[1:]]
    counts = {word: found.count(word) for word in found}
    assert {word for word, count in counts.items() if count == common} == set(example.references)
    assert len(example.references) == 10
    assert set(counts.values()) == {common, other}
    assert len(counts) == example.info["haystack_units"]


@pytest.mark.parametrize("task", [*RULER, Squad, HotpotQA, NeedleGrid])
def test_release_is_an_option_of_every_task_of_ruler(task):
    assert task().options.release == "2025"
    assert task(task.Options(release=2024)).options.release == "2024"
    with pytest.raises(ValueError, match="release"):
        task.Options(release="2023")


@pytest.mark.parametrize("length", [700, 2048, 8192])
def test_fwe_answers_are_the_most_frequent_after_the_dots(tokenizer, length):
    example = one(FrequentWords, tokenizer, length=length)
    coded = example.context.split("most frequently appeared coded words. ")[1].split()
    counts = {word: coded.count(word) for word in coded}
    ranked = sorted(counts, key=counts.get, reverse=True)
    assert ranked[0] == "..."
    assert tuple(ranked[1:4]) == example.references
    assert len({counts[word] for word in ranked[:4]}) == 4
    assert counts[ranked[3]] > counts[ranked[4]]
    assert all(re.fullmatch("[a-z]{6}", word) for word in ranked[1:])
    assert counts["..."] / counts[ranked[1]] == pytest.approx(4, rel=0.1)


SQUAD = {
    "data": [
        {
            "title": f"Article {a}",
            "paragraphs": [
                {
                    "context": f"Paragraph {a}.{p} of article {a}. " + "Some words follow here. " * 10,
                    "qas": [
                        {
                            "question": f"Which is {a}.{p}?",
                            "is_impossible": False,
                            "answers": [{"text": f"paragraph {a}.{p}"}, {"text": f"number {a}.{p}"}],
                        },
                        {"question": "Impossible?", "is_impossible": True, "answers": []},
                    ],
                }
                for p in range(3)
            ],
        }
        for a in range(40)
    ]
}
HOTPOT = [
    {
        "question": f"Which is {q}?",
        "answer": f"answer {q}",
        "context": [[f"Title {q}.{d}", [f"Sentence of {q}.{d}. ", "Some words follow here. " * 10]] for d in range(10)],
    }
    for q in range(20)
]


@pytest.fixture
def questions(tmp_path, monkeypatch):
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(SQUAD))
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(HOTPOT))
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    return tmp_path


def test_qa_1_shows_the_paragraph_among_those_of_its_article_and_others(tokenizer, questions):
    instruction = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    asked = set()
    for example in Squad().examples(tokenizer, context_length=2048, count=20, seed=1):
        assert example.context.startswith(f"{instruction}\n\nThe following are given documents.\n\nDocument 1:\n")
        name = re.fullmatch(re.escape(f"{instruction}\n\nQuestion: Which is ") + r"(.*)\?", example.question).group(1)
        shown = re.findall(r"Document \d+:\nParagraph ([\d.]+) of", example.context)
        assert len(shown) == len(set(shown)) == example.info["haystack_units"]
        assert {f"{name.split('.')[0]}.{p}" for p in range(3)} < set(shown)
        assert example.references == (f"paragraph {name}", f"number {name}")
        assert (example.answer_prefix, example.max_new_tokens) == (" Answer:", 32)
        assert 0.9 * 2048 <= prompt_length(tokenizer, example) + 32 <= 2048
        assert Squad().score(f" Number {name}.", example) == 1.0
        asked.add(name)
    assert len(asked) == 20


def test_qa_2_shows_all_ten_paragraphs_of_the_question(tokenizer, questions):
    example = one(HotpotQA, tokenizer, length=3000)
    name = re.search(r"Which is (\d+)\?", example.question).group(1)
    shown = re.findall(r"Document \d+:\nTitle ([\d.]+)\nSentence", example.context)
    assert {f"{name}.{d}" for d in range(10)} < set(shown)
    assert example.references == (f"answer {name}",)
    with pytest.raises(KVBenchError, match="too small for qa_2"):
        one(HotpotQA, tokenizer, length=500)


def test_question_files_too_short_for_the_length_are_an_error(tokenizer, questions):
    with pytest.raises(KVBenchError, match="qa_1 cannot fill 65536 tokens"):
        one(Squad, tokenizer, length=65536)


@pytest.mark.parametrize(("task", "file"), [(Squad, "dev-v2.0.json"), (HotpotQA, "hotpot_dev_distractor_v1.json")])
def test_missing_and_foreign_question_files_are_named(tokenizer, task, file, tmp_path, monkeypatch):
    with pytest.raises(KVBenchError, match=f"put the file {re.escape(file)} into a folder that KVBENCH_DATA names"):
        one(task, tokenizer)
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    with pytest.raises(KVBenchError, match=f"put the file {re.escape(file)} into {re.escape(str(tmp_path))}"):
        task().data()
    (tmp_path / file).write_text('{"other": 1}')
    with pytest.raises(KVBenchError, match=f"{re.escape(str(tmp_path / file))} is not "):
        task().data()


# The needle grid


def test_the_grid_visits_the_depths_in_turn(tokenizer):
    task = NeedleGrid(NeedleGrid.Options(depths=(0, 50, 100)))
    examples = list(task.examples(tokenizer, context_length=2048, count=7, seed=1))
    assert [example.info["depth"] for example in examples] == [0, 50, 100, 0, 50, 100, 0]
    for example in examples:
        body = example.context.split("\n", 1)[1].removesuffix("\n")
        position = 100 * body.index(example.info["needle"]) / (len(body) - len(example.info["needle"]))
        assert position == pytest.approx(example.info["depth"], abs=10)  # depths count sentences


def test_depths_can_be_given_as_text():
    assert NeedleGrid.Options(depths="0,12.5,100").depths == (0, 12.5, 100)


@pytest.mark.parametrize("depths", [(), (101,), (-1,), "", "0,x", "50,101"])
def test_depths_outside_the_context_are_refused(depths):
    with pytest.raises(ValueError, match="depths"):
        NeedleGrid.Options(depths=depths)


# ∞-Bench


@pytest.mark.parametrize(
    ("task", "wanted", "digits", "tokens"),
    [(Passkey, "pass key", 5, 6), (NumberString, "sequence of digits", 10, 12)],
)
def test_numbers_in_noise(tokenizer, task, wanted, digits, tokens):
    example = one(task, tokenizer)
    (value,) = example.references
    assert re.fullmatch(rf"\d{{{digits}}}", value)
    lines = example.context.rstrip("\n").split("\n")
    assert lines[0].startswith("There is an important info hidden inside a lot of irrelevant text. Find it")
    assert lines.count(f"The {wanted} is {value}. Remember it. {value} is the {wanted}.") == 1
    assert lines.count(NOISE) == example.info["haystack_units"] == len(lines) - 3
    assert (example.question, example.answer_prefix) == (f"What is the {wanted}?", f"The {wanted} is")
    assert example.max_new_tokens == tokens
    for prediction, score in ((f" {value}.", 1.0), (f" {value}0", 0.0), (f" 1 {value}", 0.0), ("", 0.0), ("none", 0.0)):
        assert task().score(prediction, example) == score


def test_number_strings_repeat_neighbours(tokenizer):
    for example in NumberString().examples(tokenizer, context_length=500, count=20, seed=1):
        value = example.references[0]
        assert len(re.sub(r"(\d)\1+", r"\1", value)) <= 5


def test_positions_sweep_the_context(tokenizer):
    depths = sorted(
        example.info["depth"] for example in Passkey().examples(tokenizer, context_length=2048, count=20, seed=1)
    )
    gaps = [b - a for a, b in zip([0, *depths], [*depths, 100], strict=True)]
    assert max(gaps) < 15


def test_kv_retrieval_asks_for_a_pair_of_the_object(tokenizer):
    example = one(KVRetrieval, tokenizer, length=4096)
    opening = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
    pairs = json.loads(example.context.removeprefix(opening))
    key = re.fullmatch(r'Key: "(.*)"', example.question).group(1)
    assert example.references == (pairs[key],)
    assert len(pairs) == example.info["haystack_units"]
    assert list(pairs).index(key) == pytest.approx(example.info["depth"] / 100 * len(pairs), abs=0.01)
    assert KVRetrieval().score(f' "{pairs[key]}",', example) == 1.0
    assert KVRetrieval().score(f" {pairs[key]}0", example) == 0.0


def test_math_find_asks_seven_kinds_in_turn(tokenizer):
    picks = {
        "largest number": lambda n: sorted(set(n))[-1],
        "second largest number": lambda n: sorted(set(n))[-2],
        "third largest number": lambda n: sorted(set(n))[-3],
        "smallest number": lambda n: sorted(set(n))[0],
        "second smallest number": lambda n: sorted(set(n))[1],
        "third smallest number": lambda n: sorted(set(n))[2],
        "median number": lambda n: (sorted(n)[len(n) // 2] + sorted(n)[(len(n) - 1) // 2]) / 2,
    }
    examples = list(MathFind().examples(tokenizer, context_length=1500, count=14, seed=1))
    assert [example.info["kind"] for example in examples] == [*picks, *picks]
    for example in examples:
        numbers = [int(n) for n in re.search(r"\[(.*)\]", example.context).group(1).split(", ")]
        assert set(numbers) <= set(range(100))
        assert float(example.references[0]) == picks[example.info["kind"]](numbers)
        assert example.answer_prefix == f"The {example.info['kind']} of the list is:"
        assert MathFind().score(f" {example.references[0]}.", example) == 1.0
        assert MathFind().score(" 100", example) == MathFind().score("unknown", example) == 0.0
    assert len({example.references for example in examples}) > 5


def test_code_run_answers_are_what_python_computes(tokenizer):
    depths = []
    for example in CodeRun().examples(tokenizer, context_length=2048, count=10, seed=1):
        code = example.context.split("in the following Python code.\n\n")[1]
        functions = {}
        exec(code, functions)  # code that the task itself wrote
        name, argument = re.fullmatch(
            r"Please compute the exact value of (func_\d+)\((-?\d+)\)\.", example.question
        ).groups()
        assert example.context.startswith(f"There is a function called {name} in the following Python code.")
        assert example.references == (str(functions[name](int(argument))),)
        depth, called = 1, name
        while found := re.search(rf"def {called}\(x\):\n    return (func_\d+)", code):
            depth, called = depth + 1, found.group(1)
        assert depth == example.info["call_depth"]
        depths.append(depth)
        assert CodeRun().score(f" {example.references[0]}", example) == 1.0
        assert CodeRun().score(f"the value: {example.references[0]}.", example) == 1.0
        assert CodeRun().score(f"{example.references[0]} or 9999", example) == 0.0
        assert CodeRun().score("__import__('os')", example) == CodeRun().score("", example) == 0.0
    assert depths == [2, 4, 6, 8, 10] * 2


# Users' files


@pytest.fixture
def file(tmp_path):
    def write(*lines, name="mine.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
        return path

    return write


def made(tokenizer, path, count=10, length=512, **options):
    task = JsonLines(JsonLines.Options(path=str(path), **options))
    return task, list(task.examples(tokenizer, context_length=length, count=count, seed=1))


def test_lines_become_examples(tokenizer, file):
    path = file(
        {"input": "All of it?", "outputs": ["yes", "no"]},
        "",
        {
            "context": "A long text.\n",
            "input": "What?",
            "outputs": "one",
            "answer_prefix": "It is",
            "metric": "f1",
            "max_new_tokens": 5,
            "note": "ignored",
        },
    )
    task, (first, second) = made(tokenizer, path)
    assert (first.context, first.question, first.references) == ("All of it?", "", ("yes", "no"))
    assert (first.max_new_tokens, first.info["line"], second.info["line"]) == (128, 1, 3)
    assert (second.context, second.question, second.references) == ("A long text.\n", "What?", ("one",))
    assert (second.answer_prefix, second.max_new_tokens) == ("It is", 5)
    assert tokenizer.decode(encode(tokenizer, second).input_ids).endswith("What?<|end|>\n<|turn|>assistant\nIt is")
    assert encode(tokenizer, first).context_tokens == len(
        tokenizer("<bos><|turn|>user\nAll of it?", add_special_tokens=False).input_ids
    )
    assert task.score("Yes.", first) == 0.5
    assert task.score("one two", second) == pytest.approx(2 / 3)
    assert made(tokenizer, path, count=1)[1] == [first]
    assert made(tokenizer, path, metric="string_match_part", max_new_tokens=3)[1][0].max_new_tokens == 3
    assert set(task.data()) == {"haystack", "haystack_sha256"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not an example"),
        ({"outputs": ["a"]}, r"is not an example \(input: Field required\)"),
        ({"input": "a"}, r"is not an example \(outputs: Field required\)"),
        ({"input": "", "outputs": ["a"]}, r"\(input: String should have at least 1 character\)"),
        ({"input": "a", "outputs": []}, r"\(outputs: List should have at least 1 item"),
        ({"input": "a", "outputs": [1]}, r"\(outputs\.0: Input should be a valid string\)"),
        ({"input": "a", "outputs": ["a"], "metric": "accuracy"}, r"\(metric: Input should be 'string_match_all'"),
        ({"input": "a", "outputs": ["a"], "max_new_tokens": 0}, r"\(max_new_tokens: "),
    ],
)
def test_a_bad_line_is_named(tokenizer, file, line, message):
    path = file({"input": "fine", "outputs": ["a"]}, "", line)
    with pytest.raises(KVBenchError, match=rf"Line 3 of .*mine\.jsonl.*{message}"):
        made(tokenizer, path)


def test_a_line_too_long_for_the_context_is_named_and_not_cut(tokenizer, file):
    path = file({"input": "fine", "outputs": ["a"]}, {"input": "word " * 600, "outputs": ["a"]})
    with pytest.raises(KVBenchError, match=r"Line 2 of .* takes \d+ tokens with its answer \(128\), more than .* 512"):
        made(tokenizer, path)
    with pytest.raises(KVBenchError, match=r"Line 1 of .* takes \d+ tokens with its answer \(600\)"):
        made(tokenizer, path, max_new_tokens=600)


def test_empty_missing_and_foreign_files_are_named(tokenizer, file, tmp_path):
    with pytest.raises(KVBenchError, match=r"mine\.jsonl holds no examples"):
        made(tokenizer, file("", "  "))
    with pytest.raises(KVBenchError, match=r"There is no file .*absent\.jsonl"):
        made(tokenizer, tmp_path / "absent.jsonl")
    with pytest.raises(KVBenchError, match="The task jsonl needs a file: give it with --task-option path="):
        JsonLines().data()
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KVBenchError, match=r"binary\.jsonl is not UTF-8"):
        made(tokenizer, tmp_path / "binary.jsonl")


@pytest.mark.parametrize(
    ("prediction", "references", "expected_f1", "expected_exact"),
    [
        ("The cat sat.", ("a cat sat",), 1.0, 1.0),
        ("cat", ("cat sat",), 2 / 3, 0.0),
        ("dog", ("cat", "the dog!"), 1.0, 1.0),
        ("cat cat", ("cat",), 2 / 3, 0.0),
        ("", ("cat",), 0.0, 0.0),
    ],
)
def test_f1_and_exact_match(prediction, references, expected_f1, expected_exact):
    assert f1(prediction, references) == pytest.approx(expected_f1)
    assert exact_match(prediction, references) == expected_exact


def test_metrics_are_known_by_name():
    assert set(METRICS) == set(get_args(Metric))


@pytest.mark.parametrize("length", [600, 900, 1300])
def test_documents_too_long_for_what_is_left_give_way_to_shorter_ones(tokenizer, tmp_path, length):
    rows = [
        {
            "title": f"t{n}",
            "context": f"{n}. " + "word " * (20 + 37 * n % 190),
            "question": "Q?",
            "answers": {"text": ["a"]},
        }
        for n in range(200)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = Squad(Squad.Options(path=str(tmp_path / "rows.json")))
    for example in task.examples(tokenizer, context_length=length, count=10, seed=1):
        assert 0.9 * length <= prompt_length(tokenizer, example) + 32 <= length
