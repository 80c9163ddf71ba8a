"""The same budget for every layer."""

from kvbench.contract.budget import BudgetAllocator, BudgetRequest


class Uniform(BudgetAllocator):
    """Gives every layer the same number of tokens."""

    name = "uniform"
    summary = "The same number of tokens for every layer."

    def allocate(self, request: BudgetRequest) -> list[int]:
        """Share equally."""
        return [request.tokens] * request.layers
