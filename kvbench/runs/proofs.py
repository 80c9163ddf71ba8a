"""What conformance checks found, kept on the disk: a run of the same model, policy and code need not check again."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from kvbench.contract.errors import KVBenchError
from kvbench.contract.policy import KVCachePolicy
from kvbench.contract.reading import read_json
from kvbench.engine.conformance.checks import Conformance
from kvbench.engine.conformance.report import Report
from kvbench.identity import identity
from kvbench.models import MODELS, LoadedModel, cache_folder
from kvbench.plugins import registry
from kvbench.runs.environment import PACKAGES, processor

FOLDER = "conformance"
"""In kvbench's cache folder."""
DAYS = 90
"""After which what was found is forgotten."""
_REPORT = TypeAdapter(Report)


def checker(loaded: LoadedModel, *, anew: bool = False) -> Conformance:
    """The conformance checks of a model; what they found in another process counts, unless they are made `anew`."""
    return Conformance(loaded.model, loaded.name, loaded.tokenizer, memory=Proofs(loaded, anew=anew))


class Proofs:
    """What was found of a model, in one file for it and one for each policy, under all that it depends on.

    That is: the weights and the tokenizer, the device, the number type, the attention, kvbench's own code and the
    policy's, its options, and the packages below. Only what passed is kept.
    """

    def __init__(self, loaded: LoadedModel, *, anew: bool) -> None:
        self._anew = anew
        self._about: dict[str, Any] | None = None
        if loaded.lasting:
            device = loaded.device
            code = identity(Conformance)
            self._about = None if code.source is None else {
                "fingerprint": loaded.fingerprint, "files": _files(loaded.name), "device": device.type,
                "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
                "threads": torch.get_num_threads(), "dtype": str(loaded.dtype), "code": str(code),
                "attention": str(loaded.model.config._attn_implementation),
                "packages": {name: _version(name) for name in (*PACKAGES, "triton", "tokenizers")},
            }  # fmt: skip

    def find(self, policy: KVCachePolicy | None, fixed: bool) -> Report | None:
        """What was found of a policy, or of the model without one; None where nothing is known."""
        about = self._key(policy, fixed)
        if about is None or self._anew:
            return None
        try:
            content = read_json(_file(about))
            if content["about"] != about:
                return None
            report = _REPORT.validate_python(content["report"])
            return None if report.failure else replace(report, remembered=str(content["time"]))
        except Exception:  # whatever is wrong with the file: the check is made again
            return None

    def keep(self, policy: KVCachePolicy | None, fixed: bool, report: Report) -> None:
        """Keep what was found, where it passed and there is room."""
        about = self._key(policy, fixed)
        if about is None or report.failure:
            return
        file = _file(about)
        content = {"about": about, "time": datetime.now(UTC).isoformat(timespec="seconds"),
                   "report": _REPORT.dump_python(report, mode="json")}  # fmt: skip
        with suppress(OSError, ValueError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as written:
                json.dump(content, written, allow_nan=False)
            Path(written.name).replace(file)
            for old in file.parent.iterdir():
                if old.stat().st_mtime < time.time() - DAYS * 86400:
                    old.unlink()

    def _key(self, policy: KVCachePolicy | None, fixed: bool) -> dict[str, Any] | None:
        if self._about is None or policy is None:
            return self._about and {**self._about, "policy": None, "fixed": fixed}
        try:
            if registry().find("policy", policy.name) is not type(policy):
                return None
            code = registry().identity("policy", policy.name)
        except KVBenchError:  # of no registered policy, or one whose file has changed since
            return None
        if code.source is None:
            return None
        own = {"policy": policy.name, "options": policy.given.model_dump(mode="json"), "policy_code": str(code)}
        return {**self._about, **own, "fixed": fixed}


def _file(about: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / FOLDER / f"{name}.json"


def _files(name: str) -> list[list[str | int]]:
    """Names, sizes and times of a local model's files: the fingerprint samples large ones."""
    path = Path(name).expanduser()
    if name in MODELS or not path.exists():
        return []
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in found]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
