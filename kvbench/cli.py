"""The `kvbench` command."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.table import Table

from kvbench.errors import KVBenchError

if TYPE_CHECKING:
    from kvbench.capture import Capture
    from kvbench.plugins import Registry

app = typer.Typer(
    help="Benchmark KV-cache policies of long-context language models.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
out = Console(width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True)

P = ParamSpec("P")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Name = Annotated[str | None, typer.Argument(help="Describe this one.")]


def main() -> None:
    """Run the command; errors that a user can mend are one sentence on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except KVBenchError as error:
        _fail(str(error))
    except MemoryError:
        _fail("Out of memory: use a shorter --context-length, a smaller --model, or --prefill-chunk 1024.")
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            _fail(
                f"Out of memory ({error}): use a shorter --context-length, a smaller --model, or --prefill-chunk 1024."
            )
        raise


def _interruptible(command: Callable[P, None]) -> Callable[P, None]:
    """Make Ctrl-C end a command with one sentence and exit code 130."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            err.print("Interrupted. What is finished is kept; the same command continues after it.", style="red")
            raise typer.Exit(130) from None

    return wrapper


def _fail(message: str) -> None:
    err.print(f"Error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(2)


# -- run -------------------------------------------------------------------------------------------------------------


@app.command()
@_interruptible
def run(
    policy: Annotated[str, typer.Option(help="Policy, or several separated by commas; `kvbench policies` lists them.")],
    budget: Annotated[str, typer.Option(help="Allocator that shares the budget over the layers.")] = "uniform",
    tokens: Annotated[int | None, typer.Option(help="Tokens attended at a step, static set included.")] = None,
    ratio: Annotated[float | None, typer.Option(help="The same as a share of the context. [default: 0.1]")] = None,
    model: Annotated[str, typer.Option(help="Known name, Hugging Face id or local folder.")] = "smollm2-135m",
    task: Annotated[str, typer.Option(help="Task; `kvbench tasks` lists them.")] = "niah_single_1",
    context_length: Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer together.")] = 2048,
    examples: Annotated[int, typer.Option(min=1, help="Number of examples.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the examples.")] = 42,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Option of the policy, name=value.")
    ] = None,
    budget_option: Annotated[list[str] | None, typer.Option(help="Option of the budget, name=value.")] = None,
    task_option: Annotated[list[str] | None, typer.Option(help="Option of the task, name=value.")] = None,
    question: Annotated[
        str,
        typer.Option(help="aware: the question is part of the prompt; agnostic: it goes through the policy after it."),
    ] = "aware",
    prefill_chunk: Annotated[
        int | None, typer.Option(min=1, help="Compute the prompt this many tokens at a time.")
    ] = None,
    recall_k: Annotated[int, typer.Option(min=1, help="k of recall@k.")] = 100,
    probe_examples: Annotated[
        int, typer.Option(min=0, help="Examples that are run once more with probes, for recall, mass and density.")
    ] = 1,
    probe: Annotated[
        list[str] | None,
        typer.Option(help="Probe beyond the standard ones, again for more; `kvbench probes` lists them."),
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Run `full` on the same examples.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: cuda where there is one]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. [default: float32 on the CPU]")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the run folders.")] = Path("kvbench-runs"),
    as_json: Json = False,
) -> None:
    """Run policies on a task, beside exact attention, and print accuracy, recall, bytes and latency."""
    if tokens is not None and ratio is not None:
        raise KVBenchError("Both --tokens and --ratio were given; a budget has one size: give one of them.")
    if tokens is not None and tokens < 1:
        raise KVBenchError(f"--tokens {tokens} is not a positive number of tokens.")
    if ratio is not None and not 0 < ratio <= 1:
        raise KVBenchError(f"--ratio {ratio} is not between 0 and 1.")
    if question not in ("aware", "agnostic"):
        raise KVBenchError(f"--question {question} is neither 'aware' nor 'agnostic'.")
    found = _registry()
    names = list(dict.fromkeys(name.strip() for name in policy.split(",") if name.strip()))
    found.find("task", task)
    found.find("budget", budget)
    for extra in probe or ():
        found.find("probe", extra)
    options = {name: _policy_options(found, name, names, _pairs(option)) for name in names}
    if baseline and "full" not in names:
        names.append("full")
        options["full"] = {}

    from kvbench.budget import Budget  # noqa: PLC0415  torch takes seconds to import, so names are checked before
    from kvbench.models import load_model  # noqa: PLC0415
    from kvbench.runner import Request, execute, plan  # noqa: PLC0415

    size = {"tokens": tokens} if tokens is not None else {"ratio": 0.1 if ratio is None else ratio}
    shared = Budget(**size, allocator=budget, options=_pairs(budget_option))
    requests = [
        Request(
            policy=name, policy_options=options[name], budget=shared, task=task, task_options=_pairs(task_option),
            context_length=context_length, examples=examples, seed=seed, question=question,  # type: ignore[arg-type]
            prefill_chunk=prefill_chunk, recall_k=recall_k, probe_examples=probe_examples, probes=tuple(probe or ()),
        )
        for name in names
    ]  # fmt: skip
    loaded = load_model(model, device=device, dtype=dtype, context_length=context_length)
    configs = [plan(request, loaded) for request in requests]
    with _Progress(names, examples) as progress:
        runs = [execute(config, loaded, output, progress) for config in configs]
    documents = [done.document() for done in runs]
    if as_json:
        print(json.dumps({"schema": 1, "runs": documents}, indent=2))
        return
    out.print(_results_table(documents, context_length))
    out.print(_provenance(documents[0]), style="dim", highlight=False)
    for document in documents:
        out.print(f"{document['policy']}: {document['folder']}", style="dim", highlight=False, soft_wrap=True)


def _policy_options(found: Registry, name: str, names: list[str], pairs: dict[str, str]) -> dict[str, str]:
    """The options given with -o that are this policy's; with several policies each takes those it knows."""
    known = set(found.find("policy", name).Options.model_fields)
    mine = pairs if len(names) == 1 else {key: value for key, value in pairs.items() if key in known}
    everyone = {field for other in names for field in found.find("policy", other).Options.model_fields}
    for key, value in pairs.items():
        if len(names) > 1 and key not in everyone:
            raise KVBenchError(f"Option {key}={value} is an option of none of {', '.join(names)}.")
    found.options("policy", name, mine)
    return mine


def _pairs(values: list[str] | None) -> dict[str, str]:
    pairs = {}
    for value in values or []:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise KVBenchError(f"Option '{value}' is not of the form name=value.")
        pairs[key.replace("-", "_")] = text
    return pairs


class _Progress:
    """A live bar per policy on stderr."""

    def __init__(self, names: list[str], examples: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=err,
        )  # fmt: skip
        self._tasks = {name: self._bars.add_task(name, total=examples, note="", start=False) for name in names}

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, policy: str, done: int, of: int, note: str) -> None:
        task = self._tasks[policy]
        self._bars.start_task(task)
        self._bars.update(task, completed=done, total=of, note=note)


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _seconds(value: float | None, unit: float = 1) -> str:
    return "–" if value is None else f"{value * unit:.2f}" if unit == 1 else f"{value * unit:.1f}"


_ROWS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("accuracy", lambda m: _share(m["accuracy"]["mean"])),
    ("  95% interval", lambda m: " to ".join(_share(end) for end in m["accuracy"]["ci95"])),
    ("recall@k", lambda m: _share(m["recall_at_k"])),
    ("recovered attention mass", lambda m: _share(m["recovered_mass"])),
    ("  without the sinks", lambda m: _share(m.get("recovered_mass_without_sinks"))),
    ("output error", lambda m: _share(m.get("output_error"))),
    ("keys scanned", lambda m: _share(m.get("scanned_fraction"))),
    ("density", lambda m: _share(m["density"])),
    ("  tokens attended", lambda m: "–" if m.get("attended_tokens") is None else f"{m['attended_tokens']:.0f}"),
    ("resident, MiB", lambda m: _mib(m["bytes"]["resident"])),
    ("offloaded, MiB", lambda m: _mib(m["bytes"]["offloaded"])),
    ("index, MiB", lambda m: _mib(m["bytes"]["index"])),
    ("TTFT, s", lambda m: _seconds(m["ttft_s"]["total"])),
    ("  prefill", lambda m: _seconds(m["ttft_s"]["prefill"])),
    ("  index construction", lambda m: _seconds(m["ttft_s"]["index"])),
    ("TPOT p50, ms", lambda m: _seconds(m["tpot_s"]["p50"], 1000)),
    ("TPOT p95, ms", lambda m: _seconds(m["tpot_s"]["p95"], 1000)),
    ("peak memory, MiB", lambda m: _mib(m["peak_memory_bytes"])),
]


def _results_table(documents: list[dict[str, Any]], context_length: int) -> Table:
    config = documents[0]["config"]
    title = f"{config['model']}, {config['task']}, {context_length} tokens, {_budget(documents)}"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for document in documents:
        table.add_column(document["policy"], justify="right")
    for label, cell in _ROWS:
        table.add_row(label, *(cell(document["metrics"]) for document in documents))
    return table


def _budget(documents: list[dict[str, Any]]) -> str:
    budgets = [document["budget"] for document in documents if document["budget"]]
    if not budgets:
        return "no budget"
    size = f"{budgets[0]['tokens']} tokens" if budgets[0]["tokens"] is not None else f"ratio {budgets[0]['ratio']}"
    return f"budget {size}, {budgets[0]['allocator']}"


def _provenance(document: dict[str, Any]) -> str:
    config, environment, metrics = document["config"], document["environment"], document["metrics"]
    return (
        f"{metrics['accuracy']['n']} examples, seed {config['seed']}, question {config['question']}, "
        f"k = {config['recall_k']}, {metrics['probed_examples']} probed; {config['dtype']} on "
        f"{environment['device_name']}, {environment['threads']} threads; "
        "times, bytes and answers are of undisturbed generations"
    )


# -- capture and index -----------------------------------------------------------------------------------------------

Model = Annotated[str, typer.Option(help="Known name, Hugging Face id or local folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: cuda where there is one]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16. [default: float32 on the CPU]")]
SourceTextName = Annotated[str, typer.Option(help="Text file, or `default`: Python's documentation and library.")]
RopeScaling = Annotated[str | None, typer.Option(help="yarn: extend the model where its limit is shorter.")]
PrefillChunk = Annotated[int, typer.Option(min=1, help="Compute the prompt this many tokens at a time.")]
DecodeTokens = Annotated[int, typer.Option(min=1, help="Tokens of the context that are decoded one by one.")]
Decoding = Annotated[str, typer.Option(help="text: the text goes on token by token; greedy: the model's own tokens.")]
StoreDtype = Annotated[str | None, typer.Option(help="Number type of the stored vectors. [default: the model's]")]


def _captured(
    model: str, text: str, context_length: int, layers: str, output: Path | Callable[[str], Path], *,
    decode_tokens: int, decoding: str, rope_scaling: str | None, prefill_chunk: int, store_dtype: str | None,
    seed: int, device: str | None, dtype: str | None,
) -> Capture:  # fmt: skip
    if rope_scaling not in (None, "yarn"):
        raise KVBenchError(f"--rope-scaling {rope_scaling} is not known: give yarn, or leave it out.")
    if decoding not in ("greedy", "text"):
        raise KVBenchError(f"--decoding {decoding} is neither 'greedy' nor 'text'.")
    from kvbench.capture import capture, plan_capture, read_text  # noqa: PLC0415
    from kvbench.models import load_model  # noqa: PLC0415

    source = read_text(text)
    loaded = load_model(
        model, device=device, dtype=dtype, context_length=context_length,
        rope_scaling=rope_scaling,  # type: ignore[arg-type]
    )  # fmt: skip
    config = plan_capture(
        loaded, source, context_length=context_length, decode_tokens=decode_tokens, layers=layers,
        decoding=decoding, dtype=store_dtype, seed=seed, rope_scaling=rope_scaling,  # type: ignore[arg-type]
    )  # fmt: skip
    folder = output if isinstance(output, Path) else output(config.hash)
    with err.status(f"Capturing {len(config.layers)} layers over {context_length} tokens"):
        return capture(config, loaded, source, folder, prefill_chunk=prefill_chunk)


@app.command("capture")
def capture_command(
    output: Annotated[Path, typer.Option(help="Folder of the capture; the same capture found there is reused.")],
    model: Model = "smollm2-135m",
    text: SourceTextName = "default",
    context_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and decoding together.")] = 4096,
    decode_tokens: DecodeTokens = 128,
    layers: Annotated[str, typer.Option(help="Layers separated by commas, or `all`.")] = "all",
    decoding: Decoding = "text",
    rope_scaling: RopeScaling = None,
    prefill_chunk: PrefillChunk = 1024,
    store_dtype: StoreDtype = None,
    seed: Annotated[int, typer.Option(help="Where in the text the prompt starts; 0 is its beginning.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Store a model's queries, keys and values over a text, prompt and decoding apart."""
    done = _captured(
        model, text, context_length, layers, output, decode_tokens=decode_tokens, decoding=decoding,
        rope_scaling=rope_scaling, prefill_chunk=prefill_chunk, store_dtype=store_dtype, seed=seed, device=device,
        dtype=dtype,
    )  # fmt: skip
    manifest = done.manifest
    if as_json:
        print(json.dumps({
            "schema": 1, "folder": str(done.path), "reused": done.reused,
            "manifest": manifest.model_dump(mode="json", by_alias=True),
        }, indent=2))  # fmt: skip
        return
    config = manifest.config
    size = sum(file.bytes for file in manifest.files)
    out.print(
        f"{config.model}: {len(config.layers)} layers, {manifest.heads} query and {manifest.kv_heads} key/value heads "
        f"of dimension {manifest.head_dim}, {manifest.prompt_tokens} prompt and {config.decode_tokens} decoded tokens "
        f"({config.decoding}, {len(set(manifest.decoded_ids))} different), {config.dtype}, {_mib(size)} MiB"
        f"{'; it was there already' if done.reused else ''}.", highlight=False,
    )  # fmt: skip
    out.print(str(done.path), style="dim", highlight=False, soft_wrap=True)


@app.command()
def index(
    names: Annotated[str, typer.Option("--indexes", help="Indexes separated by commas; `kvbench indexes` lists them.")],
    capture: Annotated[Path | None, typer.Option(help="Folder of a capture; without it one is made first.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="k of recall@k.")] = 100,
    layers: Annotated[str | None, typer.Option(help="Layers separated by commas. [default: all captured]")] = None,
    heads: Annotated[str | None, typer.Option(help="Query heads separated by commas. [default: all]")] = None,
    efforts: Annotated[
        list[str] | None,
        typer.Option(help="Values of the search parameter: 32,64,128 for all indexes, or index=1,2,4 for one."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Option of an index, index.option=value.")
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens left out of the index.")] = 4,
    window: Annotated[int, typer.Option(min=0, help="Last tokens of the prompt left out of the index.")] = 64,
    model: Model = "smollm2-135m",
    text: SourceTextName = "default",
    context_length: Annotated[int, typer.Option(min=2, help="Tokens to capture, prompt and decoding together.")] = 4096,
    decode_tokens: DecodeTokens = 128,
    decoding: Decoding = "text",
    rope_scaling: RopeScaling = None,
    prefill_chunk: PrefillChunk = 1024,
    store_dtype: StoreDtype = None,
    seed: Annotated[int, typer.Option(help="Where in the text the prompt starts; 0 is its beginning.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    output: Annotated[Path, typer.Option(help="Folder for results and captures.")] = Path("kvbench-index"),
    as_json: Json = False,
) -> None:
    """Compare vector indexes on real queries and keys: recall, scanned keys, time, build and insertion time, bytes."""
    found = _registry()
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in chosen:
        found.find("index", name)
    from kvbench.analysis import index_sweep  # noqa: PLC0415
    from kvbench.capture import load_capture  # noqa: PLC0415

    config = index_sweep.SweepConfig(
        chosen, k=k, layers=_numbers("--layers", layers), heads=_numbers("--heads", heads),
        efforts=_index_efforts(efforts, chosen), options=_index_options(option, chosen), sinks=sinks, window=window,
    )  # fmt: skip
    if capture is not None:
        source = load_capture(capture)
    else:
        source = _captured(
            model, text, context_length, layers or "all", lambda name: output / f"capture-{name}",
            decode_tokens=decode_tokens, decoding=decoding, rope_scaling=rope_scaling, prefill_chunk=prefill_chunk,
            store_dtype=store_dtype, seed=seed, device=device, dtype=dtype,
        )  # fmt: skip
    with err.status("") as status:
        rows = index_sweep.sweep(source, config, status.update)
    content = index_sweep.document(source, config, rows)
    folder = output / index_sweep.folder_name(source, config)
    index_sweep.write(content, folder)
    if as_json:
        print(json.dumps({**content, "folder": str(folder)}, indent=1))
        return
    out.print(_index_table(content))
    out.print(
        f"{rows[0]['n_keys']} keys, {rows[0]['n_queries']} decoding queries that no index saw, of "
        f"{_count(rows, 'layer')} × {_count(rows, 'head')}; searches on one "
        f"thread, one step of all heads at a time; build and insertion of {source.manifest.config.decode_tokens} keys "
        f"on {content['environment']['build_threads']} threads and bytes are per layer, for all heads at once. "
        "95% intervals over layers and heads.", style="dim", highlight=False,
    )  # fmt: skip
    for entry in content["summary"]:
        out.print(_reached(entry), highlight=False)
    out.print(str(folder), style="dim", highlight=False, soft_wrap=True)


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None or text.strip() == "all":
        return None
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise KVBenchError(f"{name} {text} is not a list of whole numbers separated by commas.") from None


def _index_efforts(values: list[str] | None, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    efforts = {}
    for value in values or []:
        name, equals, text = value.rpartition("=")
        numbers = _numbers("--efforts", text)
        if numbers is None:
            raise KVBenchError(f"--efforts {value} is not a list of whole numbers separated by commas.")
        efforts.update(dict.fromkeys((name,) if equals else names, numbers))
    return efforts


def _index_options(values: list[str] | None, names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    options: dict[str, dict[str, str]] = {}
    for key, text in _pairs(values).items():
        name, dot, field = key.partition(".")
        if not dot:
            raise KVBenchError(f"Option {key}={text} names no index: write {', '.join(names)} and a dot before it.")
        options.setdefault(name, {})[field] = text
    return options


def _count(rows: list[dict[str, Any]], name: str) -> str:
    number = len({row[name] for row in rows})
    return f"{number} {name}{'s' if number > 1 else ''}"


def _index_table(content: dict[str, Any]) -> Table:
    source, k = content["capture"], content["config"]["k"]
    title = f"{source['model']}, {source['context_length']} tokens, recall@{k}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("index", no_wrap=True)
    for column in ("effort", "recall", "95%", "scanned", "µs per\nquery", "build\ns", "insert\ns", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in content["summary"]:
        for place, point in enumerate(entry["curve"]):
            low, high = point["recall_ci95"] or (None, None)
            cells = [
                "–" if point["effort"] is None else str(point["effort"]), f"{point['recall']:.3f}",
                "–" if low is None else f"{low:.2f}–{high:.2f}", _share(point["scanned"]),
                f"{point['us_per_query']:.0f}",
            ]  # fmt: skip
            of_index = [f"{entry['build_s']:.2f}", f"{entry['insert_s']:.3f}", _mib(entry["bytes"])]
            table.add_row(entry["index"] if not place else "", *cells, *(["", "", ""] if place else of_index))
        table.add_section()
    return table


def _reached(entry: dict[str, Any]) -> str:
    scanned = entry["scanned_at_recall_95"]
    if scanned is None:
        return f"{entry['index']}: recall 0.95 not reached."
    first = entry["first_point_above"]
    how = "its lowest measured effort" if first else "interpolated between measured points"
    most = "≤ " if first and entry["curve"][0]["effort"] is not None else ""
    time = entry["us_per_query_at_recall_95"]
    return f"{entry['index']}: recall 0.95 at {most}{_share(scanned)} scanned, {time:.0f} µs per query ({how})."


@app.command()
def analyze(
    name: Annotated[str, typer.Argument(help="ood, recovery, recall, sparsity or overlap.")],
    capture: Annotated[Path | None, typer.Option(help="Folder that `kvbench capture` wrote.")] = None,
    run_folder: Annotated[Path | None, typer.Option("--run", help="Folder of a finished run, for its traces.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers separated by commas. [default: all captured]")] = None,
    heads: Annotated[str | None, typer.Option(help="Query heads separated by commas. [default: all]")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the table, the CSV and the figure.")] = Path(
        "kvbench-analysis"
    ),
    as_json: Json = False,
) -> None:
    """Analyse a capture or a run: a table, its CSV and its figure."""
    from kvbench.analysis import studies  # noqa: PLC0415
    from kvbench.capture import load_capture  # noqa: PLC0415

    source = load_capture(capture) if capture is not None else None
    rows = studies.analyse(
        name, source, run_folder, layers=_numbers("--layers", layers), heads=_numbers("--heads", heads)
    )
    config = source.manifest.config if source is not None else None
    title = f"{config.model}, {config.context_length} tokens" if config is not None else (run_folder or Path()).name
    studies.write(name, rows, output, {"title": title, "folder": str(capture or run_folder)})
    if as_json:
        print(json.dumps({"schema": 1, "analysis": name, "rows": rows, "folder": str(output)}, indent=1))
        return
    table = Table(title=f"{name}: {title}", title_justify="left")
    columns = [key for key in rows[0] if key != "missing"]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows[:60]:
        cells = [row.get(column) for column in columns]
        table.add_row(*("–" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells))
    out.print(table)
    if len(rows) > 60:
        out.print(f"{len(rows) - 60} more rows are in the CSV.", style="dim", highlight=False)
    out.print(str(output), style="dim", highlight=False, soft_wrap=True)


# -- lists -----------------------------------------------------------------------------------------------------------


def _registry() -> Registry:
    from kvbench.plugins import registry  # noqa: PLC0415  torch takes seconds to import; --help stays quick

    found = registry()
    for failure in found.failures:
        err.print(f"Warning: {failure}; its extensions are missing.", style="yellow", highlight=False, soft_wrap=True)
    return found


def _list(kind: str, name: str | None, as_json: bool) -> None:
    found = _registry()
    classes = [found.find(kind, name)] if name else list(found.classes[kind].values())
    if as_json:
        print(json.dumps([_describe(cls) for cls in classes], indent=2))
    elif name:
        _detail(_describe(classes[0]), classes[0].__doc__)
    else:
        _overview([_describe(cls) for cls in classes])


def _describe(cls: type[Any]) -> dict[str, Any]:
    fields = cls.Options.model_fields
    schema = cls.Options.model_json_schema().get("properties", {})
    options = [
        {
            "name": name,
            "type": _type(schema.get(name, {})),
            "default": field.get_default(call_default_factory=True) if not field.is_required() else None,
            "description": field.description or "",
        }
        for name, field in fields.items()
    ]
    return {
        "name": cls.name,
        "summary": cls.summary,
        "reference": cls.reference,
        "module": cls.__module__,
        "options": options,
    }


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(_type(part) for part in schema["anyOf"])
    return str(schema.get("type", "value"))


def _overview(rows: list[dict[str, Any]]) -> None:
    table = Table(show_header=True, box=None, pad_edge=False)
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("summary")
    for row in rows:
        table.add_row(row["name"], row["summary"])
    out.print(table)


def _detail(row: dict[str, Any], doc: str | None) -> None:
    out.print(f"[bold]{row['name']}[/bold]: {row['summary']}", highlight=False)
    for paragraph in (doc or "").split("\n\n"):
        out.print(" ".join(paragraph.split()), highlight=False, markup=False)
    if row["reference"]:
        out.print(f"Reference: {row['reference']}", highlight=False, markup=False)
    if not row["options"]:
        out.print("No options.")
        return
    table = Table(title="options", title_justify="left")
    for column in ("name", "type", "default", "description"):
        table.add_column(column)
    for option in row["options"]:
        table.add_row(option["name"], option["type"], str(option["default"]), option["description"])
    out.print(table)


@app.command()
def policies(name: Name = None, as_json: Json = False) -> None:
    """List the policies, or describe one."""
    _list("policy", name, as_json)


@app.command()
def budgets(name: Name = None, as_json: Json = False) -> None:
    """List the budget allocators, or describe one."""
    _list("budget", name, as_json)


@app.command()
def indexes(name: Name = None, as_json: Json = False) -> None:
    """List the vector indexes, or describe one."""
    _list("index", name, as_json)


@app.command()
def tasks(name: Name = None, as_json: Json = False) -> None:
    """List the tasks, or describe one."""
    _list("task", name, as_json)


@app.command()
def probes(name: Name = None, as_json: Json = False) -> None:
    """List the probes, or describe one."""
    _list("probe", name, as_json)


@app.command()
def models(name: Name = None, as_json: Json = False) -> None:
    """List the models known by name, or describe one; any Hugging Face id or local folder works as well."""
    import dataclasses  # noqa: PLC0415
    import difflib  # noqa: PLC0415

    from kvbench.models import MODELS  # noqa: PLC0415

    if name is not None and name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1) or sorted(MODELS)
        raise KVBenchError(
            f"Unknown model '{name}': did you mean {near[0]}? Hugging Face ids and folders are not listed."
        )
    rows = [{**dataclasses.asdict(card), "options": []} for card in MODELS.values() if name in (None, card.name)]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif name:
        for key, value in rows[0].items():
            if key != "options":
                out.print(f"{key.replace('_', ' ')}: {value}", highlight=False)
    else:
        _overview(rows)


if __name__ == "__main__":
    main()
