"""`kvbench lm-eval`: the command of EleutherAI's lm-evaluation-harness, with the model `kvbench` registered."""

from __future__ import annotations

import sys

import typer

from kvbench.cli.common import app, interruptible
from kvbench.contract.extras import need


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
@interruptible
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with --model kvbench --model_args pretrained=...,policy=...,budget=...,tokens=..."""
    cli_evaluate = need("lm_eval.__main__", "kvbench lm-eval").cli_evaluate
    import kvbench.integrations.lm_eval  # noqa: F401, PLC0415  registers the model

    before = sys.argv
    sys.argv = ["kvbench lm-eval", *context.args]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
