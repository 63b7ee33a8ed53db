"""A product of data with a weight, described: everything of it but its operands."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from flax_tied_lora._algebra.factor import RANK, Axis, Factor, contract, product_axes


@dataclasses.dataclass(frozen=True)
class Product:
    """What is static about a product of data with a weight, whatever form it takes; hashable.

    Attributes:
      data: a label for each axis of the data: the weight axis that it is paired with, or a
        name for an axis that the weight lacks.
      order: the labels of the result's axes.
      accumulate: dtype of the sums of products.
      precision: as `lax.dot_general` has it.
    """

    data: tuple[Axis, ...]
    order: tuple[Axis, ...]
    accumulate: Any
    precision: Any

    @property
    def contracting(self) -> frozenset[Axis]:
        """The axes that are summed over."""
        return frozenset(self.data) - {*self.order}

    def transposed(self) -> Product:
        """Returns the product that the gradient of the data is."""
        return dataclasses.replace(self, data=self.order, order=self.data)

    def hidden_axes(self, first: Factor, second: Factor) -> tuple[Axis, ...]:
        """Returns the axes of the product of data with the first factor of a delta."""
        return product_axes(self.data, first.axes, (*self.order, *second.axes))

    def hidden(self, data: Factor, first: Factor, second: Factor) -> Factor:
        """Returns the product of data with the first factor of a delta, which is as thin as it."""
        return self._contract(data, first, (*self.order, *second.axes))

    def result(self, hidden: Factor, second: Factor, out_sharding: Any = None) -> Factor:
        """Returns the product with the second factor; in an order that needs no transposition.

        Args:
          out_sharding: of a result that has all axes.
        """
        wanted = tuple(a for a in self.order if a in hidden.axes or a in second.axes)
        swapped = product_axes(second.axes, hidden.axes, self.order) == wanted
        lhs, rhs = (second, hidden) if swapped else (hidden, second)
        whole = product_axes(lhs.axes, rhs.axes, self.order) == self.order
        return self._contract(lhs, rhs, self.order, out_sharding if whole else None)

    def array(self, hidden: Factor, second: Factor) -> Array:
        """Returns the product with the second factor, its axes in order."""
        return self.result(hidden, second).ordered(self.order).array

    def _contract(self, lhs: Factor, rhs: Factor, keep: Any, out_sharding: Any = None) -> Factor:
        return contract(
            lhs, rhs, keep,
            accumulate=self.accumulate, precision=self.precision, out_sharding=out_sharding,
        )  # fmt: skip


def columns(second: Factor) -> tuple[Axis, ...]:
    """Returns the axes of a factor but for its rank."""
    return tuple(a for a in second.axes if a != RANK)
