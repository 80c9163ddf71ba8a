"""A finished run's examples, made again by its task: prompts and references as the model was asked them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvbench.contract.errors import KVBenchError
from kvbench.contract.task import TokenExample
from kvbench.models import LoadedModel, load_model
from kvbench.plugins import registry
from kvbench.runs.config import RunConfig
from kvbench.runs.examples import examples_of
from kvbench.runs.planning import AnyTask
from kvbench.runs.sharing import prompt_of


@dataclass(frozen=True)
class Drawn:
    """An example as its task makes it; `references` are None where the task scores given tokens."""

    id: str
    prompt: str
    prompt_tokens: int
    references: tuple[str, ...] | None
    max_new_tokens: int


class Drawer:
    """Draws the examples of runs again; each model's tokenizer is loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[str, LoadedModel] = {}

    def draw(self, config: RunConfig) -> Iterator[Drawn]:
        """The examples of a configuration; raises KVBenchError where model, task or texts are others here."""
        loaded = self._load(config)
        task: AnyTask = registry().make("task", config.task, config.task_options)
        data = task.data()
        if data != config.task_data:
            raise KVBenchError(
                f"The run's examples were made from {config.task_data}, and task '{config.task}' has {data} here: give "
                "it the same texts."
            )
        for example in examples_of(task, config, loaded):
            prompt = prompt_of(loaded, example)
            text, tokens = loaded.tokenizer.decode(prompt.input_ids), len(prompt.input_ids)
            if isinstance(example, TokenExample):
                yield Drawn(example.id, text, tokens, None, 0)
            else:
                yield Drawn(example.id, text, tokens, tuple(example.references), example.max_new_tokens)

    def _load(self, config: RunConfig) -> LoadedModel:
        if config.model not in self._loaded:
            self._loaded[config.model] = load_model(config.model, weights=False, device="cpu")
        loaded = self._loaded[config.model]
        if loaded.fingerprint != config.model_fingerprint:
            raise KVBenchError(
                f"{config.model} is not the model that made the run ({loaded.fingerprint} instead of "
                f"{config.model_fingerprint}): give the same one."
            )
        return loaded
