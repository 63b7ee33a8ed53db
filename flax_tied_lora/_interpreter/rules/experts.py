"""Products with many matrices, or with a window of one: grouped products and convolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.factor import RANK, Axis, Factor, NotServedError, accumulator, contract
from flax_tied_lora._algebra.site_filter import PROJECTION
from flax_tied_lora._algebra.term import LowRank
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._interpreter.rules.serving import Products, serve


@rule("ragged_dot_general", "ragged_dot")
def ragged_dot(context, eqn, lhs, rhs, sizes, *offset):
    """Rows of data in groups, each group with a matrix (mixtures of experts)."""
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = dims.dot_dimension_numbers
    groups = tuple(dims.rhs_group_dimensions)
    if isinstance(lhs, Weight) or batch or len(groups) != 1 or offset:
        raise NotServedError
    rhs = rhs.folded()
    free = [i for i in range(len(rhs.shape)) if i not in (*contracting, *groups)]
    if lhs.ndim != 2 or len(free) != 1:
        raise NotServedError
    terms = context.read(
        eqn.primitive.name, rhs, PROJECTION, rows=contracting, cols=free, batch=groups
    )
    products = _Grouped(
        eqn, rhs, lhs, sizes, contracting, groups[0], free[0], alone=len(terms) == 1
    )
    return [serve(context, eqn, rhs, lhs, terms, products)]


@dataclasses.dataclass
class _Grouped(Products):
    """Products of rows of data in groups, each group with a matrix.

    Attributes:
      eqn: the equation.
      weight: [groups, rows, columns], in any order of axes.
      data: [tokens, rows].
      sizes: of the groups.
      contracting, group, free: axes of the weight.
      alone: whether a term's product is all of the result.
    """

    eqn: Any
    weight: Weight
    data: Array
    sizes: Array
    contracting: Sequence[int]
    group: int
    free: int
    alone: bool

    @property
    def accumulate(self) -> Any:
        return accumulator(self.eqn.outvars[0].aval.dtype)

    def dense(self, factor: Factor) -> Array:
        p = self.eqn.params
        array = factor.ordered(range(len(self.weight.shape))).array
        kind = p["preferred_element_type"] if self.alone else self.accumulate
        dims = p["ragged_dot_dimension_numbers"]
        return lax.ragged_dot_general(self.data, array, self.sizes, dims, p["precision"], kind)

    def low_rank(self, term: LowRank, data: Array, sharding: Any) -> Array:
        rows, group, free = {*self.contracting}, self.group, self.free
        first, second = (term.a, term.b) if rows <= {*term.a.axes} else (term.b, term.a)
        if {*first.axes} - {*rows, group, RANK} or {*second.axes} - {free, group, RANK}:
            raise NotServedError
        order = [RANK if i == free else i for i in range(len(self.weight.shape))]
        dims = self.eqn.params["ragged_dot_dimension_numbers"]
        hidden = self._product(data, first, order, dims)
        hidden = hidden * lax.convert_element_type(term.scaling, self.accumulate)
        # The rank axis is the last of the product, as the free axis was.
        hidden = lax.convert_element_type(hidden, data.dtype)
        over_rank = lax.RaggedDotDimensionNumbers((([1], [1]), ([], [])), [0], [0])
        return self._product(hidden, second, [group, RANK, free], over_rank)

    def _product(self, data: Array, factor: Factor, order: Sequence[Axis], dims: Any) -> Array:
        """Returns a grouped product with a factor, repeated along the axes that it lacks."""
        shape = [factor.size(a) if a in factor.axes else self.weight.shape[a] for a in order]
        array = factor.astype(data.dtype).spread(order, shape)
        precision = self.eqn.params["precision"]
        return lax.ragged_dot_general(data, array, self.sizes, dims, precision, self.accumulate)


@rule("conv_general_dilated")
def conv(context, eqn, lhs, rhs):
    """A convolution with the thin factor over the window, then a product over its channels."""
    if isinstance(lhs, Weight) or eqn.params["batch_group_count"] != 1:
        raise NotServedError
    rhs = rhs.folded()
    out_axis, in_axis, *window = eqn.params["dimension_numbers"].rhs_spec
    rows = tuple(sorted((in_axis, *window)))
    terms = context.read(eqn.primitive.name, rhs, PROJECTION, rows=rows, cols=(out_axis,))
    products = _Convolutions(eqn, rhs, lhs, out_axis, len(terms) == 1)
    return [serve(context, eqn, rhs, lhs, terms, products)]


@dataclasses.dataclass
class _Convolutions(Products):
    """Convolutions of data with a kernel.

    Attributes:
      eqn: the equation.
      weight: the kernel.
      data: what it is convolved with.
      out_axis: the kernel's axis of output channels.
      alone: whether a term's product is all of the result.
    """

    eqn: Any
    weight: Weight
    data: Array
    out_axis: int
    alone: bool

    def dense(self, factor: Factor) -> Array:
        aval = self.eqn.outvars[0].aval
        array = factor.ordered(range(len(self.weight.shape))).array
        if self.alone:
            return self._convolved(self.data, array, self.eqn.params["preferred_element_type"])
        return self._convolved(self.data, array, accumulator(aval.dtype))

    def low_rank(self, term: LowRank, data: Array, sharding: Any) -> Array:
        aval, accumulate = self.eqn.outvars[0].aval, accumulator(self.eqn.outvars[0].aval.dtype)
        groups = self.eqn.params["feature_group_count"]
        out_axis, shape = self.out_axis, self.weight.shape
        first, second = (term.b, term.a) if out_axis in term.a.axes else (term.a, term.b)
        if out_axis in first.axes or {*second.axes} != {out_axis, RANK}:
            raise NotServedError
        rank = first.size(RANK)
        thin = first.astype(data.dtype).spread(
            [RANK if i == out_axis else i for i in range(len(shape))],
            [rank if i == out_axis else n for i, n in enumerate(shape)],
        )
        # Each group of channels has its part of the columns, and all of the rank.
        thin = jnp.concatenate([thin] * groups, axis=out_axis)
        hidden = self._convolved(data, thin, accumulate)
        hidden *= lax.convert_element_type(term.scaling, accumulate)
        hidden = lax.convert_element_type(hidden, data.dtype)

        channel = self.eqn.params["dimension_numbers"].out_spec[1]
        labels = [f"x{i}" for i in range(hidden.ndim)]
        before, after = labels[:channel], labels[channel + 1 :]
        split = (*hidden.shape[:channel], groups, rank, *hidden.shape[channel + 1 :])
        columns = second.ordered((RANK, out_axis)).astype(data.dtype).array
        out = contract(
            Factor(hidden.reshape(split), (*before, "group", RANK, *after)),
            Factor(columns.reshape(rank, groups, -1), (RANK, "group", "column")),
            (*before, "group", "column", *after),
            accumulate=accumulate, precision=self.eqn.params["precision"],
        )  # fmt: skip
        return out.ordered((*before, "group", "column", *after)).array.reshape(aval.shape)

    def _convolved(self, x: Array, kernel: Array, dtype: Any) -> Array:
        p = self.eqn.params
        return lax.conv_general_dilated(
            x, kernel, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"],
            p["dimension_numbers"], p["feature_group_count"], 1, p["precision"], dtype,
        )  # fmt: skip
