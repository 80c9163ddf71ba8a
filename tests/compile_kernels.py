"""Compiles for a GPU, without one, the Triton kernels that policies launch: `python compile_kernels.py [POLICY...]`.

The interpreter takes more than the compiler does. Each entry point of `kvbench.kernels` runs twice: its launches are
compiled for compute capability 9.0 and left out, then its torch twin gives the result. Prints the kernels, one a line.
"""

from __future__ import annotations

import os
import sys
from types import FunctionType
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvbench.kernels import support

compiled: set[str] = set()


class Card:
    """A GPU to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only() -> None:
    """Make launches compile and do nothing else."""
    driver.set_active(Card())
    launch, seen = JITFunction.run, set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        # one launch for all values of the numbers that are no constants of the kernel
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constants = {parameter.name for parameter in self.params if parameter.is_constexpr}
        launched = (self.fn.__name__, *((name, _kind(value, name in constants)) for name, value in given.items()))
        if launched in seen:
            return None
        seen.add(launched)
        compiled.add(self.fn.__name__)
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = run
    # what a kernel would have written must at least be numbers, since ids are looked up
    torch.empty, torch.Tensor.new_empty = torch.zeros, torch.Tensor.new_zeros
    support.interpreting = lambda: True

    for module in [module for name, module in sys.modules.items() if name.startswith("kvbench.kernels.")]:
        for entry in vars(module).values():
            if isinstance(entry, FunctionType) and "function" in entry.__code__.co_freevars:
                twice(entry)


def _kind(value: Any, constant: bool) -> Any:
    """What of an argument makes another kernel: a constant's value, a tensor's dtype, a number's type."""
    return value if constant else getattr(value, "dtype", type(value))


def twice(entry: Any) -> None:
    """Let an entry point, wherever it has been imported to, launch its kernels and then give its twin's result."""
    cell = entry.__closure__[entry.__code__.co_freevars.index("function")]
    function = cell.cell_contents
    if function.__name__ == "both":
        return

    def both(*args: Any, **kwargs: Any) -> Any:
        with support.using("triton"):
            function(*args, **kwargs)
        with support.using("torch"):
            return function(*args, **kwargs)

    cell.cell_contents = both


def main() -> int:
    from tiny import every_policy, small_options, tiny_model, tokens

    import kvbench
    from kvbench import kernels
    from kvbench.contract.budget import Budget
    from kvbench.contract.errors import KVBenchError
    from kvbench.engine.generation import generate_batch
    from kvbench.kernels.cooccur import candidates, lists_of
    from kvbench.kernels.detours import by_detours
    from kvbench.kernels.occlude import occlude
    from kvbench.plugins import registry
    from kvbench.strategies.compressing.kivi import KIVI
    from kvbench.strategies.compressing.kivi_storage import KIVIBuffer, KIVITokens

    registry()  # imports all kernels
    compile_only()
    model = tiny_model(pad_token_id=None, head_dim=64, num_hidden_layers=2).to(torch.bfloat16)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (61, 50)]
    # what searches an index steps alike with any, and oracle_future as all that keep some of the prompt
    alike = {name for name, policy in registry().classes["policy"].items() if hasattr(policy, "index")} - {"flat"}
    names = sys.argv[1:] or [
        *sorted(every_policy().keys() - alike - {"oracle_future", "full_no_cache"}), "pqcache hot=30",
    ]  # fmt: skip
    for name, *given in map(str.split, names):
        found = registry().find("policy", name)
        budget = Budget(tokens=24) if found.takes_budget else None
        options = small_options(found) | dict(option.split("=") for option in given)
        try:
            with kvbench.attach(model, policy=name, budget=budget, options=options) as session:
                generate_batch(session, prompts, max_new_tokens=[2, 2], decoding="fixed")
        except KVBenchError as error:
            print(f"# {name}: {error}")
    queries, keys = (torch.randn(1, heads, 300, 64).to(torch.bfloat16) for heads in (4, 2))
    options = KIVI.Options(group=16, residual=32)
    buffer = KIVIBuffer(options, torch.zeros(1, 2, 75, 64), torch.zeros(1, 2, 75, 64))
    codes = KIVITokens(options, buffer, torch.tensor([75], dtype=torch.int32), 80).codes
    with support.using("triton"):
        kernels.attend_kivi_blocks(queries[:, :, :1], codes, torch.zeros(1, 2, 3, dtype=torch.int32), unit=16)
        kernels.column_sums(queries, keys, 0.1)
        low, high = (torch.zeros(1, 2, 19, 64).to(torch.bfloat16) for _ in range(2))
        kernels.page_bounds(keys, torch.tensor([300], dtype=torch.int32), 16, low, high)
        knn = kernels.top_keys(queries[0], keys[0], 4, way="fused")
        links, scores = candidates(lists_of(knn[:1].clone().fill_(1), 300), 4, 16)
        by_detours(knn, 2)
        occlude(keys[0, :1], links, scores, torch.full((1, 300), 4, dtype=torch.int32), 5)
    print("\n".join(sorted(compiled)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
