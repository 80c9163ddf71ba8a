"""What policies, budgets, indexes, tasks and probes have in common: a name, a summary, a reference and options."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Options of an extension: typed, validated, unknown names refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Extension:
    """A class that a plugin registers, and that users choose by `name`.

    Subclasses set `name`, `summary` (one line) and `reference` (the paper, or empty) and may define
    their own `Options`; the command line's `-o option=value` fills it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    Options: ClassVar[type[BaseModel]] = Options
