"""Replaced rows: a few trainable rows of a table, kept apart from the frozen one.

The table stays as it is; what its rows become is a delta that is zero everywhere else, and that
costs memory for the rows only, wherever the table is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.factor import (
    RANK,
    Axis,
    Factor,
    NotServedError,
    accumulator,
    contract,
    pytree,
    take,
)
from flax_tied_lora._algebra.product import Product
from flax_tied_lora._algebra.quantized import rows as quantized_rows
from flax_tied_lora._algebra.site_filter import SiteFilter
from flax_tied_lora._algebra.term import Term
from flax_tied_lora._tree.quantized_array import is_quantized
from flax_tied_lora._tree.sharding import automatic, explicit


@pytree("group", "sites", "unique")
class Rows(Term):
    """A delta that is not zero in a few rows: ``values[slots[row] - 1]`` where a row has a slot.

    Attributes:
      slots: int32 over the row axes; for each row its slot from 1, or 0 for a row that is as it
        was. An operation on the weight does the same to them, so slices, paddings and lookups keep
        track of the rows by themselves.
      values: what is added, [slot, columns...]; its slot axis is labelled `RANK`.
      group: key of the adapter.
      sites: the call sites that it is for; None for all.
      unique: whether each slot is that of one row at most.
    """

    slots: Factor
    values: Factor
    group: str = ""
    sites: SiteFilter | None = None
    unique: bool = True

    @classmethod
    def replacing(
        cls, tokens: Sequence[int], rows: Array, table: Any, axis: int, group: str,
        sites: SiteFilter | None,
    ) -> Rows:  # fmt: skip
        """Returns the term that makes some rows of a table other ones.

        Args:
          tokens: the numbers of the rows.
          rows: what they become, [len(tokens), columns...].
          table: the frozen table, quantised or not.
          axis: of its rows.
        """
        cols = [i for i in range(table.ndim) if i != axis]
        wide = accumulator(rows.dtype, table.dtype)
        ids = jnp.asarray(tokens, jnp.int32)
        pick = quantized_rows if is_quantized(table) else take
        frozen = lax.convert_element_type(pick(table, ids, axis), wide)
        frozen = Factor(frozen, tuple(RANK if i == axis else i for i in range(table.ndim)))
        values = lax.convert_element_type(rows, wide) - frozen.ordered((RANK, *cols)).array
        slots = jnp.zeros(table.shape[axis], jnp.int32)
        slots = slots.at[ids].set(jnp.arange(1, len(tokens) + 1, dtype=jnp.int32))
        return cls(Factor(slots, (axis,)), Factor(values, (RANK, *cols)), group, sites)

    def rearrange(self, move: Callable[[Factor], Factor]) -> Rows:
        return dataclasses.replace(self, slots=move(self.slots), values=move(self.values))

    def plus(self, other: Rows) -> Rows | None:
        if not self.slots.same_as(other.slots) or {*self.values.axes} != {*other.values.axes}:
            return None
        values = self.values.plus(other.values)
        return dataclasses.replace(self, values=values, unique=self.unique and other.unique)

    def repeated(self) -> Rows:
        return dataclasses.replace(self, unique=False)

    def dense(self, shape: tuple[int, ...], dtype: Any) -> Array:
        out = self.delta().spread(range(len(shape)), shape)
        return lax.convert_element_type(out, dtype)

    def delta(self) -> Factor:
        """Returns the delta, over the axes along which it varies."""
        slots, values = self.slots, self.values
        order = [*slots.axes, *(a for a in values.axes if a != RANK and a not in slots.axes)]
        if set(slots.axes) & set(values.axes):  # rows and columns picked together
            sizes = [values.size(a) if a in values.axes else 1 for a in order]
            each = values.spread([*order, RANK], [*sizes, values.size(RANK)])
            where = lax.expand_dims(slots.array, range(slots.array.ndim, len(order) + 1))
            picked = jnp.take_along_axis(each, jnp.maximum(where - 1, 0), axis=-1)[..., 0]
        else:
            by_slot = values.ordered([RANK, *order]).array
            picked = jnp.take(by_slot, jnp.maximum(slots.array - 1, 0), axis=0)
        replaced = lax.expand_dims(slots.array > 0, range(slots.array.ndim, picked.ndim))
        return Factor(jnp.where(replaced, picked, 0), tuple(order))

    def times(self, scale: Factor) -> Rows:
        if set(scale.axes) <= set(self.values.axes):
            return dataclasses.replace(self, values=self.values.times(scale))
        if scale.axes == self.slots.axes and len(scale.axes) == 1 and self.unique:
            wide = accumulator(scale.array.dtype)
            each = _at(scale.array.astype(wide), self.positions(), 0)
            return dataclasses.replace(self, values=self.values.times(Factor(each, (RANK,))))
        raise NotServedError

    def positions(self) -> Array:
        """Returns for each slot where its row is now; past the end where it is gone.

        Raises:
          NotServedError: rows are spread over several axes, or may be in several places.
        """
        if len(self.slots.axes) != 1 or not self.unique:
            raise NotServedError
        slots, count = self.slots.array, self.values.size(RANK)
        past = jnp.full((count,), slots.shape[0], jnp.int32)
        target = jnp.where(slots > 0, slots - 1, count)
        return past.at[target].set(jnp.arange(slots.shape[0], dtype=jnp.int32), mode="drop")


def product(
    term: Rows, data: Array, product: Product, shape: tuple[int, ...]
) -> Callable[[Array], Array]:
    """Returns a function that adds the product of data with replaced rows to a result.

    Where the rows are summed over, only theirs of the data are picked; where they are kept, only
    their entries of the result are added to. What is left where one row is picked is a vector.

    Args:
      shape: of the result.

    Raises:
      NotServedError: the rows cannot follow.
    """
    options: dict[str, Any] = {"accumulate": product.accumulate, "precision": product.precision}
    order = product.order
    if product.contracting - {*term.values.axes, *term.slots.axes}:
        raise NotServedError  # summed over an axis along which the rows do not vary
    factor, values = Factor(data, product.data), term.values.astype(data.dtype)
    if not term.slots.axes:
        part = contract(factor, term.delta().astype(data.dtype), order, **options)
        return lambda out: out + part.spread(order, shape).astype(out.dtype)
    (axis,) = term.slots.axes if len(term.slots.axes) == 1 else (None,)
    if axis is None or axis in values.axes or (axis in product.data) == (axis in order):
        raise NotServedError
    if axis in product.data:
        part = contract(_of_slots(term, factor, axis), values, order, **options)
        return lambda out: out + part.spread(order, shape).astype(out.dtype)
    hidden = contract(factor, values, (*order, RANK), **options)
    within = [RANK if n == axis else n for n in order]
    sizes = [values.size(RANK) if n == axis else k for n, k in zip(order, shape, strict=True)]
    entries = hidden.spread(within, sizes)
    before = [slice(None)] * order.index(axis)

    def added(out: Array, entries: Array, positions: Array) -> Array:
        return out.at[(*before, positions)].add(entries.astype(out.dtype), mode="drop")

    def add(out: Array) -> Array:
        sharding = explicit(jax.typeof(out))
        run = added if sharding is None else automatic(added, sharding)
        return run(out, entries, term.positions())

    return add


def _of_slots(term: Rows, data: Factor, axis: Axis) -> Factor:
    """Returns of data what each slot's row is multiplied with."""
    picked = _at(data.array, term.positions(), data.axes.index(axis))
    return Factor(picked, tuple(RANK if n == axis else n for n in data.axes))


def _at(array: Array, positions: Array, axis: int) -> Array:
    """Returns what stands at positions along an axis, 0 past its end."""
    if not array.shape[axis]:  # an empty one, of which `jnp.take` takes nothing
        shape = tuple(len(positions) if i == axis else n for i, n in enumerate(array.shape))
        return jnp.zeros(shape, array.dtype)
    return jnp.take(array, positions, axis=axis, mode="fill", fill_value=0)
