"""A frozen weight that is stored quantised, as a term of a symbolic weight.

It follows what the model does to the weight, integers and scales each for themselves, and is
dequantised where it meets data: the rows that a lookup picks, or a projection's matrix a chunk at a
time (`quantized_product.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.factor import RANK, Axis, Factor, NotServedError, pytree, take
from flax_tied_lora._algebra.site_filter import SiteFilter
from flax_tied_lora._algebra.term import Dense, Term
from flax_tied_lora._tree.quantized_array import (
    FOUR_BITS,
    QuantizedArray,
    dequantized,
    is_quantized,
)

# What leaves a vector as it is, where the result is one of the same size.
_HARMLESS = frozenset(
    {"broadcast_in_dim", "copy", "copy_p", "dynamic_slice", "optimization_barrier", "pcast",
     "pvary", "reshape", "reshard", "sharding_constraint", "slice", "squeeze", "stop_gradient",
     "transpose"}
)  # fmt: skip


def frozen(leaf: Any, sites: SiteFilter | None = None) -> Dense | Quantized:
    """Returns the term of a frozen leaf, quantised or not."""
    if is_quantized(leaf):
        return Quantized.of(leaf, sites)
    return Dense.of(jnp.asarray(leaf), sites=sites)


@pytree("axis", "qtype", "sites")
class Quantized(Term):
    """A weight as integers and scales, block by block along an axis: a `QuantizedArray`.

    Attributes:
      values: the integers, over the weight's axes.
      scales: a number for each block, over those axes that it varies along.
      axis: along which the blocks lie.
      qtype: what the integers stand for.
      sites: the call sites that it is for; None for all.
    """

    stored: ClassVar[bool] = True

    values: Factor
    scales: Factor
    axis: int
    qtype: str
    sites: SiteFilter | None = None

    @classmethod
    def of(cls, leaf: QuantizedArray, sites: SiteFilter | None = None) -> Quantized:
        """Returns the term of a leaf."""
        axes = tuple(range(leaf.ndim))
        return cls(
            Factor(leaf.values, axes), Factor(leaf.scales, axes), leaf.axis, leaf.qtype, sites
        )

    def aval(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Returns shape, dtype and sharding of the array that it stands for."""
        return jax.eval_shape(lambda term: term.dense(shape, dtype), self)

    def rearrange(self, move: Callable[[Factor], Factor]) -> Quantized:
        axis, marks = self._followed(move)

        def passive(factor: Factor) -> Factor:
            """Moves a factor whose blocks keep out of it, as the rank axis does."""
            if marks:  # what is done to the array says nothing of its size
                return move(factor)
            moved = move(factor.relabel(lambda a: RANK if a == self.axis else a))
            if axis in moved.axes:
                raise NotServedError  # walked in step with what was picked
            return Factor(moved.array, tuple(axis if a == RANK else a for a in moved.axes))

        return dataclasses.replace(self.each(passive), axis=axis)

    def _followed(self, move: Callable[[Factor], Factor]) -> tuple[int, bool]:
        """Returns where an operation puts the axis of the blocks; whether it moves marks, no array.

        Raises:
          NotServedError: it takes blocks apart.
        """
        size, moved = self.size(self.axis), []

        def alone(array: Array) -> Array:
            moved.append(move(Factor(array, (self.axis,))))
            return moved[0].array if isinstance(moved[0].array, Array) else array

        made = jax.make_jaxpr(alone)(jax.ShapeDtypeStruct((size,), jnp.int8))
        (axes,) = [m.axes for m in moved]
        done = {eqn.primitive.name for eqn in made.eqns}
        made_of: Any = made.out_avals[0]
        if len(axes) != 1 or made_of.shape != (size,) or not done <= _HARMLESS:
            raise NotServedError
        return axes[0], not isinstance(moved[0].array, Array)

    def dense(self, shape: tuple[int, ...], dtype: Any) -> Array:
        whole = self.dequantised(dtype).spread(range(len(shape)), shape)
        return lax.convert_element_type(whole, dtype)

    def dequantised(self, dtype: Any) -> Factor:
        """Returns the dequantised weight over the axes that it has, as it is in a dtype."""
        axes = self.values.axes
        scales = self.scales.ordered(axes)
        lacking = [i for i, a in enumerate(axes) if a not in scales.axes]
        whole = dequantized(
            self.values.array, lax.expand_dims(scales.array, lacking), self.qtype,
            axes.index(self.axis),
        )  # fmt: skip
        return Factor(lax.convert_element_type(whole, dtype), axes)

    def times(self, scale: Factor) -> Quantized:
        if set(scale.axes) <= set(self.scales.axes) - {self.axis}:
            return dataclasses.replace(self, scales=self.scales.times(scale))
        raise NotServedError

    def each(self, change: Callable[[Factor], Factor]) -> Quantized:
        """Returns the term with each of its factors changed."""
        return dataclasses.replace(self, values=change(self.values), scales=change(self.scales))

    def size(self, axis: Axis) -> int:
        """Returns the length of an axis of the weight."""
        packed = axis == self.axis and self.qtype in FOUR_BITS
        return self.values.size(axis) * (2 if packed else 1)


def rows(table: QuantizedArray, ids: Array, axis: int) -> Array:
    """Returns some rows of a quantised table, dequantised."""
    whole = Quantized.of(table)
    if axis == whole.axis:
        return take(table.dequantize(), ids, axis)

    def pick(factor: Factor) -> Factor:
        if axis not in factor.axes:
            return factor
        return Factor(take(factor.array, ids, factor.axes.index(axis)), factor.axes)

    shape = tuple(len(ids) if i == axis else n for i, n in enumerate(table.shape))
    return whole.each(pick).dense(shape, table.dtype)
