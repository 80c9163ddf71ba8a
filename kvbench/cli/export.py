"""`kvbench export`: finished runs in the files of others, and on the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.common import Json, app, err, interruptible, load_registry, out
from kvbench.contract.errors import KVBenchError, check_output

FORMATS = ("lm-eval", "dataset", "model-card")


@app.command()
@interruptible
def export(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs, or that hold runs.")],
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("kvbench-export"),
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            help="lm-eval: results_*.json and samples_*.jsonl as lm-evaluation-harness writes them; dataset: tables, "
            "the runs and a card, for the Hub; model-card: results as a model card's metadata.",
        ),
    ] = "lm-eval",
    prompts: Annotated[
        bool, typer.Option("--prompts", help="With lm-eval: each sample's prompt, made again by its task.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Upload to the Hugging Face Hub: files to this data set; a model card's results as a pull request to "
            "this model.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a data set made anew is private.")] = False,
    as_json: Json = False,
) -> None:
    """Write finished runs as others read them: lm-evaluation-harness's files, a data set, a model card."""
    if kind not in FORMATS:
        raise KVBenchError(f"--format {kind} is none of {', '.join(FORMATS)}.")
    if prompts and kind != "lm-eval":
        raise KVBenchError("--prompts belongs to --format lm-eval: leave it out.")
    if private and (push is None or kind == "model-card"):
        raise KVBenchError("--private is for a data set that --push makes: leave it out, or give --push OWNER/NAME.")
    check_output(output)
    load_registry()
    from kvbench.share import hub  # noqa: PLC0415  torch takes seconds to import; --help stays quick
    from kvbench.share.finished import finished_runs  # noqa: PLC0415
    from kvbench.share.harness import write_lm_eval  # noqa: PLC0415

    if push is not None:
        hub.check_push(push)
    runs, left_out = finished_runs(folders)
    for sentence in left_out:
        err.print(f"Warning: {sentence}", style="yellow", highlight=False, soft_wrap=True)
    if kind == "lm-eval":
        files = write_lm_eval(runs, output, prompts=prompts)
    else:
        files = (hub.write_dataset if kind == "dataset" else hub.write_model_card)(runs, output)
    address = None
    if push is not None:
        with err.status(f"Uploading to {push}"):
            if kind == "model-card":
                address = hub.push_model_card(runs, push)
            else:
                address = hub.push_folder(output, files, push, private=private)
    if as_json:
        content = {"schema": 1, "runs": len(runs), "files": [str(file) for file in files], "pushed": address}
        print(json.dumps(content, indent=2))
        return
    for file in files:
        out.print(str(file), style="dim", highlight=False, soft_wrap=True)
    out.print(f"{len(runs)} run{'s' * (len(runs) != 1)} written{f' and pushed to {address}' if address else ''}.",
              highlight=False, soft_wrap=True)  # fmt: skip
