"""Devices and number types by their names."""

from typing import TYPE_CHECKING

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
