"""Saves how far an exact pass over a context has come, piece by piece, and takes it up again in another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbench.contract.reading import reading
from kvbench.engine.cache import PolicyCache
from kvbench.engine.cached_layer import PolicyCacheLayer
from kvbench.engine.saving.files import StateFile, damaged, write
from kvbench.engine.saving.identify import about, check_same
from kvbench.engine.saving.memory import Views, pack
from kvbench.engine.saving.state import HOST, others, set_others
from kvbench.engine.saving.tree import Reader, Writer
from kvbench.engine.session import Session


class Piece(NamedTuple):
    """What a file holds of the tokens from `start` to `stop`: keys, values and the layers' queries, and `more`.

    Tensors [1, G or H, stop - start, d] by layer; `others` are the caches of layers that no policy governs, as nodes.
    """

    start: int
    stop: int
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    queries: dict[int, Tensor]
    more: Mapping[str, Any]
    others: Sequence[Any]
    reader: Reader


def write_piece(session: Session, path: Path, start: int, queries: Mapping[int, Tensor], more: Any) -> int:
    """Write what the cache of an exact session holds of the tokens from `start` on; returns the tokens so far.

    `queries` [1, H, m, d] are those of the layers that need them, `more` plain data. Raises KVBenchError where the file
    cannot be written.
    """
    cache = session.cache
    assert cache is not None
    stop, writer = cache.governed[0].seen, Writer()
    with torch.inference_mode():
        layers = []
        for cached in cache.governed:
            keys, values = _held(cached)
            parts = {"keys": keys[:, :, start:], "values": values[:, :, start:]}
            if cached.number in queries:
                parts["queries"] = queries[cached.number]
            nodes = {
                name: writer.node(part.to("cpu", copy=True), f"layers.{cached.number}.{name}", HOST)
                for name, part in parts.items()
            }
            layers.append([cached.number, nodes])
        tree = {"start": start, "stop": stop, "more": more, "layers": layers, "others": others(writer, cache)}
        tensors, views = pack(writer.views)
        write(path, about(session, stop, 1), tree, views, tensors)
    return stop


def _held(cached: PolicyCacheLayer) -> tuple[Tensor, Tensor]:
    if cached.by_lane:
        return cached.by_lane[0].store.raw()
    assert cached.prompt is not None
    return cached.prompt.keys, cached.prompt.values


def read_piece(session: Session, path: Path) -> Piece:
    """Read a piece that a session of the same model and code wrote; KVBenchError for another's, or a damaged one."""
    with StateFile(path) as file:
        head = file.head
        check_same(path, head.about, about(session, head.about.tokens, head.about.rows))
        tensors = file.tensors()
    with reading(lambda reason: str(damaged(path, reason))):
        tree, reader = head.tree, Reader(Views(tensors, head.views))
        found: dict[str, dict[int, Tensor]] = {"keys": {}, "values": {}, "queries": {}}
        for number, nodes in tree["layers"]:
            for name, node in nodes.items():
                found[name][int(number)] = reader.value(node, HOST)
        if sorted(found["keys"]) != sorted(session.numbers) or found["keys"].keys() != found["values"].keys():
            raise ValueError("its layers are not the model's")
        return Piece(int(tree["start"]), int(tree["stop"]), **found, more=tree["more"], others=tree["others"],
                     reader=reader)  # fmt: skip


def take_prompt(session: Session, pieces: Sequence[Piece], ids: Tensor) -> None:
    """Take over the beginning of the prompt `ids` [1, n] from pieces that follow each other from its first token on."""
    cache = session.cache = PolicyCache(session, session.prompt_tokens, 1)
    for piece in pieces:
        part = ids[:, piece.start : piece.stop]
        cache.note(part)
        cache.expect(part, None)
        _take(session, cache, piece)
        for cached in cache.governed:
            if cached.number in piece.queries:
                cached.prompt_queries.append(_placed(session, piece.queries[cached.number]))
    set_others(cache, pieces[-1].reader, pieces[-1].others)


def take_steps(session: Session, pieces: Sequence[Piece], ids: Tensor) -> None:
    """Take over steps [1, m] that follow the tokens in the cache, whose prompt is complete."""
    cache = session.cache
    assert cache is not None
    cache.note(ids)
    for piece in pieces:
        _take(session, cache, piece)
    set_others(cache, pieces[-1].reader, pieces[-1].others)


def _take(session: Session, cache: PolicyCache, piece: Piece) -> None:
    for cached in cache.governed:
        keys, values = (_placed(session, part[cached.number]) for part in (piece.keys, piece.values))
        cached.take(keys, values)
        cached.attended, cached.pending = cached.attended + keys.shape[2], False


def _placed(session: Session, tensor: Tensor) -> Tensor:
    return tensor.to(session.model.device)
