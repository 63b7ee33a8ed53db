"""What a loss is beside its operands, and the projection in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax

from flax_tied_lora._algebra.for_cpu import by_rows
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.context import Context


@dataclasses.dataclass(frozen=True)
class Loss:
    """What the loss is beside its operands; hashable.

    Attributes:
      vocab_axis: axis of the table that the vocabulary lies along.
      lanes: in how many runs tokens are taken, each of which may be on another device.
      chunk: tokens of each lane that have logits at the same time.
      sparing: whether a chunk is so large a part of all tokens that its gradient is to have the
        memory of its logits, at the price of time.
      table: structure of the table's operands: an array's, or a symbolic weight's.
      bias: whether there is one, as the operand before the table's.
      axis_name: mesh axis that the vocabulary is split over, inside a `jax.shard_map`; or None.
    """

    vocab_axis: int
    lanes: int
    chunk: int
    sparing: bool
    table: Any
    bias: bool
    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_soft_cap: float | None
    logit_scale: float
    axis_name: str | None
    precision: Any

    @property
    def first(self) -> int:
        """The place of the table's first operand, after hidden, labels, weights and bias."""
        return 4 if self.bias else 3

    def by_rows(self, function: Callable[..., Array], logits: Array, *beside: Array) -> Array:
        """Returns a function of the rows of logits, in their memory where that is to be spared.

        A plain table's logits are no loop's, so that XLA sees to it by itself.
        """
        if not self.sparing or self.table.num_leaves == 1:
            return function(logits, *beside)
        return by_rows(function, logits, *beside)

    def in_one_lane(self) -> Loss:
        """Returns the loss with chunks as large as those of all lanes."""
        return dataclasses.replace(self, lanes=1, chunk=self.lanes * self.chunk)

    def project(
        self, hidden: Array, leaves: Sequence[Any], dtype: Any = None, context: Any = None
    ) -> Array:
        """Returns the products of hidden states with the table, [chunk, vocabulary].

        Args:
          leaves: the table's operands.
          dtype: of the result; by default that of the operands.
          context: for a symbolic weight, one that is to hear of its call site.
        """
        table = jax.tree.unflatten(self.table, leaves)

        def product(hidden: Array, table: Array) -> Array:
            # Not by promotion rules: strict ones refuse bfloat16 beside float32.
            wide = np.promote_types(hidden.dtype, table.dtype)
            return lax.dot_general(
                lax.convert_element_type(hidden, wide), lax.convert_element_type(table, wide),
                (((1,), (1 - self.vocab_axis,)), ((), ())), self.precision, dtype or wide,
            )  # fmt: skip

        if not isinstance(table, Weight):
            return product(hidden, table)
        if context is None:
            context = Context(on_dense="allow")
        return context.evaluate(product, hidden, table)
