"""Tasks: where examples come from and how answers are scored."""

import pluggy

from kvbench.contract.task import Example, ForcedTask, LogitScores, Prompt, Task, TokenExample
from kvbench.tasks import (
    code,
    fidelity,
    infinitebench,
    infinitebench_files,
    jsonl,
    long_answers,
    longbench,
    reasoning,
    ruler,
    ruler_more,
    shared,
)
from kvbench.tasks.prompts import encode, fill, prompt_length

__all__ = [
    "Example",
    "ForcedTask",
    "LogitScores",
    "Prompt",
    "Task",
    "TokenExample",
    "encode",
    "fill",
    "kvbench_tasks",
    "prompt_length",
]

hookimpl = pluggy.HookimplMarker("kvbench")


@hookimpl
def kvbench_tasks() -> list[type[Task] | type[ForcedTask]]:
    """Register the built-in tasks."""
    return [
        ruler.NiahSingle1,
        ruler.NiahSingle2,
        ruler.NiahSingle3,
        ruler.NiahMultikey1,
        ruler.NiahMultikey2,
        ruler.NiahMultikey3,
        ruler.NiahMultivalue,
        ruler.NiahMultiquery,
        ruler_more.VariableTracking,
        ruler_more.CommonWords,
        ruler_more.FrequentWords,
        ruler_more.Squad,
        ruler_more.HotpotQA,
        ruler.NeedleGrid,
        infinitebench.Passkey,
        infinitebench.NumberString,
        infinitebench.KVRetrieval,
        infinitebench.MathFind,
        infinitebench.CodeRun,
        infinitebench_files.BookQA,
        infinitebench_files.BookChoice,
        infinitebench_files.BookSummary,
        infinitebench_files.Dialogue,
        infinitebench_files.ChineseBookQA,
        infinitebench_files.CodeDebug,
        infinitebench_files.MathCalc,
        *longbench.LONGBENCH,
        longbench.LongBenchV2,
        shared.SharedNeedles,
        *shared.SCBENCH,
        code.LongCode,
        code.ClassEval,
        *long_answers.LONG_ANSWERS,
        *reasoning.REASONING,
        jsonl.JsonLines,
        fidelity.Fidelity,
    ]
