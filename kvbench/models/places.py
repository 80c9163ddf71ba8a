"""Devices and number types by their names."""

from typing import TYPE_CHECKING, Any

from kvbench.contract.errors import KVBenchError

if TYPE_CHECKING:
    import torch


def device_named(name: str | None) -> "torch.device":
    """A device by its name; CUDA where there is one, without a name."""
    import torch  # noqa: PLC0415 - slow to import, and listing the models does not need it

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise _unusable(name, error) from None


def check_device(device: "torch.device") -> None:
    """Raise KVBenchError where this machine cannot use the device."""
    import torch  # noqa: PLC0415 - see device_named

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise _unusable(str(device), error) from None


def _unusable(device: str, error: Exception) -> KVBenchError:
    reason = str(error).strip().splitlines()[0]
    return KVBenchError(
        f"The device {device} cannot be used ({reason}): choose cpu, or cuda where PyTorch finds a GPU."
    )


def dtype_named(name: str | None, device: "torch.device") -> "torch.dtype":
    """A number type for weights by its name; without one, bfloat16 on CUDA and float32 elsewhere."""
    import torch  # noqa: PLC0415 - see device_named

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in types:
        raise KVBenchError(f"{name} is not a number type for weights: choose {', '.join(types)}.")
    return types[name]


def placed(model: Any) -> dict[str, str] | None:
    """Devices by the modules that lie on them, as accelerate put them; None for a model on one device.

    Numbered modules that follow each other on one device are one entry: `model.layers.0-15`.
    """
    found = getattr(model, "hf_device_map", None)
    if not found or len({_device_text(place) for place in found.values()}) < 2:
        return None
    runs: list[list[str]] = []  # name before the number, first, last, device
    for name, place in found.items():
        stem, _, number = name.rpartition(".")
        where = _device_text(place)
        last = runs[-1] if runs else None
        if number.isdigit() and last is not None and last[0] == stem and last[3] == where:
            last[2] = number
        else:
            runs.append([stem, number, number, where] if number.isdigit() else [name, "", "", where])
    return {
        stem if not first else f"{stem}.{first}" + (f"-{last}" if last != first else ""): where
        for stem, first, last, where in runs
    }


def _device_text(place: Any) -> str:
    return f"cuda:{place}" if isinstance(place, int) else str(place)
