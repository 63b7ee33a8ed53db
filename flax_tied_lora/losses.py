"""Losses of a language model's output projection that never hold all of the logits.

`linear_cross_entropy` is the softmax cross-entropy of ``hidden @ table.T``, computed a chunk of
tokens at a time, with its gradients. Inside `adapt` the table may have adapters.
`blockwise_cross_entropy_rule` serves such losses of other libraries.
"""

from flax_tied_lora._verbs.blockwise import (
    blockwise_cross_entropy_rule as blockwise_cross_entropy_rule,
)
from flax_tied_lora._verbs.linear_cross_entropy import Reduction as Reduction
from flax_tied_lora._verbs.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy

__all__ = [
    "Reduction",
    "blockwise_cross_entropy_rule",
    "linear_cross_entropy",
]
