"""Products with many matrices, or with a window of one: grouped products and convolutions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.factor import RANK, Factor, MixedAxesError, accumulator, contract
from flax_tied_lora._algebra.site_filter import PROJECTION
from flax_tied_lora._algebra.weight import LowRank, Weight
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._interpreter.rules.projection import serve


@rule("ragged_dot_general", "ragged_dot")
def ragged_dot(context, eqn, lhs, rhs, sizes, *offset):
    """Rows of data in groups, each group with a matrix of its own (mixtures of experts)."""
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (_, summed), (_, batch) = dims.dot_dimension_numbers
    groups = tuple(dims.rhs_group_dimensions)
    if (
        isinstance(lhs, Weight)
        or not isinstance(rhs, Weight)
        or batch
        or len(groups) != 1
        or offset
    ):
        return NotImplemented
    if rhs.scale is not None:
        rhs = rhs.folded()
    free = [i for i in range(len(rhs.shape)) if i not in (*summed, *groups)]
    terms = context.read(eqn.primitive.name, rhs, PROJECTION, rows=summed, cols=free, batch=groups)
    group, = groups  # fmt: skip
    accumulate = accumulator(eqn.outvars[0].aval.dtype)
    precision = eqn.params["precision"]

    def dense(factor: Factor) -> Array:
        array = factor.ordered(range(len(rhs.shape))).array
        kind = accumulate if len(terms) > 1 else eqn.params["preferred_element_type"]
        return lax.ragged_dot_general(lhs, array, sizes, dims, precision, kind)

    def low_rank(term: LowRank, data: Array, sharding: Any) -> Array:
        a, b = (term.a, term.b) if set(summed) <= set(term.a.axes) else (term.b, term.a)
        if set(a.axes) - {*summed, group, RANK} or set(b.axes) - {*free, group, RANK}:
            raise MixedAxesError
        order = [RANK if i == free[0] else i for i in range(len(rhs.shape)) if i not in free[1:]]
        hidden = _grouped(data, a, order, sizes, dims, accumulate, precision, rhs.shape)
        hidden = hidden * lax.convert_element_type(term.scaling, accumulate)
        # The rank axis is the last of the product, as the free axes were.
        rest = lax.convert_element_type(hidden, data.dtype)
        second = lax.RaggedDotDimensionNumbers(
            (([rest.ndim - 1], [1]), ([], [])), list(range(rest.ndim))[:1], [0]
        )
        return _grouped(
            rest, b, [group, RANK, *free], sizes, second, accumulate, precision, rhs.shape
        )

    if lhs.ndim != 2 or len(free) != 1:
        return NotImplemented
    return [serve(context, eqn, rhs, lhs, terms, dense, low_rank)]


def _grouped(
    x: Any,
    factor: Factor,
    order: Any,
    sizes: Any,
    dims: Any,
    accumulate: Any,
    precision: Any,
    whole: tuple[int, ...],
):
    """Returns a grouped product with a factor, repeated along the weight's axes that it lacks."""
    shape = [factor.size(a) if a in factor.axes else whole[a] for a in order]
    array = factor.astype(x.dtype).spread(order, shape)
    return lax.ragged_dot_general(x, array, sizes, dims, precision, accumulate)


@rule("conv_general_dilated")
def conv(context, eqn, lhs, rhs):
    """A convolution with the thin factor over the window, then a product over its channels."""
    p = eqn.params
    if isinstance(lhs, Weight) or not isinstance(rhs, Weight) or p["batch_group_count"] != 1:
        return NotImplemented
    rhs = rhs.folded()
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    out_axis, in_axis, *window = numbers.rhs_spec
    rows = tuple(sorted((in_axis, *window)))
    terms = context.read(eqn.primitive.name, rhs, PROJECTION, rows=rows, cols=(out_axis,))
    accumulate, aval = accumulator(eqn.outvars[0].aval.dtype), eqn.outvars[0].aval
    channel = numbers.out_spec[1]
    per_group = rhs.shape[out_axis] // groups

    def convolve(x: Array, kernel: Array, kind: Any) -> Array:
        return lax.conv_general_dilated(
            x, kernel, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"],
            numbers, groups, 1, p["precision"], kind,
        )  # fmt: skip

    def dense(factor: Factor) -> Array:
        array = factor.ordered(range(len(rhs.shape))).array
        if len(terms) == 1:
            return convolve(lhs, array, p["preferred_element_type"])
        return convolve(lhs, array, accumulate)

    def low_rank(term: LowRank, data: Array, sharding: Any) -> Array:
        a, b = (term.b, term.a) if out_axis in term.a.axes else (term.a, term.b)
        if out_axis in a.axes or set(b.axes) != {out_axis, RANK}:
            raise MixedAxesError
        rank = a.size(RANK)
        thin = a.astype(data.dtype).spread(
            [RANK if i == out_axis else i for i in range(len(rhs.shape))],
            [rank if i == out_axis else n for i, n in enumerate(rhs.shape)],
        )
        # Each group of channels has its own part of the columns, and all of the rank.
        thin = jnp.concatenate([thin] * groups, axis=out_axis)
        hidden = convolve(data, thin, accumulate)
        hidden *= lax.convert_element_type(term.scaling, accumulate)
        hidden = lax.convert_element_type(hidden, data.dtype)
        split = (*hidden.shape[:channel], groups, rank, *hidden.shape[channel + 1 :])
        names = tuple(f"x{i}" for i in range(hidden.ndim))
        labels = (*names[:channel], "group", RANK, *names[channel + 1 :])
        columns = b.ordered((RANK, out_axis)).astype(data.dtype).array
        far = Factor(columns.reshape(rank, groups, per_group), (RANK, "group", "column"))
        kept = (*labels[:channel], "group", "column", *labels[channel + 2 :])
        out = contract(
            Factor(hidden.reshape(split), labels), far, kept,
            accumulate=accumulate, precision=p["precision"],
        )  # fmt: skip
        order = (*names[:channel], "group", "column", *names[channel + 1 :])
        return out.ordered(order).array.reshape(aval.shape)

    return [serve(context, eqn, rhs, lhs, terms, dense, low_rank)]
