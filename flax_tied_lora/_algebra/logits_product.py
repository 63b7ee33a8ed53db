"""A product that is much wider than what it is made of, as a delta's logits: added in place.

The product of hidden states [tokens, r] and a factor [vocabulary, r] is a second array of the
logits' size if it is one product. Here it is added to the first without being made.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import Array, lax

from flax_tied_lora._algebra.factor import RANK, Factor
from flax_tied_lora._algebra.for_cpu import FEW, added_by_parts, rank_first, tokens_joined
from flax_tied_lora._algebra.product import Product, columns
from flax_tied_lora._tree.open_sizes import numbers, supposed
from flax_tied_lora._tree.sharding import single, split

# A projection is wide from so many columns for each row on. Vocabularies are 40 to 170 times a
# model's width, the kernels of its layers 8 times at most.
WIDE = 16

# Up to this rank, and from so many tokens on, terms of rank one are cheaper than a product on TPU.
RANK_ONE, MANY = 16, 1024


def is_wide(second: Factor, rows: int) -> bool:
    """Returns whether a factor has many more columns than the weight that it is of has rows."""
    return supposed(*map(second.size, columns(second))) >= WIDE * rows


def fits(product: Product, hidden: Factor, second: Factor, rows: int) -> bool:
    """Returns whether the product of two factors is a wide one, of a weight with so many rows."""
    axes = (*columns(hidden), *columns(second))
    if not is_wide(second, rows) or sorted(map(str, axes)) != sorted(map(str, product.order)):
        return False
    return split(hidden.array) is None and split(second.array) is None


def is_flat(product: Product, hidden: Factor, second: Factor) -> bool:
    """Returns whether it is tokens times columns: axes of one operand, then those of the other."""
    at_an_end = hidden.axes[-1] == RANK in (second.axes[0], second.axes[-1])
    return at_an_end and product.order == (*hidden.axes[:-1], *columns(second))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def added(product: Product, base: Array, hidden: Factor, second: Factor) -> Array:
    """Returns ``base + hidden . second``, the product being over the rank axis.

    Measured, not guessed (docs/rules.md): on the CPU a loop that adds a part at a time is fastest;
    on TPU terms of rank one, if they are few and tokens many, become part of the product that made
    ``base``. Derivatives are plain products.

    On a mesh there is no loop: XLA decides by size which operand to exchange, and for a part of the
    tokens it would choose the logits.
    """
    rank = hidden.size(RANK)
    few = rank <= RANK_ONE and supposed(*hidden.array.shape) >= MANY * rank
    default = rank_one if few else product_added
    cpu = by_parts if is_flat(product, hidden, second) and single(base) else product_added
    cpu, default = functools.partial(cpu, product), functools.partial(default, product)
    return lax.platform_dependent(base, hidden, second, cpu=cpu, default=default)


@added.defjvp
def _added_jvp(product: Product, primals: Any, tangents: Any) -> Any:
    (base, hidden, second), (base_dot, hidden_dot, second_dot) = primals, tangents
    out_dot = base_dot + by_hidden(product, hidden_dot, second)
    return added(product, base, hidden, second), out_dot + by_second(product, hidden, second_dot)


@jax.custom_jvp
def kept(array: Array) -> Array:
    """Returns an array that is made once, where it is: not again in each operation that reads it.

    A loss slices the logits; XLA for the TPU slices both products instead, and so makes both.
    """
    return lax.optimization_barrier(array)


@kept.defjvp
def _kept_jvp(primals: Any, tangents: Any) -> Any:
    return kept(*primals), tangents[0]


def by_hidden(product: Product, hidden: Factor, second: Factor) -> Array:
    """Returns ``hidden . second``, whose transpose by ``hidden`` copies nothing of its size."""
    if not is_flat(product, hidden, second) or len(hidden.axes) == 2:
        return product.array(hidden, second)

    def joined(hidden: Factor, second: Factor) -> Array:
        *tokens, _ = hidden.array.shape
        flat = dataclasses.replace(product, order=("tokens", *columns(second)))
        rows = Factor(tokens_joined(hidden.array, len(tokens)), ("tokens", RANK))
        out = flat.array(rows, second)
        return out.reshape(*tokens, *out.shape[1:])

    return lax.platform_dependent(hidden, second, cpu=joined, default=product.array)


def by_second(product: Product, hidden: Factor, second: Factor) -> Array:
    """Returns ``hidden . second``, whose transpose by ``second`` is a product fast on the CPU."""
    *tokens, _ = hidden.array.shape
    if not is_flat(product, hidden, second) or supposed(*tokens) < FEW:
        return product.array(hidden, second)

    def ranks_first(hidden: Factor, second: Factor) -> Array:
        rows = rank_first(tokens_joined(hidden.array, len(tokens)), 1)
        cols = rank_first(second.array, second.axes.index(RANK))
        over_rank = (((0,), (0,)), ((), ()))
        out = lax.dot_general(rows, cols, over_rank, product.precision, product.accumulate)
        return out.reshape(*tokens, *cols.shape[1:])

    return lax.platform_dependent(hidden, second, cpu=ranks_first, default=product.array)


def product_added(product: Product, base: Array, hidden: Factor, second: Factor) -> Array:
    """Returns the sum by one product."""
    return base + product.array(hidden, second)


def rank_one(product: Product, base: Array, hidden: Factor, second: Factor) -> Array:
    """Returns the sum by a term for each rank: elementwise, so XLA fuses it into what made base."""

    def at_rank(factor: Factor, k: int) -> Array:
        array = lax.index_in_dim(factor.array, k, factor.axes.index(RANK), keepdims=False)
        part = Factor(array, columns(factor)).astype(base.dtype)
        return part.spread(product.order, base.shape)

    for k in range(hidden.size(RANK)):
        base += at_rank(hidden, k) * at_rank(second, k)
    return base


def by_parts(product: Product, base: Array, hidden: Factor, second: Factor) -> Array:
    """Returns the sum by products of a part of the tokens each, in place."""
    *tokens, _ = hidden.array.shape
    if max(numbers(tokens), default=1) < FEW:
        return product_added(product, base, hidden, second)
    cols = rank_first(second.array, second.axes.index(RANK))
    return added_by_parts(base, hidden.array, cols, product.precision)
