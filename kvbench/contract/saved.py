"""What a policy may keep between steps so that a session's state can be saved and loaded."""

from __future__ import annotations

from typing import Any, Self


class Saveable:
    """An object of a policy's own that is saved and loaded with `layer.state`, such as a storage or an index.

    By default its attributes are saved and set again; it is made without `__init__`. Attributes may be whatever
    `layer.state` may hold: tensors, NumPy arrays, numbers, texts, None, dtypes, devices, random generators, further
    `Saveable` objects, and lists, tuples and dicts of these. The layer, its store, rotary embedding and module, the
    policy and its options, and bound methods of these are not copied but named, and are the new session's after
    loading; so are classes that derive from this one, and a `functools.partial` of such a class (a storage's factory).
    The class must be known where its policy is: a file names classes and imports none.
    """

    def saved(self) -> dict[str, Any]:
        """What shall be saved, by name; the attributes."""
        return dict(vars(self))

    @classmethod
    def restored(cls, parts: dict[str, Any]) -> Self:
        """Make the object from what `saved` gave; ValueError or KeyError where it does not fit together."""
        made = cls.__new__(cls)
        vars(made).update(parts)
        return made
