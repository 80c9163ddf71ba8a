"""LongBench and LongBench v2, from their published files (Bai et al., arXiv:2308.14508 and arXiv:2412.15204)."""

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

from pydantic import Field

from kvbench.contract.errors import KVBenchError
from kvbench.contract.task import Example, Task
from kvbench.tasks.files import FileOptions, FileTask, Published, load
from kvbench.tasks.metrics import check_installed, edit_similarity, f1, f1_chinese, rouge_l, rouge_l_chinese

Metric = Callable[[str, Sequence[str]], float]


def numbers_right(prediction: str, references: Sequence[str]) -> float:
    """Share of the prediction's numbers that are the number in the reference (LongBench, arXiv:2308.14508)."""
    found = re.findall(r"\d+", prediction)
    wanted = [number for reference in references for number in re.findall(r"\d+", reference)[:1]]
    return max((found.count(number) / len(found) for number in wanted), default=0.0) if found else 0.0


def class_right(prediction: str, references: Sequence[str], classes: Sequence[str]) -> float:
    """1 / (number of class names in the prediction) if the right one is among them, else 0 (LongBench).

    Names that are part of the right one do not count.
    """
    scores = [0.0]
    for reference in references:
        named = [name for name in classes if name in prediction and not (name in reference and name != reference)]
        scores.append(1 / len(named) if reference in named else 0.0)
    return max(scores)


def next_line_similarity(prediction: str, references: Sequence[str]) -> float:
    """Edit similarity of the prediction's first line that holds no `, # or // (LongBench)."""
    lines = (line for line in prediction.lstrip("\n").split("\n") if not re.search("`|#|//", line))
    return edit_similarity(next(lines, ""), references)


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_STORY = "as concisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
_QASPER = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)

DATASETS: dict[str, tuple[str, Metric | None, int]] = {
    "narrativeqa": (
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"{_STORY}Story: {{context}}\n\nNow, answer the question based on the story {_STORY}"
        "Question: {input}\n\nAnswer:",
        f1, 128,
    ),
    "qasper": (
        f"You are given a scientific article and a question. Answer the question {_QASPER}Article: {{context}}\n\n "
        f"Answer the question based on the above article {_QASPER}Question: {{input}}\n\nAnswer:",
        f1, 128,
    ),
    "multifieldqa_en": (
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        f1, 64,
    ),
    "multifieldqa_zh": (
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。"
        "\n\n问题：{input}\n回答：",
        f1_chinese, 64,
    ),
    "hotpotqa": (_PASSAGES, f1, 32),
    "2wikimqa": (_PASSAGES, f1, 32),
    "musique": (_PASSAGES, f1, 32),
    "dureader": (
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
        rouge_l_chinese, 128,
    ),
    "gov_report": (
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}"
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        rouge_l, 512,
    ),
    "qmsum": (
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
        rouge_l, 512,
    ),
    "multi_news": (
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write "
        "a one-page summary of all the news.\n\nSummary:",
        rouge_l, 512,
    ),
    "vcsum": (
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
        rouge_l_chinese, 512,
    ),
    "trec": (
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        None, 64,
    ),
    "triviaqa": (
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        f1, 32,
    ),
    "samsum": (
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        rouge_l, 128,
    ),
    "lsht": ("请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}", None, 64),
    "passage_count": (
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
        "3, and so on.\n\nThe final answer is: ",
        numbers_right, 32,
    ),
    "passage_retrieval_en": (
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
        'that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
        numbers_right, 32,
    ),
    "passage_retrieval_zh": (
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n{input}\n\n"
        '请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        numbers_right, 32,
    ),
    "lcc": ("Please complete the code given below. \n{context}Next line of code:\n", next_line_similarity, 64),
    "repobench-p": (
        "Please complete the code given below. \n{context}{input}Next line of code:\n", next_line_similarity, 64,
    ),
}  # fmt: skip
"""Prompt, metric and most new tokens of each dataset, as published; no metric means classification."""

NO_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
"""Datasets whose prompts the published harness gives without a chat template."""

FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
"""Datasets of which only the answer's first line counts."""

BALANCED = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
"""Datasets of LongBench-E."""


KINDS: dict[str, tuple[str, ...]] = {
    "question about one document": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "question about several documents": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summary": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot examples": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "next line of code": ("lcc", "repobench-p"),
}


class LongBench(FileTask):
    """One dataset of LongBench with its published prompt, answer length and metric."""

    reference = "LongBench, arXiv:2308.14508"
    published = "LongBench's data (hub dataset THUDM/LongBench, file data.zip)"
    dataset: ClassVar[str]

    class Options(FileOptions):
        """Where the published files are, and which of them."""

        balanced: bool = Field(False, description="LongBench-E's file of evenly spread lengths instead.")

    def data(self) -> dict[str, str]:
        """Name the published file and its hash."""
        metric = DATASETS[self.dataset][1]
        if metric is not None:
            check_installed(metric.__name__)
        return super().data()

    def build(self, row: Any, name: str) -> list[Example]:
        """Make the example of a row."""
        template, _, max_new_tokens = DATASETS[self.dataset]
        before, after = template.split("{context}")
        info: dict[str, str | int | float] = {"dataset": row["dataset"], "length": row["length"]}
        if row.get("all_classes"):
            info["classes"] = "\n".join(row["all_classes"])
        references = tuple(str(answer) for answer in row["answers"])
        if not references:
            raise ValueError("no answers")
        return [
            Example(
                id=f"{name}/{row['_id']}",
                context=before + row["context"],
                question=after.replace("{input}", row["input"]),
                answer_prefix="",
                references=references,
                max_new_tokens=max_new_tokens,
                info=info,
                chat=self.dataset not in NO_CHAT,
            )
        ]

    def score(self, prediction: str, example: Example) -> float:
        """Score by the dataset's metric, the best over the references."""
        if self.dataset in FIRST_LINE:
            prediction = prediction.lstrip("\n").split("\n")[0]
        metric = DATASETS[self.dataset][1]
        if metric is None:
            return class_right(prediction, example.references, str(example.info.get("classes", "")).split("\n"))
        return metric(prediction, example.references)

    def _load(self) -> Published:
        options = cast("LongBench.Options", self.options)
        if options.balanced and self.dataset not in BALANCED:
            raise KVBenchError(f"LongBench-E has no {self.dataset}: leave balanced off, or take {', '.join(BALANCED)}.")
        file = f"{self.dataset}_e.jsonl" if options.balanced else f"{self.dataset}.jsonl"
        return load(options, (file,), self.published)


def _task(kind: str, dataset: str) -> type[Task]:
    return type(
        f"LongBench_{dataset}",
        (LongBench,),
        {
            "__doc__": LongBench.__doc__,
            "__module__": __name__,
            "name": f"longbench_{dataset}",
            "summary": f"LongBench, {kind}: {dataset} (needs its published file)",
            "dataset": dataset,
        },
    )


LONGBENCH: list[type[Task]] = [_task(kind, dataset) for kind, datasets in KINDS.items() for dataset in datasets]
"""A task for each dataset."""


class LongBenchV2(FileTask):
    """LongBench v2's multiple choice about contexts of 8 thousand to 2 million words, with the zero-shot prompt."""

    name = "longbench_v2"
    summary = "LongBench v2: multiple choice about long contexts (needs its published file)"
    reference = "LongBench v2, arXiv:2412.15204"
    patterns = ("data.json", "data/train-*.parquet")
    published = "LongBench v2's data (hub dataset THUDM/LongBench-v2)"

    def build(self, row: Any, name: str) -> list[Example]:
        """Make the example of a row."""
        choices = "\n".join(f"({letter}) {row[f'choice_{letter}'].strip()}" for letter in "ABCD")
        if row["answer"] not in tuple("ABCD"):
            raise ValueError(f"answer {row['answer']!r}")
        return [
            Example(
                id=f"{name}/{row['_id']}",
                context=(
                    "Please read the following text and answer the question below.\n\n<text>\n"
                    f"{row['context'].strip()}\n</text>\n\n"
                ),
                question=(
                    f"What is the correct answer to this question: {row['question'].strip()}\nChoices:\n{choices}\n\n"
                    'Format your response as follows: "The correct answer is (insert answer here)".'
                ),
                answer_prefix="",
                references=(row["answer"],),
                max_new_tokens=128,
                info={key: row[key] for key in ("domain", "sub_domain", "difficulty", "length")},
            )
        ]

    def score(self, prediction: str, example: Example) -> float:
        """1 if the letter after «The correct answer is» is the right one, else 0."""
        plain = prediction.replace("*", "")
        found = re.search(r"The correct answer is \(([A-D])\)", plain) or re.search(
            r"The correct answer is ([A-D])", plain
        )
        return float(found is not None and found.group(1) == example.references[0])
