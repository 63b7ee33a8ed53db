"""Workarounds for XLA on the CPU.

Each has a test (`tests/test_for_cpu.py`) that fails on the day XLA does it by itself: it can go.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._tree.open_sizes import is_open, numbers
from flax_tied_lora._tree.sharding import single

# A product of so few tokens is small. A larger one is added in so many parts at least, or in so
# many that each has so many of the axis that is split.
FEW, PARTS, ALONG = 12, 8, 16

# Rows of an array that a function is computed of at the same time.
ROWS = 8


def joins_tokens(array: Array, count: int) -> bool:
    """Returns whether the first axes of an array, its tokens, are to be one axis in a product.

    A gradient of a factor is summed over tokens. XLA for the CPU makes a copy of what is summed
    over two axes; over one it does not. Left as they are where a mesh may split them.
    """
    return sum(n != 1 for n in array.shape[:count]) > 1 and single(array)


def tokens_joined(array: Array, count: int) -> Array:
    """Returns an array with its first axes as one."""
    return array.reshape(-1, *array.shape[count:])


def rank_first(array: Array, rank: int) -> Array:
    """Returns an array with its rank axis moved to the front, in memory too.

    XLA for the CPU gives [rank, tokens] . [tokens, columns] to its library of products, and not
    [columns, tokens] . [tokens, rank], which takes three times as long.
    """
    return lax.optimization_barrier(jnp.moveaxis(array, rank, 0))  # else it is folded in


def added_by_parts(base: Array, hidden: Array, columns: Array, precision: Any) -> Array:
    """Returns ``base + hidden . columns``, in the memory of ``base``: a part of the tokens each.

    XLA for the CPU fuses no product with an addition, so that an array of the result's size would
    be made. A loop adds a part at a time, in place.

    Args:
      base: [tokens..., columns...], with an axis of tokens whose size is a number.
      hidden: [tokens..., rank].
      columns: [rank, columns...].
    """
    *tokens, rank = hidden.shape
    length = max(numbers(tokens))
    axis = max(i for i, n in enumerate(tokens) if n == length)
    least = max(PARTS, length // ALONG)
    parts = next(n for n in range(least, length + 1) if length % n == 0)
    split = (*tokens[:axis], length // parts, parts, *tokens[axis + 1 :])
    shape, base, hidden = base.shape, base.reshape(*split, -1), hidden.reshape(*split, rank)
    columns = columns.reshape(rank, -1)
    contracting = (((len(tokens) + 1,), (0,)), ((), ()))

    # Without what it takes to allow a negative index. An axis that is dropped would be in the way
    # of fusing what is read with what is written in its place.
    place = {"axis": axis + 1, "allow_negative_indices": False}

    def body(i: Any, base: Array) -> Array:
        part = lax.dynamic_index_in_dim(hidden, i, **place)
        part = lax.dot_general(part, columns, contracting, precision, base.dtype)
        part += lax.dynamic_index_in_dim(base, i, **place)
        return lax.dynamic_update_index_in_dim(base, part, i, **place)

    return lax.fori_loop(0, parts, body, base).reshape(shape)


def waited_for(data: Array, values: Array) -> Array:
    """Returns integers that are not made before the data is.

    XLA for the CPU drops optimisation barriers before it looks for common subexpressions. What is
    added to the integers is 0, whatever the data's first entry is.
    """
    first = lax.slice(data, [0] * data.ndim, [1] * data.ndim).reshape(())
    return values + lax.convert_element_type((first != first) & (first == first), values.dtype)


def by_rows(function: Callable[..., Array], array: Array, *beside: Array) -> Array:
    """Returns a function of an array's rows, [rows, columns], and of what is beside each of them.

    The result has the array's memory, if nothing reads that later. XLA for the CPU does not see to
    it where the array is a loop's; a loop over a few rows at a time does.
    """
    rows = array.shape[0]
    if is_open(rows) or not single(array):
        return function(array, *beside)
    size = next((n for n in range(min(rows, ROWS), 0, -1) if rows % n == 0), rows)
    if size == rows:
        return function(array, *beside)

    def in_place(array: Array, *beside: Array) -> Array:
        def body(i: Any, array: Array) -> Array:
            take = functools.partial(lax.dynamic_slice_in_dim, allow_negative_indices=False)
            few = [take(x, i * size, size) for x in (array, *beside)]
            put = lax.dynamic_update_slice_in_dim
            return put(array, function(*few), i * size, 0, allow_negative_indices=False)

        return lax.fori_loop(0, rows // size, body, array)

    return lax.platform_dependent(array, *beside, cpu=in_place, default=function)


def at_places(values: Array, places: Array) -> Array:
    """Returns of each row, [rows, columns], the entry at its place; 0 where that is in no column.

    Not the sum of ``where(column == place, values, 0)``: XLA for the CPU makes an array of the
    size of ``values`` for it.
    """
    inside = (places >= 0) & (places < values.shape[-1])
    out = jnp.take_along_axis(values, places[:, None], axis=-1, mode="clip")[:, 0]
    return jnp.where(inside, out, 0)
