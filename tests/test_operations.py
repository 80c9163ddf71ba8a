"""The gate of a decoding step: operations and synchronisations per layer, held to a committed table.

Counts, unlike times, are the same on every machine. `pytest tests/test_operations.py --update-operations` writes what
was counted into the table, `tests/operations.json`.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from operations import counting, measured, plain

from kvbench.kernels import insert
from kvbench.plugins import registry

TABLE = Path(__file__).parent / "operations.json"
POLICIES = sorted(name for name, policy in registry().classes["policy"].items() if policy.cached)


@cache
def _plain():
    return plain()


@pytest.fixture
def table(request):
    """The committed table, written back where the flag asks for it."""
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    yield known
    if request.config.getoption("--update-operations"):
        there = {name: row for name, row in known.items() if name in POLICIES}
        lines = (f'  "{name}": {json.dumps(row)}' for name, row in sorted(there.items()))
        TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_takes_no_more_operations_than_the_table_says(policy, table, request):
    found = measured(policy).beyond(_plain())
    if request.config.getoption("--update-operations"):
        table[policy] = found
        return
    assert policy in table, f"{policy} is not in {TABLE}: run this test with --update-operations"
    known = table[policy]
    told = f"{policy}: {found}, not {known}"
    assert found["mode"] == known["mode"] or known["mode"] == "eager", f"its fixed steps are lost, {told}"
    for name in ("a_layer", "a_step", "synchronisations"):
        assert found[name] <= known[name] + 0.011, f"more than the table says, {told}"


def test_the_table_is_of_the_policies_that_there_are(table):
    assert {name for name in table if name in POLICIES} == set(table), "policies of the table that are not there"


def test_plain_transformers_never_waits():
    assert _plain().synchronisations == 0


def test_what_is_counted():
    numbers, mask = torch.arange(6.0), torch.arange(6) % 2 == 0
    with counting() as counter:
        total = numbers + numbers
        total * 2
    assert (counter.operations, counter.synchronisations) == (2, 0)
    for action in (
        lambda: numbers.sum().item(), numbers.tolist, numbers.cpu, numbers.numpy, lambda: numbers[mask],
        mask.nonzero, lambda: bool(mask.any()), lambda: int(numbers[0]), lambda: torch.equal(mask, mask),
        lambda: numbers.index_put((mask,), numbers[0]),
    ):  # fmt: skip
        with counting() as counter:
            action()
        assert counter.synchronisations == 1
    store, new, place = torch.zeros(1, 2, 8, 4), torch.ones(1, 2, 1, 4), torch.zeros(1, dtype=torch.int32)
    with counting() as counter:
        insert(store, store.clone(), new, new, place)
    assert (counter.operations, counter.synchronisations) == (2, 0)  # the clone and the kernel
    assert store[0, 0, 0].tolist() == [1.0] * 4


def test_counts_are_the_same_again():
    assert measured("streaming_llm") == measured("streaming_llm")
