"""PyramidKV's budgets (arXiv 2406.02069): more tokens for the lower layers, fewer for the higher ones."""

from typing import Literal

from pydantic import Field

import kvbench.contract.extension
from kvbench.contract.budget import BudgetAllocator, BudgetRequest, fit


class Pyramid(BudgetAllocator):
    """Falls linearly from the first layer to the last, around the same mean, beside each layer's static set.

    With b tokens beside the static set on average, the last layer gets b/β and the first 2b − b/β. Where that is more
    than the prompt has, `variant=paper` caps the layers concerned and spreads the rest evenly over the others;
    `variant=code`, as the published code does, lowers the first layer to the prompt and raises the last by as much, in
    whole steps from layer to layer, and shares equally where the prompt is shorter than 2b. (Rounded down, its steps
    overspend; here the sum is exactly the total asked for, either way.)
    """

    name = "pyramid"
    summary = "Linearly more tokens for lower layers than for higher ones, as PyramidKV allocates."
    reference = (
        "Cai et al., PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv 2406.02069"
    )

    class Options(kvbench.contract.extension.Options):
        """Options of the pyramid."""

        beta: float = Field(
            20, ge=1, description="steepness: the last layer's selection is the mean's, divided by beta"
        )
        variant: Literal["paper", "code"] = Field("paper", description="the paper's formula, or its published code's")

    def allocate(self, request: BudgetRequest) -> list[int]:
        """Share from max = 2b − min down to min = b/β tokens, each beside the static set."""
        beside, last = request.beside, max(request.layers - 1, 1)
        least = beside / self.options.beta
        most = 2 * beside - least
        fall = (most - least) / last
        if self.options.variant == "code":
            least = beside // self.options.beta
            most = min(2 * beside - least, request.context - request.minimum)
            fall = (most - (2 * beside - most)) // last
            if request.context < 2 * beside:
                most, fall = beside, 0
        wishes = [request.minimum + most - fall * layer for layer in range(request.layers)]
        return fit(wishes, total=request.total, low=request.minimum, high=request.context)
