"""A folder of saved contexts, found again by the tokens that a prompt begins with."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvbench.contract.errors import KVBenchError, unwritable
from kvbench.engine.saving.files import StateFile, temporaries
from kvbench.engine.saving.identify import About, about, check_same
from kvbench.engine.session import Session

SUFFIX = ".kv"
_NAME = re.compile(r"([0-9a-f]{16})-(\d+)-([0-9a-f]{32})\.kv")
_DAY = 86_400.0


@dataclass(frozen=True)
class Prefix:
    """A context in a store: its file, its tokens a row, and the file's bytes.

    `query_aware` says, in one line, what the policy chose by the context's own last tokens, where a question inside
    the prompt would have made it choose otherwise; empty for policies that don't.
    """

    path: Path
    tokens: int
    bytes: int
    query_aware: str = ""


class PrefixStore:
    """Contexts in a folder, each saved once and gone on from by every prompt that begins with it.

    Contexts of several models, policies, options, budgets and versions of their code lie beside each other, and a
    session finds its own. Several processes may use one store: a context is there whole or not at all. With a `limit`
    in bytes, the contexts that were used least recently leave. Raises KVBenchError where the folder cannot be made.
    """

    def __init__(self, folder: str | Path, *, limit: int | None = None) -> None:
        self.folder, self.limit = Path(folder), limit
        if limit is not None and limit < 1:
            raise KVBenchError(f"The limit of {limit} bytes holds no context: give a positive number, or None for all.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KVBenchError(unwritable(self.folder, error, "folder")) from None

    def save(self, session: Session) -> Prefix:
        """Save the context that a session has read, as `Session.save` does; the store's other contexts may leave."""
        self._sweep()
        ids = session.ids
        if session.cache is None or ids is None:
            raise KVBenchError(
                "A context is found again by its token ids, and this session has none: let the model read a prompt of "
                "input_ids first."
            )
        held = sum(session.cache.bytes().values())
        if self.limit is not None and held > self.limit:
            raise KVBenchError(
                f"The context holds {held} bytes, and the store {self.folder} takes {self.limit}: raise its limit."
            )
        tokens = ids.shape[1]
        name = f"{_key(_mine(session))}-{tokens}-{_named(ids, session.mask)}{SUFFIX}"
        path = self.folder / name
        session.save(path)
        self._shrink(path)
        return Prefix(path, tokens, path.stat().st_size, session.query_aware)

    def find(self, session: Session, ids: Tensor, mask: Tensor | None = None) -> Prefix | None:
        """The longest context that this session can go on from with `ids` [B, n], left-padded where `mask` is 0.

        At least one token is left, which the model has to read for the next; None where there is no such context.
        """
        key = _key(_mine(session))
        ours = {tokens: path for path, owner, tokens, _ in self._files() if owner == key}
        for tokens in sorted((tokens for tokens in ours if tokens < ids.shape[1]), reverse=True):
            found = self._at(key, ids, mask, tokens)
            if found is not None:
                return Prefix(found, tokens, found.stat().st_size, session.query_aware)
        return None

    def load(self, session: Session, ids: Tensor, mask: Tensor | None = None) -> Prefix:
        """Let a session take over the longest context that `ids` begin with; it counts as used now.

        Raises KVBenchError where there is none, with the reason where there is one of another model, policy, option,
        budget or code; and for a damaged one, which stays until it is deleted.
        """
        while True:  # another process may remove what was found
            found = self.find(session, ids, mask)
            if found is None:
                raise self._missing(session, ids, mask)
            try:
                os.utime(found.path)
                session.load(found.path)
            except (KVBenchError, FileNotFoundError):
                if found.path.exists():
                    raise
                continue
            return found

    def prefixes(self) -> list[Prefix]:
        """All contexts, those used last first."""
        found = []
        for path, _, tokens, _ in self._files():
            with suppress(FileNotFoundError):
                state = path.stat()
                found.append((state.st_mtime, Prefix(path, tokens, state.st_size)))
        return [prefix for _, prefix in sorted(found, key=lambda pair: -pair[0])]

    def _files(self) -> Iterator[tuple[Path, str, int, str]]:
        for path in sorted(self.folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match is not None:
                yield path, match[1], int(match[2]), match[3]

    def _at(self, key: str, ids: Tensor, mask: Tensor | None, tokens: int) -> Path | None:
        part = None if mask is None else mask[:, :tokens]
        path = self.folder / f"{key}-{tokens}-{_named(ids[:, :tokens], part)}{SUFFIX}"
        return path if path.exists() else None

    def _missing(self, session: Session, ids: Tensor, mask: Tensor | None) -> KVBenchError:
        """Why there is no context for a session."""
        keys = sorted({(tokens, key) for _, key, tokens, _ in self._files() if tokens < ids.shape[1]}, reverse=True)
        for tokens, key in keys:
            path = self._at(key, ids, mask, tokens)
            if path is not None:
                try:
                    with StateFile(path) as file:
                        check_same(path, file.head.about, _mine(session))
                except KVBenchError as error:
                    return error
        return KVBenchError(
            f"The store {self.folder} holds no context that these {ids.shape[1]} tokens begin with: let the model read "
            "it and save it first."
        )

    def _shrink(self, kept: Path) -> None:
        if self.limit is None:
            return
        prefixes = self.prefixes()
        total = sum(prefix.bytes for prefix in prefixes)
        for prefix in reversed(prefixes):
            if total > self.limit and prefix.path != kept:
                prefix.path.unlink(missing_ok=True)
                total -= prefix.bytes

    def _sweep(self) -> None:
        """Remove what processes that ended while they saved left behind."""
        for path, host, process in temporaries(self.folder):
            with suppress(FileNotFoundError):
                old = time.time() - path.stat().st_mtime > _DAY
                if old or (host == socket.gethostname() and not _lives(process)):
                    shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _mine(session: Session) -> About:
    return about(session, 0, 0)


def _key(mine: About) -> str:
    """What a session's contexts have in common, 16 hexadecimal digits."""
    text = mine.model_copy(update={"tokens": 0, "rows": 0}).model_dump_json()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _named(ids: Tensor, mask: Tensor | None) -> str:
    """The context of token ids [B, n] in 32 hexadecimal digits; ids where `mask` is 0 don't count."""
    held = ids.detach().to("cpu", torch.int64)
    held = held if mask is None else held.masked_fill(mask.to("cpu") == 0, -1)
    return hashlib.sha256(f"{list(held.shape)}".encode() + held.contiguous().numpy().tobytes()).hexdigest()[:32]
