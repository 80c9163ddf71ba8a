"""`kvbench check`: what kvbench and its policies promise, proven on a model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from kvbench.api.run import policy_options
from kvbench.cli.common import Device, Dtype, Json, Model, app, err, interruptible, listed, load_registry, out, pairs
from kvbench.contract.errors import KVBenchError

if TYPE_CHECKING:
    from kvbench.engine.conformance.report import Report

COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


@app.command()
@interruptible
def check(
    model: Model = "smollm2-135m",
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Policy to check too, or `all`; several by commas, or the option again. [default: none]"),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Option of the policy, name=value.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Prove that a model runs as in transformers, and that policies keep what they promise on it."""
    found = load_registry()
    names = listed(policy)
    if policy and not names:
        raise KVBenchError(
            f"--policy '{policy[0]}' names no policy: `kvbench policies` lists them; without it the model alone is "
            "checked."
        )
    every = names == ["all"]
    if every:
        names = list(found.classes["policy"])
    options = pairs(option)
    if options and not names:
        raise KVBenchError("--option belongs to a policy: give --policy too.")
    made = []
    for name in names:
        own = policy_options(found, name, names, options)
        try:
            made.append(found.make("policy", name, own))
        except KVBenchError as error:  # one that needs a file which was not given
            if not every:
                raise
            err.print(f"Left out: {error}", highlight=False, markup=False, soft_wrap=True)

    from kvbench.models import load_model  # noqa: PLC0415  torch takes seconds to import
    from kvbench.runs.proofs import checker  # noqa: PLC0415

    loaded = load_model(model, device=device, dtype=dtype)
    conformance = checker(loaded, anew=True)
    reports = [conformance.check_model()]
    if reports[0].failure is None:
        reports += [conformance.check_policy(each) for each in made]
    if as_json:
        documents = [report.document() for report in reports]
        settings = {"model": loaded.name, "device": str(loaded.device), "dtype": str(loaded.dtype)[6:]}
        print(json.dumps({"schema": 1, **settings, "reports": documents}, indent=2))
    else:
        out.print(_table(reports, f"{loaded.name}, {str(loaded.dtype)[6:]} on {loaded.device}"))
    failures = [report.failure for report in reports if report.failure is not None]
    if failures:
        more = f" ({len(failures)} of {len(reports)} failed.)" if len(failures) > 1 else ""
        raise KVBenchError(failures[0] + more)


def _table(reports: list[Report], title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in ("of", "check", "result", "found"):
        table.add_column(column, no_wrap=column == "of")
    for report in reports:
        name = "the model" if report.policy is None else report.policy
        for number, each in enumerate(report.checks):
            first = f"{name} ({report.seconds:.1f} s)" if number == 0 else ""
            result = Text(each.status, style=COLOURS[each.status])
            table.add_row(
                first, Text(each.name), result, Text(each.detail), end_section=number == len(report.checks) - 1
            )
    return table
