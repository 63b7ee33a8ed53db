"""A product of data with a delta, and the one place that chooses its form.

| form | where | module |
|---|---|---|
| one function with the weight's product | beside one array, as kernels are | `kernel_product.py` |
| added in place | much wider than what it is made of, as logits are | `logits_product.py` |
| two products | everywhere else | here |

A weight that is stored quantised has one form only (`quantized_product.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra import kernel_product, logits_product
from flax_tied_lora._algebra.factor import (
    RANK,
    Axis,
    Factor,
    NotServedError,
    contract,
    sum_of,
    times_chain,
)
from flax_tied_lora._algebra.product import Product
from flax_tied_lora._algebra.term import Dense, LowRank, Term
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._tree.sharding import split


def factors_of(product: Product, x: Factor, term: LowRank) -> tuple[Factor, Factor]:
    """Returns a delta's factors in the order in which data meets them: the cheaper one."""
    first = times_chain(x, term.a, term.b, product.order)
    return (term.a, term.b) if first else (term.b, term.a)


def beside_one_array(
    product: Product, data: Array, terms: Sequence[Term], rows: int
) -> tuple[Dense, LowRank, Factor, Factor] | None:
    """Returns an array and a delta if they are all terms, and one function serves both.

    Args:
      rows: how many rows of the weight are summed over.

    Returns:
      The array, the delta, and its factors in the order in which data meets them; or None.
    """
    if len(terms) != 2:
        return None
    dense, term = terms
    if not isinstance(dense, Dense) or not isinstance(term, LowRank):
        return None
    a, b = term.a, term.b
    arrays = (data, dense.factor.array, a.array, b.array)
    swapped = _swapped(product, rows, data.shape, (a.array.shape, a.axes), (b.array.shape, b.axes))
    if swapped is None or any(split(array) is not None for array in arrays):
        return None
    return (dense, term, b, a) if swapped else (dense, term, a, b)


# Layers of one shape are decided on once.
@functools.lru_cache(maxsize=1024)
def _swapped(
    product: Product, rows: int, data: tuple[int, ...], a: tuple[Any, Any], b: tuple[Any, Any]
) -> bool | None:
    """Returns whether data meets a delta's second factor first; None if no function serves both.

    Args:
      data: shape of the data.
      a, b: shape and axes of each factor.
    """
    x, one, other = (
        Factor(jax.ShapeDtypeStruct(shape, product.accumulate), axes)
        for shape, axes in ((data, product.data), a, b)
    )
    swapped = not times_chain(x, one, other, product.order)
    first, second = (other, one) if swapped else (one, other)
    if logits_product.is_wide(second, rows) or not kernel_product.fits(product, first, second):
        return None
    return swapped


def of_data(
    product: Product, data: Array, term: LowRank, shape: Sequence[int], *,
    rows: int, alone: bool, out_sharding: Any,
) -> Array | Callable[[Array], Array]:  # fmt: skip
    """Returns the product of data with a delta, or a function that adds it to an array in place.

    Args:
      shape: of the result.
      rows: how many rows of the weight are summed over.
      alone: whether it is the only term.
      out_sharding: of the result, or None.
    """
    hidden, second = _halfway(product, data, term)
    if not alone and logits_product.fits(product, hidden, second, rows):

        def added(base: Array) -> Array:
            in_its_dtype = dataclasses.replace(product, accumulate=base.dtype)
            return logits_product.added(in_its_dtype, base, hidden, second)

        return added
    return _second(product, hidden, second, out_sharding).spread(product.order, shape)


def _halfway(product: Product, data: Array, term: LowRank) -> tuple[Factor, Factor]:
    """Returns the scaled product of data with one factor of a delta, and the other factor."""
    # An axis that neither factor has is one along which the delta is constant.
    known = {*term.a.axes, *term.b.axes, *product.order}
    lone = tuple(i for i, a in enumerate(product.data) if a not in known)
    if lone:
        total = jnp.sum(lax.convert_element_type(data, product.accumulate), axis=lone)
        data = lax.convert_element_type(total, data.dtype)
    x = Factor(data, tuple(a for a in product.data if a in known))
    return _first(product, x, *factors_of(product, x, term), term.scaling)


# Traced and linearised once for all layers of a shape, as the function of a kernel and its delta
# is. Inlined, so the program is as without.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _first(
    product: Product, x: Factor, first: Factor, second: Factor, scaling: Array
) -> tuple[Factor, Factor]:
    dtype = x.array.dtype
    first, second = first.astype(dtype), second.astype(dtype)
    hidden = product.hidden(x, first, second)
    scaled = hidden.array * lax.convert_element_type(scaling, product.accumulate)
    return Factor(scaled, hidden.axes).astype(dtype), second


@functools.partial(jax.jit, static_argnums=(0, 3), inline=True)
def _second(product: Product, hidden: Factor, second: Factor, out_sharding: Any) -> Factor:
    return product.result(hidden, second, out_sharding)


def of_weight(product: Product, weight: Weight, term: LowRank, shape: tuple[int, ...]) -> Array:
    """Returns the product of another weight with a delta, first with the factor that shares axes.

    Raises:
      NotServedError: it is summed over an axis along which one of the two is constant.
    """
    labels = product.data
    first, second = (term.a, term.b) if {*labels} & {*term.a.axes} else (term.b, term.a)
    parts = []
    for part in weight.folded().terms:
        varying = set(labels)
        if isinstance(part, LowRank):
            varying = {labels[a] for f in (part.a, part.b) for a in f.axes if a != RANK}
        if not product.contracting <= varying & {*first.axes, *second.axes}:
            raise NotServedError
        if isinstance(part, LowRank):
            one, other = (_of_other(f, labels) for f in (part.a, part.b))
            if not {*one.axes} & {*first.axes}:
                one, other = other, one
            chain, scaling = [one, first, other, second], part.scaling * term.scaling
        else:
            array = part.dense(weight.shape, weight.dtype)
            chain, scaling = [Factor(array, labels), first, second], term.scaling
        out = _chained(product, chain)
        scaling = lax.convert_element_type(scaling, product.accumulate)
        parts.append(Factor(out.array * scaling, out.axes).spread(product.order, shape))
    return sum_of(parts)


def _of_other(factor: Factor, labels: Sequence[Axis]) -> Factor:
    """Returns a factor of another weight, whose axes are labelled as data's are."""
    axes = tuple("rank of x" if a == RANK else labels[a] for a in factor.axes)
    return Factor(factor.array, axes)


def _chained(product: Product, factors: Sequence[Factor]) -> Factor:
    """Returns the product of factors from the left to the right."""
    out, *others = (f.astype(product.accumulate) for f in factors)
    for i, factor in enumerate(others, 1):
        later = {a for f in others[i:] for a in f.axes}
        out = contract(
            out, factor, {*product.order, *later},
            accumulate=product.accumulate, precision=product.precision,
        )  # fmt: skip
    return out
