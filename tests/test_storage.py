"""A layer's store holds, for every head, exactly the tokens that a plain list of them says, whatever is done to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.contract.storage import KVStore

ROWS, GROUPS, DIM = 2, 2, 3
HEADS = [(row, group) for row in range(ROWS) for group in range(GROUPS)]


def vectors(first, count):
    """Keys [2, 2, count, 3] of which every one names its row, its head and its token; values are their negatives."""
    head = torch.tensor([[[1000 * row + 10_000 * group] for group in range(GROUPS)] for row in range(ROWS)])
    return (head + torch.arange(first, first + count))[..., None].expand(-1, -1, -1, DIM).double()


class Heads:
    """The reference: for each head the ids of its static tokens, and the set-aside ids of all."""

    def __init__(self, tokens):
        self.tokens, self.aside = tokens, None
        self.static = {head: set(range(tokens)) for head in HEADS}

    def common(self):
        return sorted(set.intersection(*self.static.values()))


def check(store, heads):
    """Every head holds its tokens, each with its own key and value, once, and nothing else takes memory for long."""
    parts = store.static_parts()
    keys, values = (torch.cat([part[place] for part in parts], dim=2) for place in (0, 1))
    ids = store.static_ids.expand(ROWS, GROUPS, -1)
    masks = [torch.ones(part[0].shape[:3], dtype=torch.bool) if part[2] is None else part[2] for part in parts]
    assert torch.equal(torch.cat(masks, dim=2), ids >= 0)
    for row, group in HEADS:
        held = ids[row, group] >= 0
        mine = ids[row, group][held]
        assert sorted(mine.tolist()) == sorted(heads.static[row, group])
        expected = vectors(0, heads.tokens)[row, group, mine]
        assert torch.equal(keys[row, group][held], expected)
        assert torch.equal(values[row, group][held], -expected)
    assert store.tokens == heads.tokens
    mean = sum(map(len, heads.static.values())) // len(HEADS)
    assert store.static_tokens == mean
    if heads.aside is not None:
        first, stop = heads.aside
        assert (store.aside_start, store.aside_stop) == (first, stop)
        assert torch.equal(store.aside_keys, vectors(first, stop - first))
        assert torch.equal(store.aside_values, -vectors(first, stop - first))
        if stop > first:
            wanted = torch.arange(first, stop).flip(0).expand(ROWS, GROUPS, -1)
            assert torch.equal(store.gather(wanted)[0], vectors(first, stop - first).flip(2))


def runs(ids):
    """All stretches of consecutive ids, as (start, count)."""
    return [
        (start, count) for place, start in enumerate(ids) for count in range(1, len(ids) - place + 1)
        if ids[place + count - 1] == start + count - 1
    ]  # fmt: skip


def step(data, store, heads):
    """Do one thing that is possible now to the store and to the reference."""
    common, least = heads.common(), min(map(len, heads.static.values()))
    possible = ["append", "marks"]
    possible += ["keep"] * bool(common) + ["keep_per_head", "evict_slots"] * (least > 0)
    possible += ["evict"] * bool(common)
    if heads.aside is None:
        possible += ["set_aside"] * bool(common)
    elif heads.aside[1] in common:
        possible.append("advance")
    what = data.draw(st.sampled_from(possible))
    if what == "append":
        count = data.draw(st.integers(1, 3))
        new = vectors(heads.tokens, count)
        store.append(new, -new)
        for held in heads.static.values():
            held.update(range(heads.tokens, heads.tokens + count))
        heads.tokens += count
    elif what == "keep":
        kept = data.draw(st.lists(st.sampled_from(common), unique=True, min_size=1))
        store.keep(torch.tensor(kept))
        heads.static = {head: set(kept) for head in HEADS}
    elif what == "keep_per_head":
        count = data.draw(st.integers(1, least))
        chosen = {head: data.draw(st.permutations(sorted(heads.static[head])))[:count] for head in HEADS}
        store.keep(torch.tensor([[chosen[row, group] for group in range(GROUPS)] for row in range(ROWS)]))
        heads.static = {head: set(kept) for head, kept in chosen.items()}
    elif what == "marks":
        marks = torch.tensor(
            [[[data.draw(st.booleans()) for _ in range(heads.tokens)] for _ in range(GROUPS)] for _ in range(ROWS)]
        )
        store.keep(marks)
        heads.static = {
            (row, group): {token for token in held if marks[row, group, token]}
            for (row, group), held in heads.static.items()
        }
    elif what == "evict_slots":
        ids = store.static_ids.expand(ROWS, GROUPS, -1)
        slots = torch.zeros(ROWS, GROUPS, dtype=torch.long)
        for row, group in HEADS:
            token = data.draw(st.sampled_from(sorted(heads.static[row, group])))
            slots[row, group] = ids[row, group].tolist().index(token)
            heads.static[row, group].remove(token)
        store.evict_slots(slots)
    elif what == "evict":
        start, count = data.draw(st.sampled_from(runs(common)))
        store.evict(start, count)
        for held in heads.static.values():
            held.difference_update(range(start, start + count))
    elif what == "set_aside":
        start, count = data.draw(st.sampled_from(runs(common)))
        store.set_aside(start, start + count, offload=data.draw(st.booleans()))
        heads.aside = start, start + count
        for held in heads.static.values():
            held.difference_update(range(start, start + count))
    else:
        stop = heads.aside[1]
        count = data.draw(st.sampled_from([count for start, count in runs(common) if start == stop]))
        keys, values = store.advance(count)
        assert torch.equal(keys, vectors(stop, count))
        assert torch.equal(values, -vectors(stop, count))
        heads.aside = heads.aside[0], stop + count
        for held in heads.static.values():
            held.difference_update(range(stop, stop + count))
    return what


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 7))
def test_a_store_holds_what_a_list_of_its_tokens_says_after_any_sequence_of_calls(data, tokens, steps):
    new = vectors(0, tokens)
    store, heads = KVStore(new, -new), Heads(tokens)
    for _ in range(steps):
        step(data, store, heads)
        check(store, heads)


def test_a_second_keep_takes_ids_as_the_first_does():
    keys = vectors(0, 10)
    for kept in (torch.tensor([3, 7]), torch.tensor([7, 3]).expand(ROWS, GROUPS, -1)):
        store = KVStore(keys, -keys)
        store.keep(torch.tensor([0, 3, 5, 7]))
        store.keep(kept)
        assert sorted(store.static_ids.reshape(-1, 2)[0].tolist()) == [3, 7]
        assert torch.equal(store.static_parts()[0][0].sort(2).values, keys[:, :, [3, 7]])
        assert store.resident_bytes == 2 * ROWS * GROUPS * 2 * DIM * 8


def test_a_call_for_tokens_that_are_not_there_is_refused_and_changes_nothing():
    keys = vectors(0, 10)
    store, heads = KVStore(keys, -keys), Heads(10)
    store.keep(torch.tensor([0, 3, 4, 7]))
    heads.static = {head: {0, 3, 4, 7} for head in HEADS}
    for call, message in (
        (lambda: store.keep(torch.tensor([3, 5])), "token 5 is not static"),
        (lambda: store.keep(torch.tensor([3, 10])), "token 10 is not static"),
        (lambda: store.keep(torch.tensor([3, -1])), "token -1 is not static"),
        (lambda: store.keep(torch.tensor([3, 3])), "twice"),
        (lambda: store.keep(torch.ones(ROWS, GROUPS, 4, dtype=torch.bool)), r"expected \[2, 2, 10\]"),
        (lambda: store.evict(4, 2), "token 5 is not static"),
        (lambda: store.set_aside(3, 6, offload=False), "token 5 is not static"),
        (lambda: store.set_aside(7, 11, offload=False), "there are 10 tokens"),
        (lambda: store.advance(1), "no tokens are set aside"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        check(store, heads)
    store.set_aside(3, 5, offload=False)
    with pytest.raises(ValueError, match="tokens 3 to 4 were set aside before"):
        store.set_aside(7, 8, offload=False)
