"""Budgets share out exactly what was asked for."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.budget import Budget, BudgetAllocator, BudgetRequest, allocate, fit
from kvbench.errors import KVBenchError
from kvbench.strategies.pyramid import Pyramid
from kvbench.strategies.uniform import Uniform


@st.composite
def requests(draw):
    minimum = draw(st.integers(1, 700))
    tokens = minimum + draw(st.integers(0, 5000))
    context = tokens + draw(st.integers(0, 20000))
    return BudgetRequest(draw(st.integers(1, 80)), tokens, context, minimum, minimum)


@pytest.mark.parametrize("allocator", [Uniform(), Pyramid(), Pyramid(Pyramid.Options(beta=2))])
@given(request_=requests())
def test_every_allocator_sums_to_the_total_and_keeps_the_bounds(allocator, request_):
    shares = [share.tokens for share in allocate(allocator, request_)]
    assert sum(shares) == request_.total
    assert all(request_.minimum <= share <= request_.context for share in shares)
    assert shares == sorted(shares, reverse=True)


def test_pyramid_follows_the_published_slope_where_nothing_is_clipped():
    request = BudgetRequest(layers=32, tokens=128, context=10_000, minimum=8, window=8)
    shares = [share.tokens for share in allocate(Pyramid(), request)]
    least, most = 120 / 20, 2 * 120 - 120 / 20
    expected = [8 + most - (most - least) * layer / 31 for layer in range(32)]
    assert all(abs(share - wish) <= 1 for share, wish in zip(shares, expected, strict=True))


@given(request_=requests(), data=st.data())
def test_fit_keeps_the_order_of_the_wishes(request_, data):
    wishes = data.draw(st.lists(st.floats(-1e4, 1e5), min_size=request_.layers, max_size=request_.layers))
    shares = fit(wishes, request_)
    assert sum(shares) == request_.total
    assert all(request_.minimum <= share <= request_.context for share in shares)
    ranked = [share for _, share in sorted(zip(wishes, shares, strict=True), key=lambda pair: pair[0])]
    assert all(after >= before - 1 for before, after in pairwise(ranked))


def test_an_allocator_that_breaks_its_promise_is_named():
    class Greedy(BudgetAllocator):
        name, summary = "greedy", "Gives too much."

        def allocate(self, request):
            return [request.tokens + 1] * request.layers

    with pytest.raises(KVBenchError, match="'greedy' shared out 303 tokens over 3 layers; expected 300"):
        allocate(Greedy(), BudgetRequest(3, 100, 1000, 8, 8))


def test_sizes():
    assert Budget(ratio=0.1).size(2048) == 205
    assert Budget(tokens=77).size(2048) == 77
    with pytest.raises(KVBenchError, match="larger than the context of 50"):
        Budget(tokens=77).size(50)
    with pytest.raises(ValueError, match="exactly one size"):
        Budget(tokens=77, ratio=0.1)
