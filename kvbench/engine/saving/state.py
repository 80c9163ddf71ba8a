"""What a policy's cache holds between steps, as a tree and tensors, and a cache made of these."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from kvbench.contract.budget import LayerBudget
from kvbench.contract.errors import KVBenchError
from kvbench.contract.layer import Layer
from kvbench.contract.reading import plain
from kvbench.contract.storage import KVStore
from kvbench.engine.cache import PolicyCache
from kvbench.engine.cached_layer import HybridCacheLayer, PolicyCacheLayer
from kvbench.engine.governor import Governor
from kvbench.engine.lanes import Lane
from kvbench.engine.prompt import Attends
from kvbench.engine.saving.memory import Views
from kvbench.engine.saving.tree import Node, Reader, Surroundings, Unsaveable, Writer
from kvbench.engine.validation import named

REBUILT = {
    "index", "count", "number", "heads", "kv_heads", "head_dim", "scaling", "rows", "store", "budget", "static",
    "prompt_tokens", "module", "softcap", "sink_logits", "state", "rotary", "previous", "ungoverned", "most_attended",
    "apart", "prompt_queries", "prompt_hidden", "exact_attention", "hidden", "hidden_before", "project",
    "begun", "static_attention", "selection",
}  # fmt: skip
"""What of a layer follows from the model and the policy, is saved apart, or lasts no longer than a step."""

HOST = Surroundings(torch.device("cpu"))


def write_state(cache: PolicyCache) -> tuple[Node, Writer]:
    """The tree of a cache whose prompt is complete, and the writer with its tensors; KVBenchError for what has none."""
    governor, writer = cache.session, Writer()
    policy = governor.policy
    try:
        tree = {
            "tokens": max((layer.seen for layer in cache.governed), default=0),
            "prompt_tokens": cache.prompt_tokens,
            "rows": cache.rows,
            "ids": _host(writer, cache.ids, "ids"),
            "mask": _host(writer, cache.mask, "mask") if isinstance(cache.mask, Tensor) else None,
            "lanes": [[_host(writer, lane.rows, "rows"), lane.padding] for lane in cache.lanes],
            "dense": [[number, _attends(writer, called)] for number, called in cache.dense.items()],
            "others": others(writer, cache),
            "governed": [_governed(writer, cached) for cached in cache.governed],
        }
    except Unsaveable as found:
        raise KVBenchError(
            f"{named(policy)} keeps {found.told} in {found.place}, which cannot be saved: keep tensors, arrays, "
            "numbers, texts, random generators, lists and dicts there, derive its class from kvbench.Saveable, or "
            "define save_state and load_state."
        ) from None
    return tree, writer


def _host(writer: Writer, tensor: Tensor | None, place: str) -> Node:
    return None if tensor is None else writer.node(tensor.cpu(), place, HOST)


def _attends(writer: Writer, called: Attends | None) -> Node:
    if called is None:
        return None
    sinks = None if called.sink_logits is None else called.sink_logits.detach().clone()
    return {
        "heads": called.heads, "scaling": called.scaling, "softcap": called.softcap,
        "sink_logits": _host(writer, sinks, "sink_logits"),
    }  # fmt: skip


def others(writer: Writer, cache: PolicyCache) -> list[Node]:
    """The layers that no policy governs: transformers' own, attribute by attribute; and governed layers' states."""
    found = []
    for number, layer in enumerate(cache.layers):
        mine = _own_attributes(layer)
        device = next((part.device for part in mine.values() if isinstance(part, Tensor)), HOST.device)
        around = Surroundings(_device(cache.session, number, device))
        found.append({name: writer.node(part, f"layers.{number}.{name}", around) for name, part in mine.items()})
    return found


def _own_attributes(layer: Any) -> dict[str, Any]:
    """What one of transformers' cache layers holds; of a governed layer only the states of linear attention."""
    if isinstance(layer, HybridCacheLayer):
        kept = vars(LinearAttentionLayer(number_of_states=layer.number_of_states))
        return {name: getattr(layer, name) for name in kept if name in vars(layer)}
    return {} if isinstance(layer, PolicyCacheLayer) else dict(vars(layer))


def _device(governor: Governor, number: int, known: torch.device) -> torch.device:
    surveyed = governor.survey.layers.get(number)
    if surveyed is not None:
        weight = next(surveyed.modules[0].parameters(), None)
        if weight is not None and weight.device.type != "meta":
            return weight.device
    return known


def _governed(writer: Writer, cached: PolicyCacheLayer) -> Node:
    policy = cached.session.policy
    lanes = []
    for place, layer in enumerate(cached.by_lane):
        where = f"layer {layer.number}" + (f", rows {place}" if len(cached.by_lane) > 1 else "")
        known = _named(cached, layer)
        bare = Surroundings(layer.store.device, known)
        around = Surroundings(layer.store.device, {**known, "layer.store": layer.store})
        with cached.session.named_errors("save_state", layer):
            state = policy.save_state(layer)
        lanes.append(
            {
                "shape": [layer.rows, layer.kv_heads, layer.head_dim, layer.prompt_tokens],
                "attends": _attends(
                    writer, Attends(layer.module, layer.heads, layer.scaling, layer.softcap, layer.sink_logits)
                ),
                "budget": {
                    part.name: writer.node(getattr(layer.budget, part.name), f"the budget of {where}", around)
                    for part in fields(LayerBudget)
                },
                "more": {
                    part.name: writer.node(getattr(layer, part.name), f"{part.name} of {where}", bare)
                    for part in fields(Layer)
                    if part.name not in REBUILT
                },
                "store": writer.node(layer.store, f"store of {where}", bare),
                "state": writer.node(state, f"layer.state of {where}", around),
            }
        )  # fmt: skip
    return {"number": cached.number, "seen": cached.seen, "checked": cached.checked, "groups": lanes}


def _named(cached: PolicyCacheLayer, layer: Layer) -> dict[str, Any]:
    policy: Any = cached.session.policy
    holder = getattr(policy, "holder", None)
    found = {
        "layer": layer, "layer.rotary": layer.rotary, "layer.module": layer.module, "layer.expand": cached.expand,
        "policy": policy, "policy.options": policy.options, "policy.holder": holder,
        "policy.holder.options": getattr(holder, "options", None),
    }  # fmt: skip
    return {name: held for name, held in found.items() if held is not None}


def read_state(governor: Governor, tree: Any, views: Views) -> PolicyCache:
    """A cache of the governor's model and policy from what `write_state` gave; ValueError or KeyError for others."""
    reader = Reader(views)
    cache = PolicyCache(governor, int(tree["prompt_tokens"]), tree["rows"])
    if [part["number"] for part in tree["governed"]] != governor.numbers or len(tree["others"]) != len(cache.layers):
        raise ValueError("its layers are not the model's")
    device = governor.model.device
    ids, mask = reader.value(tree["ids"], HOST), reader.value(tree["mask"], HOST)
    cache.note(None if ids is None else ids.to(device))
    cache.mask = None if mask is None else mask.to(device)
    cache.lanes = [Lane(reader.value(rows, HOST), int(padding)) for rows, padding in tree["lanes"]]
    for number, called in tree["dense"]:
        if called is not None and number in cache.dense:
            cache.dense[number] = _read_attends(governor, reader, number, called)
    set_others(cache, reader, tree["others"])
    for cached, part in zip(cache.governed, tree["governed"], strict=True):
        if len(part["groups"]) != len(cache.lanes):
            raise ValueError("its lanes do not fit together")
        for lane in part["groups"]:
            cached.by_lane.append(_read_layer(cached, reader, lane))
        cached.seen = cached.attended = cached.before_step = int(part["seen"])
        cached.checked, cached.in_prompt = bool(part["checked"]), False
    cache.complete = True
    return cache


def set_others(cache: PolicyCache, reader: Reader, nodes: Any) -> None:
    """Give the layers that no policy governs what `others` wrote; ValueError for another model's."""
    governor = cache.session
    for number, (layer, parts) in enumerate(zip(cache.layers, nodes, strict=True)):
        around = Surroundings(_device(governor, number, governor.model.device))
        for name, part in parts.items():
            if not name.isidentifier() or name.startswith("__"):
                raise ValueError(f"{name!r} is no attribute")
            setattr(layer, name, reader.value(part, around))


def _read_attends(governor: Governor, reader: Reader, number: int, called: Any) -> Attends:
    module = governor.survey.layers[number].modules[0]
    sinks = reader.value(called["sink_logits"], HOST)
    softcap = called["softcap"]
    if sinks is not None:
        sinks = sinks.to(_device(governor, number, HOST.device))
    scaling = float(called["scaling"])
    return Attends(module, int(called["heads"]), scaling, None if softcap is None else float(softcap), sinks)


def _read_layer(cached: PolicyCacheLayer, reader: Reader, lane: Any) -> Layer:
    governor, policy = cached.session, cached.session.policy
    attends = _read_attends(governor, reader, cached.number, lane["attends"])
    rows, kv_heads, head_dim, tokens = map(int, lane["shape"])
    around = Surroundings(_device(governor, cached.number, governor.model.device))
    budget = LayerBudget(**{name: reader.value(part, around) for name, part in lane["budget"].items()})
    layer = cached.new_layer(attends, budget, rows, kv_heads, head_dim, tokens)
    known = Surroundings(around.device, _named(cached, layer))
    store = reader.value(lane["store"], known)
    if not isinstance(store, KVStore):
        raise ValueError("a store is missing")
    layer.store = store
    for name, part in lane["more"].items():
        if name in REBUILT or name not in vars(layer):
            raise ValueError(f"{plain(name)} is nothing that a layer keeps")
        setattr(layer, name, reader.value(part, known))
    state = reader.value(lane["state"], Surroundings(known.device, {**known.named, "layer.store": store}))
    with governor.named_errors("load_state", layer):
        policy.load_state(layer, state)
    return layer
