"""PyramidKV's budgets (arXiv 2406.02069): more tokens for the lower layers, fewer for the higher ones."""

from pydantic import Field

from kvbench.budget import BudgetAllocator, BudgetRequest, fit
from kvbench.extension import Options


class Pyramid(BudgetAllocator):
    """Falls linearly from the first layer to the last, around the same mean, beside each layer's static set."""

    name = "pyramid"
    summary = "Linearly more tokens for lower layers than for higher ones, as PyramidKV allocates."
    reference = (
        "Cai et al., PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv 2406.02069"
    )

    class Options(Options):
        """Options of the pyramid."""

        beta: float = Field(
            20, ge=1, description="steepness: the last layer's selection is the mean's, divided by beta"
        )

    def allocate(self, request: BudgetRequest) -> list[int]:
        """Share from max = 2(C − w) − min down to min = (C − w)/β tokens, each beside the static set w."""
        beside = request.tokens - request.minimum
        least = beside / self.options.beta
        most = 2 * beside - least
        fall = (most - least) / max(request.layers - 1, 1)
        return fit([request.minimum + most - fall * layer for layer in range(request.layers)], request)
