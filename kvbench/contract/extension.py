"""What policies, budgets, indexes, tasks and probes have in common: a name, a summary, a reference and options."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST = 2**31 - 1
"""Of an option's whole numbers: what compiled code takes."""


JOIN = "+"
"""Between the names of two policies that are composed."""
BETWEEN_LAYERS = "~"
"""Between the names of policies that have layers of their own (`snapkv@0-3~quest`)."""


class Options(BaseModel):
    """Options of an extension: typed, validated, unknown names refused; numbers are finite and have 32 bits."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _no_huge_number(cls, value: Any, info: ValidationInfo) -> Any:
        if type(value) is int and abs(value) > LARGEST:
            raise ValueError(f"{info.field_name} is beyond {LARGEST}")
        return value


class Extension:
    """A class that a plugin registers, and that users choose by `name`.

    Subclasses set `name`, `summary` (one line) and `reference` (the paper, or empty) and may define
    their own `Options`; the command line's `-o option=value` fills it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    Options: ClassVar[type[BaseModel]] = Options


def option_names(cls: type[Extension]) -> list[str]:
    """The options of a class by the names that users give; of a composition part.option, and option alone."""
    parts = getattr(cls, "parts", ())
    if not parts:
        return list(cls.Options.model_fields)
    own = [(part.name, field) for part in parts for field in part.Options.model_fields]
    return [f"{part}.{field}" for part, field in own] + [field for _, field in own]
