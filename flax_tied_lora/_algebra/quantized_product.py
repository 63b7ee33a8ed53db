"""Products with a weight that is stored quantised, of which a chunk at a time is dequantised."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.factor import Axis, Factor, NotServedError, contract
from flax_tied_lora._algebra.for_cpu import waited_for
from flax_tied_lora._algebra.product import Product
from flax_tied_lora._algebra.quantized import Quantized
from flax_tied_lora._tree.open_sizes import is_open
from flax_tied_lora._tree.sharding import automatic, explicit

# A matrix is dequantised in 64 chunks, or fewer of this many entries (2 MiB of float32): a small
# part of a transformer's layer.
CHUNK, CHUNKS = 2**19, 64


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A product, the dtype of the weight in it, and where result and data are; hashable.

    Attributes:
      dtype: the weight's, in which it is multiplied.
      out_sharding, data_sharding: on Explicit mesh axes, else None.
    """

    product: Product
    dtype: Any
    out_sharding: Any
    data_sharding: Any

    def transposed(self) -> _Placed:
        """Returns the product that the gradient of the data is."""
        return _Placed(self.product.transposed(), self.dtype, self.data_sharding, self.out_sharding)


def product(
    term: Quantized, data: Array, product: Product, dtype: Any, out_sharding: Any = None
) -> Array:
    """Returns the product of data with a quantised weight, of which a chunk at a time is made.

    In reverse mode the weight is dequantised once more, so that no floating-point copy of it is
    kept; it has no gradient.

    Args:
      dtype: the weight's, in which it is multiplied.
      out_sharding: of the result on Explicit mesh axes, else None.

    Raises:
      NotServedError: the weight does not vary along one of its axes.
    """
    known = {*product.data, *term.values.axes}
    if {*product.order} - known or product.contracting - {*term.values.axes}:
        raise NotServedError
    placed = _Placed(product, dtype, out_sharding, explicit(jax.typeof(data)))
    return _product(placed, data, jax.tree.map(lax.stop_gradient, term))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(placed: _Placed, data: Array, term: Quantized) -> Array:
    whole = functools.partial(_whole, placed.product, placed.dtype)
    if placed.out_sharding is None:
        return whole(data, term)
    # Chunks are cut along axes that may be sharded.
    return automatic(whole, placed.out_sharding)(data, term)


def _whole(product: Product, dtype: Any, data: Array, term: Quantized) -> Array:
    x = Factor(data, product.data)
    sizes = [x.size(a) if a in x.axes else term.size(a) for a in product.order]

    def part(piece: Quantized, cut: Callable[[Factor], Factor]) -> Array:
        return _piece(product, dtype, cut(x), piece)

    return _by_chunks(term, part, product.order, sizes, product.accumulate)


def _by_chunks(
    term: Quantized, part: Callable[[Quantized, Callable[[Factor], Factor]], Array],
    order: Sequence[Axis], shape: Sequence[int], dtype: Any,
) -> Array:  # fmt: skip
    """Returns what is linear in a weight, or a sum over its entries, from a chunk at a time.

    Args:
      part: returns it for a piece of the weight; the function that it is given cuts the same piece
        out of another factor.
      order, shape: the axes of the result, and their sizes.
      dtype: of the result.
    """
    pieces = _pieces(term)
    if pieces is None:
        return part(term, lambda factor: factor)
    axis, runs = pieces
    out = jnp.zeros(shape, dtype)
    for start, size, count in runs:

        def step(out: Array, number: Any, start: int = start, size: int = size) -> Any:
            at = start + number * size

            def cut(factor: Factor) -> Factor:
                return _cut(factor, axis, at, size)

            made = part(term.each(cut), cut)
            if axis not in order:
                return out + made, None
            return lax.dynamic_update_slice_in_dim(out, made, at, list(order).index(axis)), None

        out, _ = lax.scan(step, out, jnp.arange(count))
    return out


def _pieces(term: Quantized) -> tuple[Axis, list[tuple[int, int, int]]] | None:
    """Returns an axis, and ``(start, size, count)`` of runs of chunks along it; None for whole.

    The axis is the longest that the blocks do not lie along. Of an open size there are no chunks.
    """
    sizes = [term.size(a) for a in term.values.axes]
    if any(map(is_open, sizes)):
        return None
    total = math.prod(sizes)
    free = [a for a in term.values.axes if a != term.axis]
    chunk = max(CHUNK, total // CHUNKS)
    if total <= chunk or not free:
        return None
    axis = max(free, key=term.size)
    length = term.size(axis)
    size = max(1, chunk * length // total)
    count, rest = divmod(length, size)
    return axis, [(0, size, count), *([(count * size, rest, 1)] if rest else [])]


def _cut(factor: Factor, axis: Axis, start: Any, size: int) -> Factor:
    if axis not in factor.axes:
        return factor
    array = lax.dynamic_slice_in_dim(factor.array, start, size, factor.axes.index(axis))
    return Factor(array, factor.axes)


@jax.custom_batching.custom_vmap
def _after(data: Array, values: Array) -> Array:
    """Returns integers that are not made before the data is.

    Else XLA would dequantise all matrices of a model ahead of time, and once for both passes, so
    that all of them are in memory at the same time.
    """

    def barrier(data: Array, values: Array) -> Array:
        return lax.optimization_barrier((data, values))[1]

    return lax.platform_dependent(data, values, cpu=waited_for, default=barrier)


@_after.def_vmap
def _(size: int, batched: Sequence[bool], data: Array, values: Array) -> tuple[Array, bool]:
    """The first example stands for all: integers that are shared stay shared."""
    if batched[0] and not batched[1]:
        return _after(data[0], values), False
    return jax.vmap(_after.__wrapped__, [0 if b else None for b in batched])(data, values), True


def _piece(product: Product, dtype: Any, x: Factor, term: Quantized) -> Array:
    if x.array.size:
        values = _after(x.array, term.values.array)
        term = dataclasses.replace(term, values=Factor(values, term.values.axes))
    weight = term.dequantised(dtype).astype(x.array.dtype)
    out = contract(
        x, weight, product.order, accumulate=product.accumulate, precision=product.precision
    )
    return out.ordered(product.order).array


def _forward(placed: _Placed, data: Array, term: Quantized) -> Any:
    return _product(placed, data, term), (term, jnp.zeros((), data.dtype))


def _backward(placed: _Placed, kept: Any, gradient: Array) -> Any:
    term, like = kept
    gradient = lax.convert_element_type(gradient, like.dtype)
    out: Any = _product(placed.transposed(), gradient, term)
    return lax.convert_element_type(out, like.dtype), None  # the weight has no gradient


_product.defvjp(_forward, _backward)


def squares(term: Quantized, keep: Sequence[Axis], accumulate: Any) -> Array:
    """Returns the sum of the weight's squares over all axes but ``keep``, in that order."""

    def part(piece: Quantized, cut: Any) -> Array:
        whole = piece.dequantised(accumulate)
        summed = [i for i, a in enumerate(whole.axes) if a not in keep]
        left = tuple(a for a in whole.axes if a in keep)
        return Factor(jnp.sum(jnp.square(whole.array), axis=summed), left).ordered(keep).array

    return _by_chunks(term, part, keep, [term.size(a) for a in keep], accumulate)
