"""Runs a sweep on a Ray cluster: an actor per worker holds one model and executes many runs with it."""

from __future__ import annotations

import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from kvbench.contract.errors import KVBenchError, sentence
from kvbench.contract.extras import need
from kvbench.models import LoadedModel
from kvbench.runs.results import RunConfig
from kvbench.runs.sweep import Outcome, Planned, Progress, document, reuse, run_together
from kvbench.runs.sweep_file import Model

ATTEMPTS = 3
"""How many workers a run may lose before it counts as failed."""


class Worker:
    """Executes runs one after another, keeping the model that they share."""

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None
        self._of: tuple[Model, str] | None = None

    def run(self, model: dict[str, Any], config: dict[str, Any], output: str) -> str | None:
        """Execute a run into `output`; give the error that ended it, in one sentence, or None."""
        planned = Planned(Model(**model), RunConfig.model_validate(config))
        of = planned.model, planned.config.model_fingerprint
        try:
            if self._of != of:
                self._loaded = self._of = None  # freed before the next one is loaded
                self._loaded, self._of = planned.load(), of
            assert self._loaded is not None
            (outcome,) = run_together([planned], self._loaded, Path(output), _Silent())
            return outcome.error
        except Exception as error:
            return sentence(error)


class _Silent:
    def examples(self, planned: Planned, done: int) -> None: ...
    def finished(self, outcome: Outcome) -> None: ...
    def warn(self, message: str) -> None: ...


@contextmanager
def cluster(address: str | None, workers: int | None) -> Iterator[_Cluster]:
    """Join the Ray cluster at `address`, or start one on this machine for the time of the block."""
    ray = need("ray", "--engine ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address is None:
            ray.init(
                address="local", include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1",
                num_cpus=max(os.cpu_count() or 1, workers or 1), object_store_memory=80 * 2**20,
            )  # fmt: skip
        else:
            ray.init(address=address, log_to_driver=False)
    except Exception as error:  # Ray raises whatever it meets while connecting
        where = "started here" if address is None else f"reached at {address}"
        raise KVBenchError(f"No Ray cluster could be {where} ({sentence(error)}): check --address.") from None
    try:
        with redirect_stdout(sys.stderr):  # where Ray prints what happens to its workers
            yield _Cluster(ray, workers)
    finally:
        ray.shutdown()


class _Cluster:
    """A joined cluster, and how many workers it takes."""

    def __init__(self, ray: Any, workers: int | None) -> None:
        self.ray, self.asked = ray, workers
        self.resources: dict[str, float] = ray.cluster_resources()

    @property
    def device(self) -> str:
        """Where models run that name no device: on GPUs where the cluster has any."""
        return "cuda" if self.resources.get("GPU") else "cpu"

    def workers(self, device: str, spread: bool = False) -> tuple[int, dict[str, float]]:
        """How many workers run at once on this kind of device, and what each of them takes of the cluster.

        A worker whose model is `spread` over GPUs takes all that the smallest node with GPUs has.
        """
        nodes = sum(bool(node["Alive"]) for node in self.ray.nodes())
        cpus, gpus = int(self.resources.get("CPU", 1)), int(self.resources.get("GPU", 0))
        if device.startswith("cuda"):
            if not gpus:
                raise KVBenchError("The sweep asks for device cuda and the Ray cluster has no GPU: choose cpu.")
            if spread:
                found = [int(node["Resources"].get("GPU", 0)) for node in self.ray.nodes() if node["Alive"]]
                most = min(number for number in found if number)
                count = sum(number // most for number in found)
                return min(self.asked or count, count), {"num_gpus": most, "num_cpus": 1}
            return min(self.asked or gpus, gpus), {"num_gpus": 1, "num_cpus": 1}
        count = min(self.asked or nodes, cpus)
        return count, {"num_cpus": max(1, cpus // count), "num_gpus": 0}

    def run(self, plans: Sequence[Planned], output: Path, progress: Progress) -> list[Outcome]:
        """Run a sweep; a run whose worker dies goes on with another one, from the example where it stopped."""
        output = output.resolve()
        output.mkdir(parents=True, exist_ok=True)
        outcomes, left = reuse(plans, output, progress)
        for device, spread in dict.fromkeys((p.config.device, p.config.device_map is not None) for p in left):
            here = [p for p in left if (p.config.device, p.config.device_map is not None) == (device, spread)]
            outcomes += self._run(here, *self.workers(device, spread), output, progress)
        return outcomes

    def _run(
        self, plans: Sequence[Planned], workers: int, share: dict[str, float], output: Path, progress: Progress
    ) -> list[Outcome]:
        actor = self.ray.remote(Worker).options(scheduling_strategy="SPREAD", max_restarts=0, **share)
        queue, outcomes, died = deque(plans), [], Counter[str]()
        idle: list[tuple[Any, Model | None]] = [(None, None)] * min(workers, len(plans))
        running: dict[Any, tuple[Any, Planned]] = {}
        while queue or running:
            while queue and idle:
                worker, model = idle.pop()
                planned = next((planned for planned in queue if planned.model == model), queue[0])
                queue.remove(planned)
                worker = worker or actor.remote()
                config = planned.config.model_dump(mode="json")
                running[worker.run.remote(planned.model.model_dump(), config, str(output))] = worker, planned
            ready, _ = self.ray.wait(list(running), timeout=0.5)
            for _, planned in running.values():
                progress.examples(planned, _lines(output / planned.config.folder / "examples.jsonl"))
            for reference in ready:
                worker, planned = running.pop(reference)
                try:
                    error = self.ray.get(reference)
                    idle.append((worker, planned.model))
                except self.ray.exceptions.RayError as lost:
                    idle.append((None, None))
                    died[planned.config.hash] += 1
                    told = f"the worker of {planned.config.folder} died ({type(lost).__name__})"
                    if died[planned.config.hash] < ATTEMPTS:
                        progress.warn(f"{told}; another one goes on with it.")
                        queue.appendleft(planned)
                        continue
                    error = f"{told} for the {ATTEMPTS}rd time, perhaps for want of memory."
                outcomes.append(_outcome(planned, output / planned.config.folder, error))
                progress.finished(outcomes[-1])
        for worker, _ in idle:
            if worker is not None:
                self.ray.kill(worker)  # its resources are needed where the next runs want another device
        return outcomes


def _outcome(planned: Planned, folder: Path, error: str | None) -> Outcome:
    if error is None:
        try:
            return Outcome(planned, folder, document(folder))
        except KVBenchError:
            error = (
                f"{folder} is not on this machine though its worker finished it: put --output on a file system that "
                "all nodes of the cluster share."
            )
    return Outcome(planned, folder, None, error)


def _lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except OSError:
        return 0
