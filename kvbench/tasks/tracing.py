"""A tiny language of registers, whose programs are traced step by step: it is interpreted here, and nothing else is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbench.contract.errors import KVBenchError

WORDS = {"set": 2, "add": 2, "sub": 2, "mul": 2, "mod": 2, "jump": 4, "stop": 0}
"""Instructions and how many words follow them.

`set r x`, `add r x`, `sub r x`, `mul r x` and `mod r x` change the register r by x, a number or a register;
`jump n if r x` goes to line n if r is less than x; `stop` ends the program. Registers begin at 0.
"""


@dataclass(frozen=True)
class Step:
    """A line that was run, and what the registers hold after it."""

    line: int
    registers: dict[str, int]


def run(program: Sequence[str], registers: Sequence[str], most_steps: int) -> list[Step]:
    """Run a program, whose lines count from 1, for at most `most_steps` steps.

    Raises KVBenchError, naming the line, for one that is no instruction.
    """
    held = dict.fromkeys(registers, 0)
    steps: list[Step] = []
    line = 1
    while line <= len(program) and len(steps) < most_steps:
        word, *rest = program[line - 1].split() or [""]
        if WORDS.get(word) != len(rest):
            raise _wrong(program, line)
        following = line + 1
        if word == "stop":
            following = len(program) + 1
        elif word == "jump":
            target, condition, register, limit = rest
            if condition != "if" or not target.isdigit() or not 1 <= int(target) <= len(program):
                raise _wrong(program, line)
            if _value(held, register, program, line) < _value(held, limit, program, line):
                following = int(target)
        else:
            register, operand = rest
            if register not in held:
                raise _wrong(program, line)
            held[register] = _changed(word, held[register], _value(held, operand, program, line), program, line)
        steps.append(Step(line, dict(held)))
        line = following
    return steps


def _value(held: dict[str, int], word: str, program: Sequence[str], line: int) -> int:
    if word in held:
        return held[word]
    try:
        return int(word)
    except ValueError:
        raise _wrong(program, line) from None


def _changed(word: str, old: int, value: int, program: Sequence[str], line: int) -> int:
    if word == "mod" and value == 0:
        raise _wrong(program, line)
    return {"set": value, "add": old + value, "sub": old - value, "mul": old * value, "mod": old % (value or 1)}[word]


def _wrong(program: Sequence[str], line: int) -> KVBenchError:
    return KVBenchError(
        f"Line {line} of the program, {program[line - 1]!r}, is no instruction: give one of {', '.join(WORDS)} with "
        "its registers and numbers."
    )
