"""Request traces in the format that Mooncake published: one JSON object a line, prompts as hashes of their blocks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import check_regular, parse_json, plain, reading, reason

BLOCK = 512
"""Tokens of a block, of which a line has a hash each (Qin et al., Mooncake, FAST 2025)."""
MOST = 2**31 - 1


@dataclass(frozen=True)
class Request:
    """A request: seconds since the trace's start, tokens read and generated, and its prompt's blocks.

    Equal ids at equal places after equal ids are equal tokens; the last block may not be full.
    """

    at: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]

    @property
    def whole_blocks(self) -> int:
        """How many of its blocks are full, so that a longer prompt can begin with them."""
        return min(self.input_tokens // BLOCK, len(self.blocks))


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    timestamp: Annotated[float, Field(ge=0, le=2**53, allow_inf_nan=False)]
    input_length: Annotated[int, Field(ge=1, le=MOST)]
    output_length: Annotated[int, Field(ge=0, le=MOST)]
    hash_ids: list[Annotated[int, Field(ge=-(2**63), lt=2**64)]]


def read_requests(file: Path) -> list[Request]:
    """Read a trace: `timestamp` in ms, `input_length`, `output_length` and `hash_ids` of 512-token blocks in each line.

    Raises KVBenchError that names the line for anything else, for a number of ids that is not the prompt's, and for a
    timestamp before the previous line's.
    """
    found: list[Request] = []
    with reading(lambda reason: f"{file} cannot be read ({reason}): give a request trace in Mooncake's format."):
        check_regular(file)
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found.append(_request(file, number, line, found[-1].at if found else 0.0))
    if not found:
        raise KVBenchError(f"{file} holds no request: give a trace with a JSON object in each line.")
    return found


def _request(file: Path, number: int, line: bytes, earliest: float) -> Request:
    def wrong(why: str) -> KVBenchError:
        return KVBenchError(
            f"{file} line {number}: {plain(why)}; expected timestamp (ms), input_length, output_length and hash_ids of "
            f"{BLOCK}-token blocks."
        )

    try:
        given: Any = parse_json(line, ours=False)
        if not isinstance(given, dict):
            raise wrong("it is no JSON object")
        one = _Line.model_validate(given)
    except (ValidationError, ValueError) as error:
        raise wrong(reason(error)) from None
    most = -(-one.input_length // BLOCK)
    if not one.input_length // BLOCK <= len(one.hash_ids) <= most:
        raise wrong(f"{len(one.hash_ids)} hash_ids are not the {most} blocks of {one.input_length} tokens")
    at = one.timestamp / 1000
    if at < earliest:
        raise wrong(f"timestamp {one.timestamp:g} is before the previous line's {1000 * earliest:g}")
    return Request(at, one.input_length, one.output_length, tuple(one.hash_ids))


def write_requests(file: Path, requests: list[Request]) -> None:
    """Write a trace in the format that `read_requests` takes."""
    with file.open("w", encoding="utf-8") as out:
        for one in requests:
            line = {
                "timestamp": round(1000 * one.at), "input_length": one.input_tokens,
                "output_length": one.output_tokens, "hash_ids": list(one.blocks),
            }  # fmt: skip
            out.write(json.dumps(line) + "\n")


def statistics(requests: list[Request]) -> dict[str, float]:
    """What a trace is described by: requests, seconds, mean tokens, and hits of a store that never forgets.

    `block_hit_ratio`: blocks that an earlier request had, after nothing but such blocks, over all blocks.
    """
    seen: set[int] = set()
    hits = blocks = 0
    for one in requests:
        for block in one.blocks:
            if block not in seen:
                break
            hits += 1
        seen.update(one.blocks)
        blocks += len(one.blocks)
    gaps = [later.at - earlier.at for earlier, later in pairwise(requests)]
    return {
        "requests": len(requests), "seconds": sum(gaps),
        "mean_input_tokens": sum(one.input_tokens for one in requests) / len(requests),
        "mean_output_tokens": sum(one.output_tokens for one in requests) / len(requests),
        "block_hit_ratio": hits / max(blocks, 1),
    }  # fmt: skip
