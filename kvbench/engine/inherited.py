"""Whether a policy's step of fixed shapes was written for the hooks that the policy has, or for those of a base class.

A step repeats in fixed shapes what `insert`, `select` and `attend` do. A subclass that changes one of them, or what
they call, and inherits the step would silently run the base class's. What a method calls is read from its code;
changed constants are not seen.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.step import FixedStep

_DECODING = ("insert", "select", "attend")
_KNOWN: WeakKeyDictionary[type[KVCachePolicy], str | None] = WeakKeyDictionary()


def unfollowed(cls: type[KVCachePolicy]) -> str | None:
    """Why the step that `cls` inherits may not do what its hooks do; None where it has its own, or changes nothing."""
    if cls not in _KNOWN:
        _KNOWN[cls] = _unfollowed(cls)
    return _KNOWN[cls]


def _unfollowed(cls: type[KVCachePolicy]) -> str | None:
    order = [kind for kind in cls.__mro__ if kind is not object]
    if cls.exact:  # exact attention, whatever the hooks say
        writer = next(kind for kind in order if "exact" in vars(kind))
        changed = [name for kind in order[: order.index(writer)] for name in _DECODING if name in vars(kind)]
        return f"policy '{cls.name}' changes {changed[0]} of an exact policy" if changed else None
    hooks = _reached(cls, _DECODING)
    writing = _reached(cls, ["fixed_step"]) - hooks
    writer = next(kind for kind in order if writing & set(vars(kind)))
    if writer is KVCachePolicy or any(_is_empty(_function(inspect.getattr_static(cls, name))) for name in writing):
        return None
    expected = set(getattr(writer, "__abstractmethods__", ()))  # what the step asks of the policy itself
    asked = (_reached(writer, ["fixed_step"]) | set(_asked(writer, writing))) - set(_DECODING)
    declared = {name for kind in KVCachePolicy.__mro__ for name in vars(kind)} - set(_DECODING)
    followed = _reached(writer, _DECODING) - expected - asked - declared
    for kind in order[: order.index(writer)]:
        if changed := sorted(name for name in followed & set(vars(kind)) if _function(vars(kind)[name]) is not None):
            return (
                f"policy '{cls.name}' changes {changed[0]}, which the step of fixed shapes that it inherits from "
                f"{writer.__name__} does not follow (a fixed_step of its own would)"
            )
    return None


def _reached(cls: type, names: Iterable[str]) -> set[str]:
    """`names`, and the attributes of the class that their code uses, directly or not."""
    known = {name for kind in cls.__mro__ if kind is not object for name in vars(kind)}
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for function in _versions(cls, name):
            waiting += known.intersection(_attributes(function.__code__))
    return found


def _versions(cls: type, name: str) -> Iterator[FunctionType]:
    """A method as the class and its bases define it, which may call each other."""
    for kind in cls.__mro__:
        function = _function(vars(kind).get(name))
        if function is not None:
            yield function


def _asked(cls: type, names: Iterable[str]) -> Iterator[str]:
    """The attributes that the step classes use which the functions `names` of a policy make."""
    functions = [function for name in names for function in _versions(cls, name)]
    used = [function.__globals__.get(word) for function in functions for word in function.__code__.co_names]
    for step in used:
        if isinstance(step, type) and issubclass(step, FixedStep):
            for own in (_function(part) for kind in step.__mro__ for part in vars(kind).values()):
                yield from () if own is None else _attributes(own.__code__)


def _is_empty(function: FunctionType | None) -> bool:
    """Whether a method gives None whatever it is given: a base class's where there is no step."""
    return function is not None and not function.__code__.co_names and set(function.__code__.co_consts) <= {
        None, function.__doc__
    }  # fmt: skip


def _function(member: Any) -> FunctionType | None:
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    if isinstance(member, property):
        member = member.fget
    if isinstance(member, cached_property):
        member = member.func
    member = inspect.unwrap(member) if callable(member) else member
    return member if isinstance(member, FunctionType) else None


def _attributes(code: CodeType) -> Iterator[str]:
    """Names of attributes in a function's code and in that of functions within it."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            yield str(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _attributes(constant)
