"""Products with a weight that is stored quantised, of which a chunk at a time is dequantised."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from flax_tied_lora._algebra.factor import Axis, Factor, MixedAxesError, contract
from flax_tied_lora._algebra.quantized import Quantized
from flax_tied_lora._tree.sharding import automatic, explicit

# A matrix is dequantised in 64 chunks, or fewer of this many entries (2 MiB of float32): a small
# part of a transformer's layer.
CHUNK, CHUNKS = 2**19, 64


@dataclasses.dataclass(frozen=True)
class _Product:
    """What a product is beside its operands: labels, dtypes and precision; hashable."""

    names: tuple[Axis, ...]
    order: tuple[Axis, ...]
    dtype: Any
    accumulate: Any
    precision: Any
    out_sharding: Any = None  # of the result, and of the data: on Explicit mesh axes
    data_sharding: Any = None

    def turned(self) -> _Product:
        """Returns the product that the gradient of the data is."""
        return dataclasses.replace(
            self, names=self.order, order=self.names, out_sharding=self.data_sharding,
            data_sharding=self.out_sharding,
        )  # fmt: skip


def product(
    term: Quantized, data: Array, names: Sequence[Axis], order: Sequence[Axis], *,
    dtype: Any, accumulate: Any, precision: Any = None, out_sharding: Any = None,
) -> Array:  # fmt: skip
    """Returns the product of data with a quantised weight, of which a chunk at a time is made.

    In reverse mode the weight is dequantised once more, so that no floating-point copy of it is
    kept; it has no gradient of its own.

    Args:
      names: a label for each axis of the data: the weight axis that it is paired with, or its own.
      order: the labels of the result's axes.
      dtype: the weight's, in which it is multiplied.
      out_sharding: of the result on Explicit mesh axes, else None.

    Raises:
      MixedAxesError: the weight does not vary along one of its axes.
    """
    if set(order) - {*names, *term.values.axes}:
        raise MixedAxesError
    lone = tuple(i for i, n in enumerate(names) if n not in (*term.values.axes, *order))
    if lone:
        raise MixedAxesError
    what = _Product(
        tuple(names), tuple(order), dtype, accumulate, precision, out_sharding,
        explicit(jax.typeof(data)),
    )  # fmt: skip
    return _product(what, data, jax.tree.map(lax.stop_gradient, term))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(what: _Product, data: Array, term: Quantized) -> Array:
    if what.out_sharding is None:
        return _whole(what, data, term)
    # Chunks are cut along axes that may be sharded.
    return automatic(functools.partial(_whole, what), what.out_sharding)(data, term)


def _whole(what: _Product, data: Array, term: Quantized) -> Array:
    x = Factor(data, what.names)
    sizes = {a: x.size(a) if a in x.axes else term.size(a) for a in what.order}

    def part(piece: Quantized, cut: Callable[[Factor], Factor]) -> Array:
        return _piece(what, cut(x), piece)

    return _by_chunks(term, part, what.order, [sizes[a] for a in what.order], what.accumulate)


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

            found = part(term.each(cut), cut)
            if axis not in order:
                return out + found, None
            return lax.dynamic_update_slice_in_dim(out, found, at, list(order).index(axis)), None

        out, _ = lax.scan(step, out, jnp.arange(count))
    return out


def _pieces(term: Quantized) -> tuple[Axis, list[tuple[int, int, int]]] | None:
    """Returns an axis, and ``(start, size, count)`` of runs of chunks along it; None for whole.

    The axis is the longest that the blocks do not lie along.
    """
    total = math.prod(map(term.size, term.values.axes))
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
    own = factor.axes.index(axis)
    return Factor(lax.dynamic_slice_in_dim(factor.array, start, size, own), factor.axes)


@jax.custom_batching.custom_vmap
def _after(data: Array, values: Array) -> Array:
    """Returns integers that are not there before the data is.

    Else XLA would dequantise all matrices of a model ahead of time, and once for both passes, so
    that they are all there at the same time.
    """

    def wait(data: Array, values: Array) -> Array:
        # XLA for the CPU drops barriers too early. This is 0, whatever the first entry is.
        first = lax.slice(data, [0] * data.ndim, [1] * data.ndim).reshape(())
        return values + lax.convert_element_type((first != first) & (first == first), values.dtype)

    def barrier(data: Array, values: Array) -> Array:
        return lax.optimization_barrier((data, values))[1]

    return lax.platform_dependent(data, values, cpu=wait, default=barrier)


@_after.def_vmap
def _(size: int, batched: Sequence[bool], data: Array, values: Array) -> tuple[Array, bool]:
    """The first example stands for all: integers that are shared stay shared."""
    if batched[0] and not batched[1]:
        return _after(data[0], values), False
    return jax.vmap(_after.__wrapped__, [0 if b else None for b in batched])(data, values), True


def _piece(what: _Product, x: Factor, term: Quantized) -> Array:
    if x.array.size:
        values = _after(x.array, term.values.array)
        term = dataclasses.replace(term, values=Factor(values, term.values.axes))
    weight = term.added_up(what.dtype).astype(x.array.dtype)
    options: dict[str, Any] = {"accumulate": what.accumulate, "precision": what.precision}
    return contract(x, weight, what.order, **options).ordered(what.order).array


def _forward(what: _Product, data: Array, term: Quantized) -> Any:
    return _product(what, data, term), (term, jnp.zeros((), data.dtype))


def _backward(what: _Product, kept: Any, gradient: Array) -> Any:
    term, like = kept
    turned = what.turned()
    out: Any = _product(turned, lax.convert_element_type(gradient, like.dtype), term)
    none = jax.tree.map(_no_gradient, term)
    return lax.convert_element_type(out, like.dtype), none


def _no_gradient(array: Array) -> Any:
    if jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.zeros_like(array)
    return np.zeros(array.shape, jax.dtypes.float0)


_product.defvjp(_forward, _backward)


def squares(term: Quantized, keep: Sequence[Axis], accumulate: Any) -> Array:
    """Returns the sum of the weight's squares over all axes but ``keep``, in that order."""

    def part(piece: Quantized, cut: Any) -> Array:
        own = piece.added_up(accumulate)
        gone = [i for i, a in enumerate(own.axes) if a not in keep]
        left = tuple(a for a in own.axes if a in keep)
        return Factor(jnp.sum(jnp.square(own.array), axis=gone), left).ordered(keep).array

    return _by_chunks(term, part, keep, [term.size(a) for a in keep], accumulate)
