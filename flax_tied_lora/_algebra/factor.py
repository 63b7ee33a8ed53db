"""Labelled arrays: the factors of a delta, and their product two at a time.

A label says which axis of the weight an array axis is; the rank axis is `RANK`. Every rule that
rearranges a weight is a function on one `Factor`; every product is `contract`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from flax_tied_lora._tree.open_sizes import supposed
from flax_tied_lora._tree.sharding import placed_as, split

RANK = "rank"

# The dtypes among which a cast is linear, up to rounding.
FLOATS = ("float64", "float32", "bfloat16", "float16")

# The label of an array axis: an axis of the weight (int), RANK, or a name for an axis of data.
Axis = Any

_Cls = TypeVar("_Cls", bound=type)


@dataclass_transform(frozen_default=True, eq_default=False)
def pytree(*static: str, dropped: Sequence[str] = ()) -> Callable[[_Cls], _Cls]:
    """Makes a class a frozen dataclass and a pytree.

    Args:
      static: names of its static fields.
      dropped: names of fields that are no part of the pytree: rebuilt, it has their defaults.
    """

    def decorate(cls: _Cls) -> _Cls:
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        data = [f.name for f in dataclasses.fields(cls) if f.name not in {*static, *dropped}]
        return jax.tree_util.register_dataclass(cls, data, list(static), list(dropped))

    return decorate


def promoted(first: Any, second: Any) -> Any:
    """Returns the dtype that holds two floating-point or complex ones, as JAX has it.

    Strict promotion does not matter to it. Of float16 and bfloat16 that is float32; a float of
    eight bits or fewer, which JAX promotes with nothing, goes into the other one, or into float32.
    """
    first, second = np.dtype(first), np.dtype(second)
    if first == second:
        return first
    small = [d for d in (first, second) if d.itemsize == 1]
    if small:
        return np.dtype(np.float32) if len(small) == 2 else max(first, second, key=_itemsize)
    if first.itemsize == second.itemsize == 2:
        return np.dtype(np.float32)
    return np.promote_types(first, second)


def _itemsize(dtype: np.dtype) -> int:
    return dtype.itemsize


def accumulator(*dtypes: Any) -> Any:
    """Returns float32, or what is wider: the dtype in which sums of such arrays are formed."""
    return functools.reduce(promoted, dtypes, np.dtype(np.float32))


def operation_dtype(data: Any, weight: Any) -> Any:
    """Returns the dtype in which data meets a weight's factors: of integers that of the weight.

    Complex data keeps its imaginary part, and float16 beside bfloat16 is float32.
    """
    return promoted(data, weight) if jnp.issubdtype(data, jnp.inexact) else np.dtype(weight)


class NotServedError(Exception):
    """A rule's no: the parts of a weight cannot follow an operation, so it is materialised."""


@pytree("axes")
class Factor:
    """An array whose axes are labelled: by axes of the weight that it is a factor of, or `RANK`.

    A weight axis that no factor has is one along which the product does not vary.
    """

    array: Any
    axes: tuple[Axis, ...]

    def size(self, axis: Axis) -> int:
        return self.array.shape[self.axes.index(axis)]

    def relabel(self, new: Callable[[Axis], Axis]) -> Factor:
        return Factor(self.array, tuple(a if a == RANK else new(a) for a in self.axes))

    def astype(self, dtype: Any) -> Factor:
        return Factor(lax.convert_element_type(self.array, dtype), self.axes)

    def ordered(self, order: Sequence[Axis]) -> Factor:
        """Returns the factor with its axes in the order in which they occur in ``order``."""
        axes = tuple(a for a in order if a in self.axes)
        if axes == self.axes:
            return self
        return Factor(lax.transpose(self.array, [self.axes.index(a) for a in axes]), axes)

    def in_order(self) -> bool:
        """Returns whether its axes are in the order of the weight's."""
        return self.axes == tuple(range(len(self.axes)))

    def is_array(self, ndim: int) -> bool:
        """Returns whether it has all axes of the weight, and its entries: no integers for them."""
        every = {*self.axes} == {*range(ndim)}
        return every and jnp.issubdtype(self.array.dtype, jnp.floating)

    def spread(self, order: Sequence[Axis], shape: Sequence[int]) -> Array:
        """Returns the array with all axes of ``order``, repeated along those it lacks."""
        ordered = self.ordered(order)
        if len(ordered.axes) == len(order):
            return ordered.array
        dims = [i for i, a in enumerate(order) if a in ordered.axes]
        return lax.broadcast_in_dim(ordered.array, tuple(shape), dims)

    def padded(self, margins: Mapping[int, Sequence[int]]) -> Factor:
        """Returns the factor of the weight padded with zeros.

        Args:
          margins: for each axis that is padded low, high and interior, as `lax.pad` has them.
        """
        config: list[Any] = [tuple(map(int, margins.get(a, (0, 0, 0)))) for a in self.axes]
        if not any(map(any, config)):
            return self
        zero = jnp.zeros((), self.array.dtype)
        return Factor(lax.pad(self.array, zero, config), self.axes)

    def at(self, axis: int, index: int) -> Factor:
        """Returns the factor of the weight at an index of an axis, without that axis."""
        array, axes = self.array, self.axes
        if axis in axes:
            array = lax.index_in_dim(array, index, axes.index(axis), keepdims=False)
            axes = tuple(a for a in axes if a != axis)
        return Factor(array, axes).relabel(lambda a: a - (a > axis))

    def same_as(self, other: Factor) -> bool:
        """Returns whether another factor is this one: the same array, its axes labelled alike."""
        return self.array is other.array and self.axes == other.axes

    def plus(self, other: Factor) -> Factor:
        """Returns the sum with a factor that has the same axes, in float32 or wider."""
        wide = accumulator(self.array.dtype, other.array.dtype)
        array = placed_as(other.ordered(self.axes).astype(wide).array, self.array)
        return Factor(self.array.astype(wide) + array, self.axes)

    def times(self, scale: Factor) -> Factor:
        """Returns the product with a factor over some of this one's axes."""
        shape, dtype = self.array.shape, self.array.dtype
        wide = accumulator(dtype, scale.array.dtype)
        other = placed_as(scale.astype(wide).spread(self.axes, shape), self.array)
        product = self.array.astype(wide) * other
        return Factor(product.astype(dtype), self.axes)


def sum_of(arrays: Sequence[Array]) -> Array:
    """Returns the sum of arrays of one shape: nothing is broadcast."""
    return functools.reduce(lax.add, arrays)


def take(array: Array, ids: Array, axis: int) -> Array:
    """Returns entries of an array along an axis, under Explicit axes replicated along it."""
    sharding = split(array)
    if sharding is None:
        return jnp.take(array, ids, axis=axis)
    spec = (None if i == axis else name for i, name in enumerate(sharding.spec))
    where = (*[slice(None)] * axis, ids)
    return array.at[where].get(out_sharding=jax.NamedSharding(sharding.mesh, jax.P(*spec)))


def contract(
    lhs: Factor, rhs: Factor, keep: Iterable[Axis], *,
    accumulate: Any, precision: Any = None, out_sharding: Any = None,
) -> Factor:  # fmt: skip
    """Returns the product of two labelled arrays, summed over shared axes that are not in ``keep``.

    One `lax.dot_general`; the axes of the result are the shared kept ones, then the left operand's,
    then the right one's.

    Args:
      accumulate: dtype of the sums of products, and of the result.
      precision: as `lax.dot_general` has it.
      out_sharding: of the result; derived from the operands where the mesh has Explicit axes.
    """
    kept = set(keep)
    axes = product_axes(lhs.axes, rhs.axes, kept)
    batch = [a for a in lhs.axes if a in rhs.axes and a in kept]
    summed = [a for a in lhs.axes if a in rhs.axes and a not in kept]

    def where(names: list[Axis]) -> tuple[list[int], list[int]]:
        return [lhs.axes.index(a) for a in names], [rhs.axes.index(a) for a in names]

    array = lax.dot_general(
        lhs.array, rhs.array, (where(summed), where(batch)), precision, accumulate,
        out_sharding=out_sharding or _explicit_sharding(axes, lhs, rhs),
    )  # fmt: skip
    return Factor(array, axes)


def product_axes(
    lhs: Sequence[Axis], rhs: Sequence[Axis], keep: Collection[Axis]
) -> tuple[Axis, ...]:
    """Returns the axes of what `contract` returns."""
    shared = [a for a in lhs if a in rhs]
    return (
        *(a for a in shared if a in keep),
        *(a for a in (*lhs, *rhs) if a not in shared),
    )


def _explicit_sharding(axes: Sequence[Axis], *factors: Factor) -> Any:
    """Returns a product's sharding under Explicit axes: each axis as its operand has it."""
    mesh, specs = None, {}
    for factor in factors:
        if (sharding := split(factor.array)) is not None:
            mesh = sharding.mesh
            specs |= {a: s for a, s in zip(factor.axes, sharding.spec, strict=False) if s}
    if mesh is None:
        return None
    taken: set[Any] = set()
    spec = []
    for axis in axes:
        names = specs.get(axis)
        parts = names if isinstance(names, tuple) else (names,)
        spec.append(None if names is None or taken & set(parts) else names)
        taken |= set(parts)
    return jax.NamedSharding(mesh, jax.P(*spec))


def times_chain(x: Factor, first: Factor, second: Factor, keep: Sequence[Axis]) -> bool:
    """Returns whether ``(x . first) . second`` costs no more than ``(x . second) . first``."""

    def flops(one: Factor, other: Factor) -> int:
        sizes = {a: n for f in (x, one, other) for a, n in zip(f.axes, f.array.shape, strict=True)}
        inner = {*x.axes, *one.axes}
        left = {a for a in inner if a in keep or a in other.axes or a == RANK}
        made = supposed(*(sizes[a] for a in inner))
        return made + supposed(*(sizes[a] for a in left | set(other.axes)))

    return flops(first, second) <= flops(second, first)
