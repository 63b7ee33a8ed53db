"""Losses that never hold the logits."""

from flax_tied_lora._verbs.linear_cross_entropy import Reduction as Reduction
from flax_tied_lora._verbs.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy

__all__ = [
    "Reduction",
    "linear_cross_entropy",
]
