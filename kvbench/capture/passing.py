"""Runs a model over a text for a capture, and keeps how far it has come, so that another process can go on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock
import torch
from torch import Tensor

from kvbench.capture.files import CaptureConfig, writing_to
from kvbench.capture.probe import CaptureProbe
from kvbench.contract.errors import KVBenchError
from kvbench.contract.reading import read_json
from kvbench.engine.attach import attach
from kvbench.engine.saving.progress import Piece, read_piece, take_prompt, take_steps, write_piece
from kvbench.engine.session import Session

Progress = Callable[[int, int, str], None]
"""Is told how many tokens are read, of how many, and what happens now."""
EVERY_S = 10.0
"""Between two pieces of what has been read that are kept."""
PLAN, PIECES = "plan.json", "pieces"


class Partial:
    """The folder, beside a capture's, of one that is being made; kept when the process is stopped, for the next one.

    `plan` is all that its content depends on: a folder of another plan is emptied. Holds the folder against another
    process.
    """

    def __init__(self, output: Path, plan: Mapping[str, Any]) -> None:
        self.folder = output.parent / f".{output.name}.partial"
        self._output, self._plan = output, json.loads(json.dumps(plan))
        self._lock = filelock.FileLock(output.parent / f".{output.name}.lock")

    def __enter__(self) -> Self:
        with writing_to(self._output):
            try:
                self._lock.acquire(timeout=0)
            except filelock.Timeout:
                raise KVBenchError(
                    f"Another kvbench is capturing to {self._output}: wait for it, or give another --output."
                ) from None
            if not self._same():
                shutil.rmtree(self.folder, ignore_errors=True)
                (self.folder / PIECES).mkdir(parents=True)
                (self.folder / PLAN).write_text(json.dumps(self._plan), "utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        useless = kind is not None and (issubclass(kind, KVBenchError) or not self.pieces())
        if useless:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def pieces(self) -> list[Path]:
        """The files of what was read, in order."""
        return sorted((self.folder / PIECES).glob("*.safetensors"))

    def read(self, session: Session) -> list[Piece]:
        """What an earlier process read; nothing where a file is damaged or of other code: then all is read anew."""
        try:
            return [read_piece(session, path) for path in self.pieces()]
        except KVBenchError:
            for path in self.pieces():
                path.unlink()
            return []

    def piece(self, start: int) -> Path:
        """The file of what is read from a token on."""
        return self.folder / PIECES / f"{start:09d}.safetensors"

    def forget(self) -> None:
        """Leave nothing in the folder but the capture."""
        with writing_to(self.folder):
            shutil.rmtree(self.folder / PIECES)
            (self.folder / PLAN).unlink()

    def _same(self) -> bool:
        try:
            return bool(read_json(self.folder / PLAN) == self._plan)
        except (OSError, ValueError):
            return False


@torch.inference_mode()
def read_through(
    model: Any, ids: list[int], config: CaptureConfig, probe: CaptureProbe, partial: Partial, prefill_chunk: int,
    progress: Progress,
) -> list[int]:  # fmt: skip
    """Run prompt and decoding through the probe, from where an earlier process was; the ids of the decoded tokens."""
    prompt, of = config.prompt_tokens, config.context_length
    tokens = torch.tensor([ids], device=model.device)
    last_chunk = (prompt - 1) // prefill_chunk * prefill_chunk
    with attach(model, policy="full", probes=[probe], prompt_tokens=prompt) as session:
        pieces = partial.read(session)
        read = [piece for piece in pieces if piece.stop <= last_chunk]
        steps = [piece for piece in pieces if piece.start >= prompt]
        saved = start = read[-1].stop if read else 0
        if read:
            take_prompt(session, read, tokens)
        kept_at = time.monotonic()
        while start < prompt:
            progress(start, of, "reading the prompt")
            stop = min(start + prefill_chunk, prompt)
            out = model(
                tokens[:, start:stop], past_key_values=session.cache if start else None, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            start = stop
            if start < prompt and time.monotonic() - kept_at >= EVERY_S:
                saved = write_piece(session, partial.piece(saved), saved, _queries(session, probe, saved), {})
                kept_at = time.monotonic()
        decoded: list[int] = []
        saved = prompt
        token = _next(model, config, ids, 0, out.logits)
        if steps:
            decoded, token = _take_steps(session, probe, steps, model.device)
            saved = steps[-1].stop
        while len(decoded) < config.decode_tokens:
            progress(prompt + len(decoded), of, "decoding")
            decoded.append(token)
            step = torch.tensor([[token]], device=model.device)
            out = model(step, past_key_values=session.cache, use_cache=True, logits_to_keep=1)
            if len(decoded) < config.decode_tokens:
                token = _next(model, config, ids, len(decoded), out.logits)
            if time.monotonic() - kept_at >= EVERY_S:
                more = {"decoded": decoded, "next": token}
                saved = write_piece(session, partial.piece(saved), saved, probe.decoded(saved - prompt), more)
                kept_at = time.monotonic()
    return decoded


def _queries(session: Session, probe: CaptureProbe, start: int) -> dict[int, Tensor]:
    """The chosen layers' queries [1, H, m, d] of the prompt's tokens from `start` on."""
    assert session.cache is not None
    found = {}
    for cached in session.cache.governed:
        if cached.number in probe.layers:
            cached.prompt_queries = [torch.cat(cached.prompt_queries, dim=2)]
            found[cached.number] = cached.prompt_queries[0][:, :, start:]
    return found


def _take_steps(
    session: Session, probe: CaptureProbe, steps: list[Piece], device: torch.device
) -> tuple[list[int], int]:
    decoded = [int(token) for token in steps[-1].more["decoded"]]
    take_steps(session, steps, torch.tensor([decoded], device=device))
    for piece in steps:
        probe.take(piece.queries, piece.keys, piece.values)
    return decoded, int(steps[-1].more["next"])


def _next(model: Any, config: CaptureConfig, ids: list[int], step: int, logits: Tensor) -> int:
    """The token that is decoded next, the `step`-th after the prompt."""
    if config.decoding == "text":
        return ids[config.prompt_tokens + step]
    scores = logits[0, -1].clone()
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    if stops := [ends] if isinstance(ends, int) else list(ends or ()):
        scores[stops] = -torch.inf  # an answer's end would leave nothing to decode
    return int(scores.argmax())
