"""A product with a weight and its delta, as a model's kernels are served: two thin products more.

Few operations, in forms that XLA neither copies nor generates kernels for: what compiling
costs is the kernels that it generates.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from flax_tied_lora._algebra.factor import RANK, Factor, operation_dtype
from flax_tied_lora._algebra.for_cpu import joins_tokens, tokens_joined
from flax_tied_lora._algebra.product import Product
from flax_tied_lora._tree.sharding import vary, varying

_TOKENS = "tokens"


def fits(product: Product, first: Factor, second: Factor) -> bool:
    """Returns whether the delta varies along each axis of the result, and of the data."""
    made = {*product.hidden_axes(first, second), *second.axes} - {RANK}
    known = {*first.axes, *second.axes, *product.order}
    return made == {*product.order} and {*product.data} <= known


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static about a product with a weight that has a delta; hashable.

    Attributes:
      product: its description.
      operand: which operand of the product the weight is.
      dimensions, out_sharding: of the weight's `lax.dot_general`.
      weight, result: dtypes.
    """

    product: Product
    operand: int
    dimensions: Any
    out_sharding: Any
    weight: Any
    result: Any


@functools.partial(jax.jit, static_argnums=0, inline=True)
def served(
    form: Form, x: Array, array: Array, dropped: Array | None,
    first: Factor, second: Factor, scaling: Array,
) -> Array:  # fmt: skip
    """Returns a product with a weight plus that with its delta: one program for layers of a shape.

    All that depends on shapes and dtypes alone is in here, where it is done once.

    Args:
      x: what the weight is multiplied with.
      array: the weight.
      dropped: what the delta is multiplied with, if it is not that.
      first, second, scaling: of the delta.
    """
    product, accumulate = form.product, form.product.accumulate
    array = lax.convert_element_type(array, form.weight)
    base = lax.dot_general(
        *((x, array) if form.operand else (array, x)), form.dimensions, product.precision,
        accumulate, out_sharding=form.out_sharding,
    )  # fmt: skip
    data = x if dropped is None else dropped
    data = lax.convert_element_type(data, operation_dtype(data.dtype, form.weight))
    first, second = first.astype(data.dtype), second.astype(data.dtype)
    scaling = lax.convert_element_type(scaling, accumulate)
    out = added(product, base, data, first, second, scaling)
    return lax.convert_element_type(out, form.result)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def added(
    product: Product, base: Array, data: Array, first: Factor, second: Factor, scaling: Array
) -> Array:
    """Returns ``base + scaling * (data . first) . second``.

    The scaling is multiplied in where XLA fuses it into the sum; in derivatives where arrays are
    thin, so that none of the result's size is made for it.
    """
    hidden = product.hidden(Factor(data, product.data), first, second)
    return base + product.array(hidden.astype(second.array.dtype), second) * scaling


def _added_jvp(product: Product, primals: Any, tangents: Any) -> Any:
    base, data, first, second, scaling = primals
    base_dot, data_dot, first_dot, second_dot, scaling_dot = map(_tangent, tangents)
    product, data = _with_tokens_joined(product, data)
    shape = base.shape

    def thin(data: Array, first: Factor) -> Factor:
        return product.hidden(Factor(data, product.data), first, second)

    def whole(hidden: Factor, second: Factor) -> Array:
        return product.array(hidden.astype(second.array.dtype), second)

    hidden = thin(data, first)
    delta = whole(hidden, second)
    hidden_dot = _sum(
        None if first_dot is None else thin(data, first_dot).array,
        None if data_dot is None else thin(data_dot.reshape(data.shape), first).array,
    )
    if second_dot is not None:
        # Not by the scaling in the factor's dtype: rounded, it would be off alike in each entry.
        scaled = second_dot.astype(product.accumulate).array * scaling
        second_dot = Factor(scaled, second.axes).astype(second.array.dtype)
    delta_dot = _sum(
        None if hidden_dot is None else whole(Factor(hidden_dot * scaling, hidden.axes), second),
        None if second_dot is None else whole(hidden, second_dot),
        None if scaling_dot is None else delta * scaling_dot,
    )
    out = base + (delta * scaling).reshape(shape)
    out_dot = _sum(base_dot, None if delta_dot is None else delta_dot.reshape(shape))
    out_dot = lax.full_like(out, 0) if out_dot is None else out_dot
    return out, vary(out_dot, varying(out))


added.defjvp(_added_jvp, symbolic_zeros=True)


def _tangent(tangent: Any) -> Any:
    """Returns a tangent, or None where it is zero."""
    array = tangent.array if isinstance(tangent, Factor) else tangent
    return None if isinstance(array, SymbolicZero) else tangent


def _with_tokens_joined(product: Product, data: Array) -> tuple[Product, Array]:
    """Returns the product with one axis of tokens, and the data so."""
    tokens = tuple(a for a in product.data if isinstance(a, str))
    count, at = len(tokens), product.order.index(tokens[0]) if tokens else 0
    before, after = product.order[:at], product.order[at + count :]
    together = product.data[:count] == tokens == product.order[at : at + count]
    if not together or not joins_tokens(data, count):
        return product, data
    joined = dataclasses.replace(
        product, data=(_TOKENS, *product.data[count:]), order=(*before, _TOKENS, *after)
    )
    return joined, tokens_joined(data, count)


def _sum(*arrays: Array | None) -> Array | None:
    given = [x for x in arrays if x is not None]
    return functools.reduce(lax.add, given) if given else None
