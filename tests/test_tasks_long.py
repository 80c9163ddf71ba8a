"""Long answers whose every line is checked, and reasoning whose end is."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tasks import one

from kvbench.contract.errors import KVBenchError
from kvbench.contract.task import Task
from kvbench.runs.measured import checked_measures
from kvbench.tasks import encode, tracing
from kvbench.tasks.long_answers import (
    LONG_ANSWERS,
    ArithmeticChain,
    ConstrainedList,
    LongCopy,
    LongSort,
    ProgramTrace,
    StateUpdates,
    numbered,
    repetition,
)
from kvbench.tasks.reasoning import GSM8K, Aime, LongGenBench, Math500, Mrcr, boxed, normal_form


def whole(example):
    """The right answer's lines, those that the prompt gives too."""
    return numbered(example.answer_prefix + example.references[0])


@pytest.mark.parametrize("task", LONG_ANSWERS)
def test_prompt_and_room_for_the_answer_fill_the_context(tokenizer, task):
    for length in (1024, 4096):
        example = one(task, tokenizer, length)
        assert 0.9 * length <= len(encode(tokenizer, example).input_ids) + example.max_new_tokens <= length
        size = len(tokenizer(example.references[0], add_special_tokens=False).input_ids)
        assert example.max_new_tokens == int(1.25 * size) + 1
        assert sorted(whole(example)) == list(range(1, example.info["lines"] + 1))
        assert example.context.splitlines()[0].endswith(example.info["end"])
    assert one(task, tokenizer, 1024) == one(task, tokenizer, 1024)


@pytest.mark.parametrize("task", LONG_ANSWERS)
def test_every_line_is_checked_and_where_it_goes_wrong_is_told(tokenizer, task):
    example, made = one(task, tokenizer, 1024), task()
    answer = example.references[0]
    lines = answer.splitlines()
    count = len(lines) - 1
    right = {"whole_answer": 1, "before_error": 1, "answer_length": 1, "rule_kept": 1}
    found = made.measures(answer, example)
    assert {name: found[name] for name in right} == right and "first_error" not in found
    assert found["repetition"] < 0.02
    assert made.score(answer, example) == 1
    wrong = "\n".join([*lines[:2], lines[2].split(". ")[0] + ". -", *lines[3:]])
    assert made.score(wrong, example) == pytest.approx(1 - 1 / count)
    assert made.measures(wrong, example)["first_error"] == 5 and made.measures(wrong, example)["whole_answer"] == 0
    assert made.measures(wrong, example)["before_error"] == pytest.approx(2 / count)
    cut = "\n".join(lines[:5])
    assert made.score(cut, example) == pytest.approx(5 / count)
    assert made.measures(cut, example)["rule_kept"] == 0
    assert made.measures(answer + "\nAnd so on.", example)["rule_kept"] == 0
    assert made.score("", example) == 0 and made.measures("", example)["first_error"] == 3
    looped = "\n".join(lines[:3] * 20)
    assert made.measures(looped, example)["repetition"] > 0.8
    assert checked_measures(made, example.id, made.measures(wrong, example)) == made.measures(wrong, example)


def test_the_running_sum_follows_the_operations_of_the_prompt(tokenizer):
    example = one(ArithmeticChain, tokenizer, 4096)
    value = int(re.search(r"Begin with (\d+)", example.context)[1])
    changes = [
        int(n) * (1 if word == "add" else -1) for word, n in re.findall(r"(add|subtract) (\d+)", example.context)
    ]
    for number, line in whole(example).items():
        old, sign, change, new = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", line).groups()
        assert int(old) == value and int(f"{sign}{change}") == changes[(number - 1) % len(changes)]
        value += changes[(number - 1) % len(changes)]
        assert int(new) == value > 0


def test_the_boxes_hold_what_the_moves_leave(tokenizer):
    example = one(StateUpdates, tokenizer, 4096)
    start = example.context.split("coins: ")[1].split(".")[0]
    held = {name: int(value) for name, value in (part.split() for part in start.split(", "))}
    moves = re.findall(r"move (\d+) from (\w+) to (\w+)", example.context)
    for (number, source, target), line in zip(moves, whole(example).values(), strict=True):
        held[source] -= int(number)
        held[target] += int(number)
        assert min(held.values()) >= 0
        assert line == ", ".join(f"{name} {value}" for name, value in held.items())


def test_lists_are_copied_and_sorted(tokenizer):
    example = one(LongCopy, tokenizer, 2048)
    assert numbered(example.context) == whole(example)
    example = one(LongSort, tokenizer, 2048)
    listed = re.findall(r"^\d{5} .+$", example.context, re.MULTILINE)
    assert list(whole(example).values()) == sorted(listed) != listed


def test_other_words_than_the_reference_are_right_too(tokenizer):
    example, task = one(ConstrainedList, tokenizer, 1024), ConstrainedList()
    words = whole(example)
    letters = [words[n][0] for n in range(1, 9)]
    assert example.context.count(", ".join(letters)) == 1
    other = "\n".join(f"{n}. {letters[(n - 1) % 8]}qqq{'abcdefghij'[n // 10]}{'abcdefghij'[n % 10]}" for n in words)
    assert task.score(other, example) == 1
    given = words[1]
    again = other.replace(other.splitlines()[8], f"9. {given}")
    assert task.score(again, example) == pytest.approx(1 - 1 / (len(words) - 2))  # a word that the prompt gave
    assert task.score(re.sub(r"qqq..", "", other), example) == 0  # too short


def test_a_trace_is_what_the_program_does(tokenizer):
    example = one(ProgramTrace, tokenizer, 2048)
    program = re.findall(r"^\d+: (.+)$", example.context, re.MULTILINE)
    lines = list(whole(example).values())
    assert len(lines) == example.info["lines"]
    registers, at = {"a": 0, "b": 0, "c": 0, "i": 0}, 1
    for line in lines:
        word, *rest = program[at - 1].split()
        value = {**registers}.get(rest[-1]) if rest[-1] in registers else int(rest[-1])
        following = at + 1
        if word == "jump":
            following = int(rest[0]) if registers[rest[2]] < value else following
        else:
            old = registers[rest[0]]
            registers[rest[0]] = {"set": value, "add": old + value, "sub": old - value, "mod": old % max(value, 1)}[
                word
            ]
        assert line == f"line {at}: " + " ".join(f"{k}={v}" for k, v in registers.items())
        at = following


@given(st.integers(0, 500), st.integers(1, 500))
@settings(max_examples=25, deadline=None)
def test_programs_compute(a, b):
    steps = tracing.run(
        [f"set a {a}", f"set b {b}", "jump 5 if z b", "stop", "set t a", "mod t b", "set a b", "set b t",
         "jump 5 if z b", "stop"],
        ["a", "b", "t", "z"], 1000,
    )  # fmt: skip
    x, y = a, b
    while y:
        x, y = y, x % y
    assert steps[-1].registers["a"] == x and steps[-1].line == 10


@pytest.mark.parametrize(
    "line", ["", "print a", "set q 1", "add a", "jump 9 if a 3", "jump 1 or a 3", "mod a 0", "set a x"]
)
def test_what_is_no_instruction_is_named(line):
    with pytest.raises(KVBenchError, match=r"Line 1 of the program, .* is no instruction"):
        tracing.run([line], ["a"], 10)


def test_repeated_runs_of_words_are_counted():
    assert repetition("one two three") == 0
    assert repetition(" ".join(map(str, range(100)))) == 0
    assert repetition("a b c d e f g h " * 2) == pytest.approx(1 / 9)


class Surprising(LongCopy):
    def measures(self, prediction, example):
        return {"surprise": 1.0}


def test_measures_have_the_names_that_their_task_gave():
    with pytest.raises(KVBenchError, match="measured 'surprise' of example x; expected answer_length, before_error"):
        checked_measures(Surprising(), "x", Surprising().measures("", None))
    with pytest.raises(KVBenchError, match=r"measured example x with \[1\]"):
        checked_measures(LongCopy(), "x", [1])
    with pytest.raises(KVBenchError, match=r"scored example x with nan \(float\) for repetition"):
        checked_measures(LongCopy(), "x", {"repetition": float("nan")})
    assert checked_measures(LongCopy(), "x", Task.measures(LongCopy(), "", None)) == {}


# Reasoning


def made(task, tokenizer, path, rows, length=1024, count=1, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = task(task.Options(path=str(path), **options))
    return found, list(found.examples(tokenizer, context_length=length, count=count, seed=1))


def test_gsm8k_compares_the_final_number(tokenizer, tmp_path):
    row = {"question": "Ann has 3 bags of 400 beans. How many beans?", "answer": "3*400=<<3*400=1200>>1200\n#### 1,200"}
    task, (example,) = made(GSM8K, tokenizer, tmp_path / "gsm8k_test.jsonl", [row], max_new_tokens=100)
    assert example.references == ("1200",) and example.context == row["question"]
    for right in ("So \\boxed{1200}.", "\\boxed{1,200 \\text{ beans}}", "She has 1200.0 of them", "1,200"):
        assert task.score(right, example) == 1
    for wrong in ("", "1200, or rather 3", "\\boxed{12}00", "1200 - \\boxed{3}"):
        assert task.score(wrong, example) == 0
    assert task.measures("no number", example)["answered"] == 0
    assert task.measures("a b 3", example) == {"answered": 1, "answer_words": 3, "repetition": 0}
    with pytest.raises(KVBenchError, match=r"Row 1 of .* is not as published .*no number after ####"):
        made(GSM8K, tokenizer, tmp_path / "gsm8k_test.jsonl", [{"question": "?", "answer": "4"}], max_new_tokens=9)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\\frac12", "\\dfrac{1}{2}"), ("1/2", "\\frac{1}{2}"), ("0.5", "\\frac 1 2"), ("x=5", "5"),
        ("90^\\circ", "90"),
        ("\\left(3, \\frac{\\pi}{2}\\right)", "(3,\\frac{\\pi}{2})"), ("\\$18.90", "18.9"), ("10\\%", "10"),
        ("1,000", "1000"), ("\\text{Evelyn}", "Evelyn"), ("\\sqrt2", "\\sqrt{2}"), ("-\\frac{3}{4}", "-3/4"),
        ("6.", "6"),
    ],
)  # fmt: skip
def test_answers_that_differ_in_writing_only_are_the_same(one, other):
    assert normal_form(one) == normal_form(other)


@pytest.mark.parametrize(("one", "other"), [("1,2", "12"), ("(1,2)", "(2,1)"), ("x^2", "x^3"), ("2", "-2"), ("", "0")])
def test_other_answers_are_not(one, other):
    assert normal_form(one) != normal_form(other)


@given(st.text(max_size=60))
def test_any_answer_has_a_normal_form(text):
    assert isinstance(normal_form(text), str)
    assert boxed(f"x \\boxed{{{text}}}") == text or "{" in text or "}" in text


def test_math_and_aime_take_the_last_box(tokenizer, tmp_path):
    row = {"problem": "What is 1/2?", "answer": "\\frac{1}{2}", "level": 1}
    task, (example,) = made(Math500, tokenizer, tmp_path / "math500.jsonl", [row], max_new_tokens=100)
    assert task.score("\\boxed{2} no: \\boxed{\\dfrac{1}{2}}", example) == 1
    assert task.score("\\frac{1}{2}", example) == task.score("\\boxed{\\frac{1}{2}", example) == 0
    task, (example,) = made(
        Aime, tokenizer, tmp_path / "aime.jsonl", [{"Problem": "?", "Answer": "033"}], max_new_tokens=100
    )
    assert task.score("\\boxed{033}", example) == task.score("\\boxed{33}", example) == 1
    assert task.score("33", example) == 0


def test_many_questions_have_one_long_answer(tokenizer, tmp_path):
    rows = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(9)]
    file = tmp_path / "gsm8k_test.jsonl"
    task, examples = made(LongGenBench, tokenizer, file, rows, count=2, questions=4, max_new_tokens=200)
    example = examples[0]
    asked = [int(n) for n in re.findall(r"Question \d: What is (\d+) \+", example.context)]
    assert len(set(asked)) == 4 and example != examples[1]
    answer = "".join(f"Answer {n}: {x} + {x} = {2 * x}. The answer is {2 * x}.\n" for n, x in enumerate(asked, 1))
    assert task.score(answer, example) == 1 and "first_error" not in task.measures(answer, example)
    half = "".join(answer.splitlines(keepends=True)[:2])
    assert task.score(half, example) == 0.5
    found = task.measures(half, example)
    assert (found["answered"], found["first_error"]) == (0.5, 3)
    assert task.score("", example) == 0
    with pytest.raises(KVBenchError, match="holds fewer than 10 questions"):
        made(LongGenBench, tokenizer, file, rows, questions=10, max_new_tokens=200)
    with pytest.raises(KVBenchError, match="too small for 4 questions and 900 tokens of answers"):
        made(LongGenBench, tokenizer, file, rows, questions=4, max_new_tokens=900)


def test_mrcr_takes_the_conversation_in_turns(tokenizer, tmp_path):
    turns = [
        ("user", "A poem."),
        ("assistant", "Roses."),
        ("user", "A poem."),
        ("assistant", "Violets."),
        ("user", "Again!"),
    ]
    row = {
        "prompt": json.dumps([{"role": role, "content": text} for role, text in turns]), "answer": "xYzViolets.",
        "random_string_to_prepend": "xYz", "n_needles": 2,
    }  # fmt: skip
    task, (example,) = made(Mrcr, tokenizer, tmp_path / "2needle.jsonl", [row], max_new_tokens=50)
    assert example.solved == (("A poem.", "Roses."), ("A poem.", "Violets.")) and example.question == "Again!"
    assert encode(tokenizer, example).input_ids
    assert task.score("xYzViolets.", example) == 1 and task.score("Violets.", example) == 0
    assert 0 < task.score("xYzViol", example) < 1
    with pytest.raises(KVBenchError, match="not turns of user and assistant"):
        made(Mrcr, tokenizer, tmp_path / "2needle.jsonl", [{**row, "prompt": row["prompt"].replace("user", "system")}])
