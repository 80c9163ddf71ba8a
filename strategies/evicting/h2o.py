"""H2O (arXiv 2306.14048): keep the heavy hitters, the tokens that have gathered most attention, and the recent ones."""

from pydantic import Field
from torch import Tensor

from kvbench.contract import extension
from kvbench.contract.layer import Layer
from kvbench.kernels.columns import column_sums
from kvbench.strategies.evicting.eviction import AttentionEviction


class H2O(AttentionEviction):
    """Keeps, per key/value head, the tokens with the largest attention summed over all queries, and the recent ones.

    The sum runs over all the prompt's queries and goes on over the generated ones; the weights of the query heads of a
    group are summed.
    """

    name = "h2o"
    query_aware = "keeps what the prompt's queries attend to, a question's among them"
    summary = "Keeps the tokens with the largest accumulated attention and the recent ones; evicts at every step."
    reference = (
        "Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, "
        "arXiv 2306.14048"
    )

    class Options(extension.Options):
        """Options of H2O."""

        recent: float = Field(0.5, ge=0, lt=1, description="share of the budget that the most recent tokens take")

    def protected(self, layer: Layer) -> int | Tensor:
        """The share of the budget that goes to recent tokens."""
        share = float(self.options.recent)
        if layer.budget.heads is not None:
            return (layer.budget.heads * share).round().long().clamp_min(1)
        return max(round(share * layer.budget.tokens), 1)

    def prompt_scores(self, layer: Layer, queries: Tensor, keys: Tensor) -> Tensor:
        """The attention that each token of the prompt gathered from it and from later ones."""
        return column_sums(queries, keys, layer.scaling)

    def updated(self, layer: Layer, scores: Tensor, weights: Tensor) -> Tensor:
        """Add the step's weights, summed over the group's query heads."""
        return scores + weights.sum(2)
