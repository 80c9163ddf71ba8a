"""Tasks made from published files (LongBench, ∞-Bench, SCBench, ClassEval), shared contexts and long answers."""

import json
import random
import re
import time
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from test_tasks import one

from kvbench.contract.errors import KVBenchError
from kvbench.contract.task import Example
from kvbench.tasks import encode, kvbench_tasks, prompt_length
from kvbench.tasks.code import ClassEval, LongCode
from kvbench.tasks.files import FileTask, fit
from kvbench.tasks.infinitebench_files import (
    BookChoice,
    BookQA,
    BookSummary,
    ChineseBookQA,
    CodeDebug,
    Dialogue,
    MathCalc,
)
from kvbench.tasks.longbench import DATASETS, LongBenchV2
from kvbench.tasks.metrics import bleu, chrf, edit_similarity, f1_characters, rouge_l, rouge_lsum
from kvbench.tasks.ruler import NiahMultikey1, NiahSingle2
from kvbench.tasks.ruler_more import HotpotQA, Squad
from kvbench.tasks.shared import SharedNeedles
from kvbench.tasks.texts import essays

TASKS = {task.name: task for task in kvbench_tasks()}
FUNCTION = "def f(x):\n    return x + 1\n"
STORY = "Ann met Bob in Rome. Nothing else happened that day. " * 8


@pytest.fixture
def folder(tmp_path):
    def write(name, *rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
        else:
            path.write_text(json.dumps(list(rows)), "utf-8")
        return tmp_path

    return write


def made(task, tokenizer, count=10, length=2048, seed=1, **options):
    cls = TASKS[task] if isinstance(task, str) else task
    found = cls(cls.Options(**{key: str(value) for key, value in options.items()}))
    return found, list(found.examples(tokenizer, context_length=length, count=count, seed=seed))


def longbench_row(**changes):
    return {
        "input": "Where?", "context": STORY, "answers": ["Rome", "in Rome"], "length": 40, "dataset": "qasper",
        "language": "en", "all_classes": None, "_id": "abc", **changes,
    }  # fmt: skip


# LongBench


def test_longbench_has_a_task_for_each_of_its_21_datasets():
    assert len(DATASETS) == 21
    assert {f"longbench_{name}" for name in DATASETS} | {"longbench_v2"} == {n for n in TASKS if n.startswith("longb")}
    assert all(template.count("{context}") == 1 for template, _, _ in DATASETS.values())


def test_longbench_asks_as_published(tokenizer, folder):
    task, (example,) = made("longbench_hotpotqa", tokenizer, path=folder("hotpotqa.jsonl", longbench_row()))
    rule = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    assert example.context == f"{rule}\n\nThe following are given passages.\n{STORY}"
    assert example.question == f"\n\n{rule}\n\nQuestion: Where?\nAnswer:"
    assert (example.answer_prefix, example.references, example.max_new_tokens) == ("", ("Rome", "in Rome"), 32)
    assert tokenizer.decode(encode(tokenizer, example).input_ids).endswith("Answer:<|end|>\n<|turn|>assistant\n")
    assert "truncated_tokens" not in example.info
    assert task.score("The Rome.", example) == 1.0
    assert task.score("Rome, I think", example) == pytest.approx(2 / 4)
    assert set(task.data()) == {"haystack", "haystack_sha256"}


def test_longbench_gives_few_shot_and_code_prompts_without_chat_template(tokenizer, folder):
    path = folder("trec.jsonl", longbench_row(answers=["Number"], all_classes=["Number", "Number of people", "Date"]))
    task, (example,) = made("longbench_trec", tokenizer, path=path)
    text = tokenizer.decode(encode(tokenizer, example).input_ids)
    opening = "Please determine the type of the question below. Here are some examples of questions."
    assert text == f"<bos>{opening}\n\n{STORY}\nWhere?"
    assert task.score("\nNumber\nDate", example) == 1.0  # the first line counts
    assert task.score("Number or Date", example) == 0.5
    assert task.score("Date", example) == 0.0


def test_a_class_name_within_the_right_one_does_not_count(tokenizer, folder):
    path = folder("trec.jsonl", longbench_row(answers=["Number of people"], all_classes=["Number", "Number of people"]))
    task, (example,) = made("longbench_trec", tokenizer, path=path)
    assert task.score("Number of people", example) == 1.0


@pytest.mark.parametrize(
    ("dataset", "answers", "prediction", "score"),
    [
        ("passage_count", ["7"], "7 or 8", 0.5),
        ("passage_count", ["7"], "none", 0.0),
        ("passage_retrieval_en", ["Paragraph 12"], "Paragraph 12", 1.0),
        ("passage_retrieval_en", ["Paragraph 12"], "Paragraph 1", 0.0),
        ("passage_retrieval_zh", ["段落3"], "段落3", 1.0),
        ("lcc", ["x = 1"], "# set x\nx = 1\ny = 2", 1.0),
        ("lcc", ["x = 1"], "```", 0.0),
        ("gov_report", ["the cat sat on the mat"], "the cat sat", 2 * 3 / (3 + 6)),
        ("samsum", ["the cat sat"], "the cat sat\nthe dog", 1.0),
        ("narrativeqa", ["the cat"], "", 0.0),
    ],
)
def test_longbench_scores(tokenizer, folder, dataset, answers, prediction, score):
    path = folder(f"{dataset}.jsonl", longbench_row(answers=answers))
    task, (example,) = made(f"longbench_{dataset}", tokenizer, path=path)
    assert task.score(prediction, example) == pytest.approx(score)


def test_longbench_scores_chinese_by_words(tokenizer, folder):
    pytest.importorskip("jieba", reason="the extra kvbench[chinese] is not installed")
    row = longbench_row(answers=["我来到北京"], context="我来到北京。" * 4)
    for dataset in ("multifieldqa_zh", "dureader"):
        task, (example,) = made(f"longbench_{dataset}", tokenizer, path=folder(f"{dataset}.jsonl", row))
        assert task.score("我来到北京！", example) == pytest.approx(1.0, abs=0.2)
        assert 0 < task.score("北京", example) < 1
        assert task.score("上海", example) == 0


def test_longbench_e_is_an_option(tokenizer, folder):
    path = folder("qasper_e.jsonl", longbench_row())
    with pytest.raises(KVBenchError, match=r"put the file qasper\.jsonl into"):
        made("longbench_qasper", tokenizer, path=path)
    assert len(made("longbench_qasper", tokenizer, path=path, balanced=True)[1]) == 1
    with pytest.raises(KVBenchError, match="LongBench-E has no musique"):
        made("longbench_musique", tokenizer, path=path, balanced=True)


def test_longbench_v2_is_multiple_choice(tokenizer, folder):
    row = {
        "_id": "q1", "domain": "d", "sub_domain": "s", "difficulty": "easy", "length": "short", "question": "Who? ",
        "choice_A": "Ann", "choice_B": "Bob", "choice_C": "Cy", "choice_D": "Di", "answer": "B", "context": STORY,
    }  # fmt: skip
    task, (example,) = made(LongBenchV2, tokenizer, path=folder("data.json", row))
    assert example.context.startswith(
        "Please read the following text and answer the question below.\n\n<text>\nAnn met"
    )
    assert example.question == (
        "What is the correct answer to this question: Who?\nChoices:\n(A) Ann\n(B) Bob\n(C) Cy\n(D) Di\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert (example.max_new_tokens, example.info["difficulty"]) == (128, "easy")
    for prediction, score in (
        ("The correct answer is (B).", 1), ("**The correct answer is (B)**", 1), ("The correct answer is B", 1),
        ("The correct answer is (A)", 0), ("B", 0), ("", 0),
    ):  # fmt: skip
        assert task.score(prediction, example) == score
    row["answer"] = "E"
    with pytest.raises(KVBenchError, match=r"Row 1 of .*data\.json is not as published"):
        made(LongBenchV2, tokenizer, path=folder("data.json", row))


# Longer than the context length


@pytest.mark.parametrize("length", [300, 301, 777, 1500])
@pytest.mark.parametrize("chat", [True, False])
def test_the_middle_of_a_long_context_is_cut_and_reported(tokenizer, length, chat):
    words = [f"word{n} Ünïcödé 文字" for n in range(600)]
    whole = Example("x/1", " ".join(words), "What is it?\n" * 3, "It is", ("7",), 20, chat=chat)
    (cut,) = fit(tokenizer, [whole], length)
    used = prompt_length(tokenizer, cut) + 20
    assert length - 12 <= used <= length
    assert (cut.question, cut.answer_prefix, cut.references) == (whole.question, whole.answer_prefix, whole.references)
    start = next(n for n, (a, b) in enumerate(zip(cut.context, whole.context, strict=False)) if a != b)
    end = next(n for n, (a, b) in enumerate(zip(cut.context[::-1], whole.context[::-1], strict=False)) if a != b)
    assert start + end >= len(cut.context)
    text = tokenizer.decode(encode(tokenizer, cut).input_ids)
    head = len(tokenizer(text[: text.index(cut.context[:20]) + start], add_special_tokens=False).input_ids)
    assert head == pytest.approx((length - 20) / 2, abs=20)  # half from each end
    total = prompt_length(tokenizer, whole) + 20
    assert cut.info["truncated_tokens"] == pytest.approx(total - used, abs=12)


def test_what_fits_is_left_alone(tokenizer):
    whole = Example("x/1", STORY, "What?", "", ("7",), 20)
    assert fit(tokenizer, [whole], prompt_length(tokenizer, whole) + 20) == [whole]


def test_examples_of_one_context_are_cut_alike(tokenizer):
    several = [Example(f"x/{n}", STORY * 20, "What? " * n, "", ("7",), 20 * n) for n in (1, 5, 3)]
    cut = fit(tokenizer, several, 700)
    assert len({example.context for example in cut}) == 1
    assert max(prompt_length(tokenizer, example) + example.max_new_tokens for example in cut) <= 700


def test_a_question_or_answer_longer_than_the_context_length_is_an_error(tokenizer):
    with pytest.raises(
        KVBenchError, match=r"too small for x/1: its question and its answer \(600 tokens\) take \d+ by"
    ):
        fit(tokenizer, [Example("x/1", STORY, "What?", "", ("7",), 600)], 500)
    with pytest.raises(KVBenchError, match="too small for x/1"):
        fit(tokenizer, [Example("x/1", STORY, "What? " * 600, "", ("7",), 5)], 500)


# Where files come from


def test_the_order_is_drawn_by_the_seed_and_counts_only_add(tokenizer, folder):
    path = folder("qasper.jsonl", *(longbench_row(_id=f"id{n}") for n in range(9)))

    def ids(count, seed):
        return [example.id for example in made("longbench_qasper", tokenizer, count, seed=seed, path=path)[1]]

    assert ids(9, 1)[:4] == ids(4, 1) != ids(4, 2)
    assert sorted(ids(9, 1)) == sorted(ids(20, 2)) and len(set(ids(20, 1))) == 9


def test_files_are_found_below_the_folder_in_archives_or_by_their_own_path(tokenizer, folder, tmp_path, monkeypatch):
    rows = json.dumps(longbench_row(_id="zipped"))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", rows)
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    assert made("longbench_qasper", tokenizer)[1][0].id.endswith("zipped")
    assert made("longbench_qasper", tokenizer, path=tmp_path / "data.zip")[1][0].id.endswith("zipped")
    folder("LongBench/data/qasper.jsonl", longbench_row(_id="unpacked"))
    assert made("longbench_qasper", tokenizer)[1][0].id.endswith("unpacked")
    folder("other.jsonl", longbench_row(_id="mine"))
    assert made("longbench_qasper", tokenizer, path=tmp_path / "other.jsonl")[1][0].id.endswith("mine")


@pytest.mark.parametrize("task", [task for task in TASKS.values() if issubclass(task, FileTask)])
def test_a_missing_file_says_where_to_put_it(tokenizer, task, tmp_path, monkeypatch):
    with pytest.raises(KVBenchError, match=r"put the file .* into a folder that KVBENCH_DATA names, or that you give"):
        task().data()
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    with pytest.raises(KVBenchError, match=f"put the file .* into {re.escape(str(tmp_path))} "):
        one(task, tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"),
        ("{}\n", r"Row 1 of .*qasper\.jsonl is not as published \(KeyError: 'dataset'\)"),
        ("[]\n", r"Row 1 of .* is not as published \(TypeError"),
        ('{"a": 1}\n{"a":', "line 2 is not JSON"),
    ],
)
def test_a_malformed_file_is_named(tokenizer, tmp_path, content, message):
    (tmp_path / "qasper.jsonl").write_text(content)
    with pytest.raises(KVBenchError, match=message):
        made("longbench_qasper", tokenizer, path=tmp_path)
    (tmp_path / "qasper.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KVBenchError, match=r"qasper\.jsonl cannot be read"):
        made("longbench_qasper", tokenizer, path=tmp_path)
    with pytest.raises(KVBenchError, match=r"There is no folder or file .*absent"):
        made("longbench_qasper", tokenizer, path=tmp_path / "absent")
    with pytest.raises(KVBenchError, match="give one of them"):
        made("longbench_qasper", tokenizer, path=tmp_path, hub="a/b")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache with one dataset, as the hub's client lays it out, and no network."""
    import huggingface_hub.constants
    import huggingface_hub.file_download

    snapshot = tmp_path / "hub" / "datasets--owner--data" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_named_hub_dataset_is_read_from_the_hubs_cache(tokenizer, hub):
    (hub / "qasper.jsonl").write_text(json.dumps(longbench_row(_id="hub")))
    assert made("longbench_qasper", tokenizer, hub="owner/data")[1][0].id.endswith("hub")
    with pytest.raises(KVBenchError, match=r"The hub dataset owner/data has no file musique\.jsonl"):
        made("longbench_musique", tokenizer, hub="owner/data")
    with pytest.raises(KVBenchError, match=r"The hub dataset owner/absent could not be fetched .* check its name"):
        made("longbench_qasper", tokenizer, hub="owner/absent")


def test_hub_tables_of_essays_squad_and_hotpotqa(tokenizer, hub):
    arrow = pytest.importorskip("pyarrow", reason="the extra kvbench[hub] is not installed")
    import pyarrow.parquet

    def table(name, rows):
        (hub / name).parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), hub / name)

    table("data/train-00000-of-00001.parquet", [{"text": "I wrote.  You read."}, {"text": "We slept."}])
    needle, (example,) = made(NiahSingle2, tokenizer, count=1, length=512, hub="owner/data")
    assert "I wrote. You read. We slept. I wrote." in example.context.replace(example.info["needle"] + " ", "")
    assert needle.data()["haystack"] == "owner/data train-00000-of-00001.parquet"
    squad = [
        {"title": "t", "context": f"{n}. {STORY}", "question": f"Q{n}?", "answers": {"text": [str(n)] if n else []}}
        for n in range(8)
    ]
    table("squad_v2/validation-00000-of-00001.parquet", squad)
    found = made(Squad, tokenizer, length=640, hub="owner/data")[1]
    assert len(found) == 7
    for example in found:
        assert f"{example.references[0]}. Ann met" in example.context
    hotpot = [
        {
            "question": f"Q{n}?", "answer": str(n),
            "context": {"title": [f"{n}a", f"{n}b"], "sentences": [["One. ", "Two. " * 30], ["Three. " * 30]]},
        }
        for n in range(8)
    ]  # fmt: skip
    table("distractor/validation-00000-of-00001.parquet", hotpot)
    (example,) = made(HotpotQA, tokenizer, count=1, length=430, hub="owner/data")[1]
    n = example.references[0]
    assert f"\n{n}a\nOne. Two. " in example.context and f"\n{n}b\nThree. " in example.context


# ∞-Bench

BOOK = {"id": 0, "context": STORY, "input": "Where did they meet?", "options": [], "answer": ["Rome", "in Rome"]}
CHOICE = {"context": STORY, "input": "Where?", "options": ["Oslo", "Rome", "Bonn", "Paris"], "answer": ["Rome"]}


def test_infinitebench_book_tasks(tokenizer, folder):
    task, (example,) = made(BookQA, tokenizer, path=folder("longbook_qa_eng.jsonl", BOOK))
    assert example.context == f"Read the book and answer the question. Be very concise in your answer.\n\n{STORY}\n\n"
    assert (example.question, example.answer_prefix) == ("Question: Where did they meet?", "Answer:")
    assert (example.max_new_tokens, task.score("Rome", example)) == (40, 1.0)
    task, (example,) = made(ChineseBookQA, tokenizer, path=folder("longbook_qa_chn.jsonl", BOOK | {"answer": ["北京"]}))
    assert task.score("在北京。", example) == pytest.approx(2 * 2 / 5)
    task, (example,) = made(
        BookSummary, tokenizer, path=folder("longbook_sum_eng.jsonl", BOOK | {"answer": "Ann met.\nBob ran."})
    )
    assert (example.answer_prefix, example.max_new_tokens) == ("Summary:", 1200)
    assert task.score("Bob ran.\nAnn met.", example) == 1.0  # lines are sentences, in any order
    task, (example,) = made(
        Dialogue, tokenizer, path=folder("longdialogue_qa_eng.jsonl", BOOK | {"answer": ["STAMP PAID", "BOB"]})
    )
    for prediction, score in (
        (" Stamp Paid.", 1), ("STAMP PAID", 1), ("is Bob", 1), ("Bobby", 1), ("Paid", 0), ("Stamp.Paid", 0), ("", 0),
    ):  # fmt: skip
        assert task.score(prediction, example) == score, prediction


@pytest.mark.parametrize("answer", ["Rome", ["Rome"], ["Rome", "B"]])
def test_infinitebench_multiple_choice(tokenizer, folder, answer):
    row = CHOICE | {"answer": answer}
    task, (example,) = made(BookChoice, tokenizer, path=folder("longbook_choice_eng.jsonl", row))
    assert example.question == "Question: Where?\nA. Oslo\nB. Rome\nC. Bonn\nD. Paris"
    assert (example.answer_prefix, example.references) == ("The letter of the correct answer is", ("Rome", "B"))
    for prediction, score in (
        (" B", 1), ("B. Rome", 1), ("A", 0), ("Rome", 1), ("the answer is: B", 1), ("the answer is: C", 0),
        ("I say B or C", 1), ("I say C or B", 1), ("A? No, B", 1), ("B? No, A", 1), ("A? No, C", 0), ("A\nB", 0),
        ("", 0), ("no idea", 0), ("the answer is", 0),
    ):  # fmt: skip
        assert task.score(prediction, example) == score, prediction
    task, (example,) = made(CodeDebug, tokenizer, path=folder("code_debug.jsonl", row))
    assert (example.answer_prefix, example.max_new_tokens) == ("The correct option is:", 5)
    for prediction, score in (
        ("B. Rome", 1),
        (" B:", 1),
        ("A. Oslo", 0),
        ("B", 1),
        ("Rome", 1),
        ("C or B", 1),
        ("B or C", 1),
        ("A or C", 0),
        ("it is: B", 1),
        ("it is: Rome", 1),
        ("it is:", 0),
    ):
        assert task.score(prediction, example) == score, prediction


@pytest.mark.parametrize("answer", [[1, 4, 8, 2], [[1, 4, 8, 2]]])
def test_infinitebench_math_calc_counts_up_to_the_first_error(tokenizer, folder, answer):
    path = folder("math_calc.jsonl", {"context": "1 + 3 + 4 - 6", "answer": answer, "input": ""})
    task, (example,) = made(MathCalc, tokenizer, path=path, length=31_000)
    assert example.max_new_tokens == 30_000
    assert [task.score(p, example) for p in ("[1, 4, 8, 2]", "1 04 9 2", "9" * 5000, "x")] == [1.0, 0.5, 0.0, 0.0]
    with pytest.raises(KVBenchError, match=r"its question and its answer \(30000 tokens\) take"):
        made(MathCalc, tokenizer, path=path, length=2048)


# Shared contexts


def scbench(tokenizer, folder, task, *turns, **row):
    path = folder(f"scbench_{task}.jsonl", {"id": 1, "context": STORY, "multi_turns": list(turns), **row})
    return made(f"scbench_{task}", tokenizer, path=path, length=4096)


def test_scbench_asks_each_question_by_itself_about_one_context(tokenizer, folder):
    turns = [{"input": f"Key: {n}", "answer": f"value-{n}"} for n in range(3)]
    task, examples = scbench(tokenizer, folder, "kv", *turns)
    opening = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    assert {example.context for example in examples} == {f"{opening}{STORY}\n\n"}
    assert [example.question for example in examples] == ["Key: 0", "Key: 1", "Key: 2"]
    assert len({example.id for example in examples}) == 3
    assert task.score("it is value-1!", examples[1]) == 1.0
    assert task.score("it is value-0!", examples[1]) == 0.0
    assert examples[0].max_new_tokens == 150
    path = folder("scbench_kv.jsonl", *({"context": STORY, "multi_turns": turns} for _ in range(3)))
    assert len(made("scbench_kv", tokenizer, count=7, path=path, length=4096)[1]) == 7


@pytest.mark.parametrize(
    ("name", "turn", "right", "wrong"),
    [
        ("vt", {"input": "Find.", "answer": ["AB", "CD"]}, "ab cd", "none"),
        ("qa_eng", {"input": "Who?", "answer": ["Ann", "Bob"]}, "It was ann", "Cy"),
        ("qa_chn", {"input": "谁", "answer": "北京"}, "北京。", "上海"),
        ("choice_eng", {"input": "Who?", "options": ["a", "b", "c", "d"], "answer": "B"}, "B", "A"),
        ("mf", {"input": "The largest number is", "answer": 97}, " 97.", "96"),
        ("many_shot", {"input": "Q", "answer": "(B)"}, "(b)", "(a)"),
        ("summary", {"input": "Sum up.", "answer": "the cat sat"}, "the cat sat", "dog"),
        ("repoqa", {"input": "Find.", "answer": FUNCTION}, f"```python\n{FUNCTION}```", "no"),
        ("summary_with_needles", {"task": "scbench_passkey", "input": "?", "answer": "123"}, "123", "1234"),
        ("repoqa_and_kv", {"task": "scbench_kv", "input": "?", "answer": "ab-c"}, "x ab-c", "ab"),
    ],
)  # fmt: skip
def test_scbench_scores(tokenizer, folder, name, turn, right, wrong):
    task, (example,) = scbench(tokenizer, folder, name, turn)
    assert task.score(right, example) == 1.0
    assert task.score(wrong, example) == 0.0
    assert task.score("", example) == 0.0


def test_scbench_names_a_malformed_row(tokenizer, folder):
    with pytest.raises(KVBenchError, match=r"Row 1 of .*scbench_kv\.jsonl is not as published \(KeyError: 'answer'\)"):
        scbench(tokenizer, folder, "kv", {"input": "Key"})


def test_scbench_judges_a_choice_by_the_first_letter(tokenizer, folder):
    turn = {"input": "Who?", "options": ["a", "b", "c", "d"], "answer": "B"}
    task, (example,) = scbench(tokenizer, folder, "choice_eng", turn)
    assert example.question == "Question: Who?\nA. a\nB. b\nC. c\nD. d\n\nThe the correct answer is"
    assert [task.score(p, example) for p in ("B or C", "C or B", "the answer is: B")] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("length", [1024, 3000])
def test_shared_needles_ask_for_each_number_of_one_context(tokenizer, length):
    task = SharedNeedles(SharedNeedles.Options(requests=3))
    examples = list(task.examples(tokenizer, context_length=length, count=7, seed=1))
    assert [example.context for example in examples[:3]] == [examples[0].context] * 3
    assert len({example.context for example in examples}) == 3
    assert len({example.id for example in examples}) == len({example.question for example in examples}) == 7
    for example in examples:
        key = re.search(r"magic number for (\S+) mentioned", example.question).group(1)
        needle = f"One of the special magic numbers for {key} is: {example.references[0]}."
        assert example.context.count(needle) == 1
        assert example.info["needle"] == needle
        assert 0.9 * length <= prompt_length(tokenizer, example) + example.max_new_tokens <= length
    assert examples[:4] == list(task.examples(tokenizer, context_length=length, count=4, seed=1))
    assert NiahMultikey1().keys == 4


# Long output


@pytest.mark.parametrize("length", [1024, 4096])
def test_long_code_is_a_short_prompt_whose_answer_fills_the_context(tokenizer, length):
    example = one(LongCode, tokenizer, length)
    prompt = prompt_length(tokenizer, example)
    assert prompt < 0.4 * 1024
    assert 0.9 * length <= prompt + example.max_new_tokens <= length
    (answer,) = example.references
    assert len(tokenizer("\n" + answer + "\n", add_special_tokens=False).input_ids) <= example.info["answer_tokens"]
    module = example.answer_prefix.removeprefix("```python\n") + "\n" + answer
    names = {}
    exec(module, names)  # code that the task itself wrote
    last = int(re.search(r"step_1 to step_(\d+)", example.context).group(1))
    constants = [int(n) for n in re.search(r"again from the first: ([\d, ]+)\.", example.context).group(1).split(", ")]
    sign = re.search(r"step_1\(x\) returns x (.) the first", example.context).group(1)
    value = 3
    for n in range(last):
        value = {"+": value + constants[n % 8], "-": value - constants[n % 8], "*": value * constants[n % 8]}[sign]
    assert names[f"step_{last}"](3) == value
    assert f"step_{last + 1}" not in names


def test_long_code_scores_the_share_of_right_functions(tokenizer):
    task, example = LongCode(), one(LongCode, tokenizer, 1024)
    (answer,) = example.references
    functions = answer.split("\n\n")
    assert task.score("\n" + answer + "\n```\nDone.", example) == 1.0
    assert task.score("\n\n".join(functions[:2]), example) == pytest.approx(2 / len(functions))
    assert task.score(answer.replace("return", "retrun"), example) == 0.0
    assert task.score("", example) == 0.0


def test_classeval_compares_the_code_block_with_the_solution(tokenizer, folder):
    solution = "class A:\n    def f(self):\n        return 1"
    row = {
        "task_id": "ClassEval_0",
        "class_name": "A",
        "skeleton": "class A:\n    def f(self): ...",
        "solution_code": solution,
    }
    task, (example,) = made(ClassEval, tokenizer, path=folder("ClassEval_data.json", row), max_new_tokens=300)
    assert example.context == f"Please complete the class A in the following code.\n{row['skeleton']}"
    assert example.max_new_tokens == 300
    assert task.score(f"Here:\n```python\n{solution}\n```\nDone.", example) == 1.0
    assert 0 < task.score(solution[:20], example) < 1
    assert task.score("", example) == 0.0


# Metrics of libraries


TEXTS = st.lists(st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join), max_size=5).map("\n".join)


@given(prediction=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=2))
@settings(max_examples=300, deadline=None)
def test_rouge_is_that_of_rouge_score(prediction, references):
    for kind, metric in (("rougeL", rouge_l), ("rougeLsum", rouge_lsum)):
        scorer = RougeScorer([kind])
        assert metric(prediction, references) == max(
            scorer.score(reference, prediction)[kind].fmeasure for reference in references
        )


def test_rouge_of_real_text_is_that_of_rouge_score():
    lines = re.findall(r"[^.]+\.", " ".join(essays().words[:700]))
    prediction, reference = "\n".join(lines[::2] + lines[1::3]), "\n".join(lines)
    scores = RougeScorer(["rougeL", "rougeLsum"]).score(reference, prediction)
    assert rouge_l(prediction, [reference]) == scores["rougeL"].fmeasure
    assert rouge_lsum(prediction, [reference]) == scores["rougeLsum"].fmeasure


def test_rouge_of_long_texts_takes_a_moment():
    rng = random.Random(1)
    first, second = (" ".join(f"w{rng.randrange(2000)}" for _ in range(5000)) for _ in range(2))
    start = time.process_time()
    assert 0 < rouge_l(first, [second]) < 1
    assert time.process_time() - start < 1
    start = time.process_time()
    assert 0 < rouge_lsum(first, [second]) < 1
    assert rouge_lsum(first.replace(" ", "\n", 500), [second.replace(" ", "\n", 500)]) > 0
    assert time.process_time() - start < 8


def test_chinese_answers_lose_the_published_punctuation():
    assert f1_characters("〈北京〉，！", ["北京"]) == pytest.approx(
        2 * 2 / 6
    )  # 〈 and 〉 are not in the published list
    assert f1_characters(" 北\n京。《", ["北京"]) == pytest.approx(2 * 2 / 5)
    assert f1_characters("北京→", ["北京"]) == pytest.approx(2 * 2 / 5)


def test_metrics_of_libraries():
    assert rouge_l("the cat sat", ["a dog", "the cat sat on the mat"]) == pytest.approx(2 * 3 / 9)
    assert rouge_lsum("b c\na", ["a\nb c"]) == 1.0 > rouge_l("b c\na", ["a\nb c"])
    assert bleu("the cat sat on the mat", ["the cat sat on the mat"]) == pytest.approx(1)
    assert 0 < bleu("the cat sat on a mat", ["the cat sat on the mat"]) < 1
    assert chrf("cat", ["dog", "cat"]) == pytest.approx(1)
    assert edit_similarity("abcd", ["xyz", "abce"]) == 0.75
    assert f1_characters("a, b!", ["ab"]) == 1.0
    for metric in (rouge_l, rouge_lsum, bleu, chrf, edit_similarity, f1_characters):
        assert metric("", ["cat"]) == 0.0
