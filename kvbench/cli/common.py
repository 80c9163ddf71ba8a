"""What the commands share: the application, its consoles, its options, parsing and number formats."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console

from kvbench.contract.errors import KVBenchError

if TYPE_CHECKING:
    from pydantic import ByteSize

    from kvbench.catalogue import Catalogue
    from kvbench.plugins import Registry

app = typer.Typer(
    help="Benchmark KV-cache policies of long-context language models.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
# Names of policies, models and folders are shown as they are: brackets are no markup, colons no emoji.
out = Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)

P = ParamSpec("P")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Name = Annotated[str | None, typer.Argument(help="Describe this one.")]
Model = Annotated[str, typer.Option(help="Known name, Hugging Face id or local folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: cuda where there is one]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16. [default: float32 on the CPU]")]
RopeScaling = Annotated[
    str | None,
    typer.Option(
        help="yarn: extend the model where its limit is shorter than the context; yarn:4: by this factor always."
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="auto: spread the model by layer over all GPUs, and over memory and disk where these are full."),
]


def interruptible(command: Callable[P, None]) -> Callable[P, None]:
    """Make Ctrl-C end a command with one sentence and exit code 130."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            err.print("Interrupted. What is finished is kept; the same command continues after it.", style="red")
            raise typer.Exit(130) from None

    return wrapper


def load_registry() -> Registry:
    """All plugins; those that failed are named on stderr."""
    from kvbench.catalogue import remember  # noqa: PLC0415
    from kvbench.plugins import registry  # noqa: PLC0415  torch takes seconds to import; --help stays quick

    found = registry()
    remember(found)
    warn_of(found.failures)
    return found


def load_catalogue() -> Catalogue:
    """What all plugins registered, without importing them where nothing changed; those that failed on stderr."""
    from kvbench.catalogue import catalogue  # noqa: PLC0415

    found = catalogue()
    warn_of(found.failures)
    return found


def warn_of(failures: list[str]) -> None:
    """Name the plugins that failed on stderr."""
    for failure in failures:
        err.print(f"Warning: {failure}; its extensions are missing.", style="yellow", highlight=False, soft_wrap=True)


def pairs(values: list[str] | None) -> dict[str, str]:
    """Options given as name=value."""
    found = {}
    for value in values or []:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise KVBenchError(f"Option '{value}' is not of the form name=value.")
        found[key.replace("-", "_")] = text
    return found


def grouped(values: dict[str, str], into: str) -> dict[str, Any]:
    """Options of the form part.name=value put together by part under the option `into`, the others left as they are."""
    found: dict[str, Any] = {key: text for key, text in values.items() if "." not in key}
    parts: dict[str, dict[str, str]] = {}
    for key, text in values.items():
        part, dot, name = key.partition(".")
        if dot:
            parts.setdefault(part, {})[name] = text
    return {**found, into: parts} if parts else found


def listed(values: str | Sequence[str] | None) -> list[str]:
    """Names separated by commas, of an option given once or again and again; each once, in order."""
    given = [values] if isinstance(values, str) else values or ()
    return list(dict.fromkeys(name.strip() for value in given for name in value.split(",") if name.strip()))


def allocation(text: str) -> tuple[str, dict[str, Any]]:
    """An allocator and a size: `pyramid`, `pyramid:512` (tokens), `pyramid:10%`, `pyramid:64MiB`, or a size alone."""
    name, colon, size = (part.strip() for part in text.partition(":"))
    if not colon and name[:1].isdigit():
        name, size = "uniform", name
    elif not colon:
        return name, {}
    if re.fullmatch(r"[0-9]+", size) and int(size) > 0:
        return name, {"tokens": int(size)}
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?%", size) and 0 < float(size[:-1]) <= 100:
        return name, {"ratio": float(size[:-1]) / 100}
    if re.fullmatch(r"[0-9]+(\.[0-9]+)? ?[A-Za-z]+", size):
        return name, {"bytes": byte_size("--budget", size)}
    raise KVBenchError(
        f"--budget {text} has a size that is none: give tokens (512), a share of the context (10%) or bytes (64MiB), "
        "as in pyramid:512, or an allocator alone."
    )


def whole_or_auto(name: str, text: str | None) -> Any:
    """A positive whole number, `auto`, or None for an option that was not given; `name` is the option's."""
    if text is None or text.strip() == "auto":
        return text and "auto"
    if re.fullmatch(r"[0-9]+", text.strip()) and 0 < int(text) < 2**31:
        return int(text)
    raise KVBenchError(f"{name} {text} is neither a positive whole number nor auto.")


def numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    """Whole numbers separated by commas, or None for all; `name` is the option's, for the error."""
    if text is None or text.strip() == "all":
        return None
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise KVBenchError(f"{name} {text} is not a list of whole numbers separated by commas.") from None


def byte_size(name: str, text: str | None) -> ByteSize | None:
    """A number of bytes with or without a unit (64MiB, 1.5GB); `name` is the option's, for the error."""
    if text is None:
        return None
    from pydantic import ByteSize, TypeAdapter, ValidationError  # noqa: PLC0415  --help stays quick

    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        size = ByteSize(0)
    if size < 1:
        raise KVBenchError(f"{name} {text} is not a number of bytes: give one such as 4000000 or 64MiB.")
    return size


def mib(value: float | None) -> str:
    """Bytes in MiB."""
    return "–" if value is None else f"{value / 2**20:.1f}"


def share(value: float | None) -> str:
    """A fraction in percent."""
    return "–" if value is None else f"{100 * value:.1f}%"


def seconds(value: float | None, unit: float = 1) -> str:
    """Seconds, or with `unit` 1000 milliseconds."""
    return "–" if value is None else f"{value * unit:.2f}" if unit == 1 else f"{value * unit:.1f}"
