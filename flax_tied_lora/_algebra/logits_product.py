"""A product that is much wider than what it is made of, as a delta's logits: added in place.

The product of hidden states [tokens, r] and a factor [vocabulary, r] is a second array of the
logits' size if it is one product. Here it is added to the first without being made.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.factor import RANK, Axis, Factor, contract
from flax_tied_lora._tree.sharding import single, split

# A projection is wide from so many columns for each row on. Vocabularies are 40 to 170 times a
# model's width, the kernels of its layers 8 times at most.
WIDE = 16

# Up to this rank, and from so many tokens on, terms of rank one are cheaper than a product on TPU.
RANK_ONE, MANY = 16, 1024

# On the CPU: a product of so few tokens is small. A larger one is made of so many parts at least,
# or of so many that each has so many of the axis that is split.
FEW, PARTS, ALONG = 12, 8, 16


def is_wide(far: Factor, rows: int) -> bool:
    """Returns whether a factor has many more columns than the weight that it is of has rows."""
    return math.prod(far.size(a) for a in far.axes if a != RANK) >= WIDE * rows


def fits(hidden: Factor, far: Factor, order: Sequence[Axis], rows: int) -> bool:
    """Returns whether the product of two factors is a wide one, of a weight with so many rows."""
    own = [a for f in (hidden, far) for a in f.axes if a != RANK]
    if not is_wide(far, rows) or sorted(map(str, own)) != sorted(map(str, order)):
        return False
    return split(hidden.array) is None and split(far.array) is None


@dataclasses.dataclass(frozen=True)
class Form:
    """What is static about a product that is added to an array.

    Attributes:
      hidden, far: labels of the operands' axes; both have `RANK`.
      order: labels of the axes of the array that is added to.
      precision: as `lax.dot_general` has it.
    """

    hidden: tuple[Axis, ...]
    far: tuple[Axis, ...]
    order: tuple[Axis, ...]
    precision: Any

    @property
    def flat(self) -> bool:
        """Whether it is tokens times columns: the axes of one operand, then those of the other."""
        ends = self.hidden[-1] == RANK in (self.far[0], self.far[-1])
        return ends and self.order == (*self.hidden[:-1], *self.columns)

    @property
    def columns(self) -> tuple[Axis, ...]:
        return tuple(a for a in self.far if a != RANK)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def added(form: Form, base: Array, hidden: Array, far: Array) -> Array:
    """Returns ``base + hidden . far``, the product being over the rank axis.

    Measured, not guessed (docs/rules.md): on the CPU XLA fuses no product with an addition, and a
    loop that adds a part at a time is fastest; on TPU terms of rank one, if they are few and tokens
    many, become part of the product that made ``base``. Derivatives are plain products.

    On a mesh there is no loop: XLA decides by size which operand to exchange, and for a part of the
    tokens it would choose the logits.
    """
    rank = hidden.shape[form.hidden.index(RANK)]
    few = rank <= RANK_ONE and hidden.size >= MANY * rank
    default = rank_one if few else product_added
    cpu = by_parts if form.flat and single(base) else product_added
    cpu, default = functools.partial(cpu, form), functools.partial(default, form)
    return lax.platform_dependent(base, hidden, far, cpu=cpu, default=default)


@added.defjvp
def _added_jvp(form: Form, primals: Any, tangents: Any) -> Any:
    (base, hidden, far), (base_dot, hidden_dot, far_dot) = primals, tangents
    out_dot = base_dot + by_hidden(form, base.dtype, hidden_dot, far)
    return added(form, base, hidden, far), out_dot + by_far(form, base.dtype, hidden, far_dot)


@jax.custom_jvp
def kept(array: Array) -> Array:
    """Returns an array that is made once, where it is: not again in each operation that reads it.

    A loss slices the logits; XLA for the TPU slices both products instead, and so makes both.
    """
    return lax.optimization_barrier(array)


@kept.defjvp
def _kept_jvp(primals: Any, tangents: Any) -> Any:
    return kept(*primals), tangents[0]


def by_hidden(form: Form, dtype: Any, hidden: Array, far: Array) -> Array:
    """Returns ``hidden . far``, whose transpose by `hidden` copies nothing of its size."""
    full = functools.partial(_product, form, dtype)
    if not form.flat or hidden.ndim == 2:
        return full(hidden, far)

    def flat(hidden: Array, far: Array) -> Array:
        # XLA for the CPU transposes what is summed over two axes; over one it does not.
        tokens = Form(("tokens", RANK), form.far, ("tokens", *form.columns), form.precision)
        out = _product(tokens, dtype, hidden.reshape(-1, hidden.shape[-1]), far)
        return out.reshape(*hidden.shape[:-1], *out.shape[1:])

    return lax.platform_dependent(hidden, far, cpu=flat, default=full)


def by_far(form: Form, dtype: Any, hidden: Array, far: Array) -> Array:
    """Returns ``hidden . far``, whose transpose by `far` is a product that is fast on the CPU.

    It is [rank, tokens] . [tokens, columns], three times as fast as [columns, tokens] .
    [tokens, rank]: that one XLA does not give to its library of products.
    """
    full = functools.partial(_product, form, dtype)
    if not form.flat or math.prod(hidden.shape[:-1]) < FEW:
        return full(hidden, far)

    def ranks_first(hidden: Array, far: Array) -> Array:
        *tokens, rank = hidden.shape
        rows = lax.optimization_barrier(hidden.reshape(-1, rank).T)  # else it is folded in
        columns = _ranks_first(form, far)
        out = lax.dot_general(rows, columns, (((0,), (0,)), ((), ())), form.precision, dtype)
        return out.reshape(*tokens, *columns.shape[1:])

    return lax.platform_dependent(hidden, far, cpu=ranks_first, default=full)


def _ranks_first(form: Form, far: Array) -> Array:
    return lax.optimization_barrier(jnp.moveaxis(far, form.far.index(RANK), 0))


def _product(form: Form, dtype: Any, hidden: Array, far: Array) -> Array:
    return contract(
        Factor(hidden, form.hidden), Factor(far, form.far), form.order,
        accumulate=dtype, precision=form.precision,
    ).ordered(form.order).array  # fmt: skip


def product_added(form: Form, base: Array, hidden: Array, far: Array) -> Array:
    """Returns the sum by one product."""
    return base + _product(form, base.dtype, hidden, far)


def rank_one(form: Form, base: Array, hidden: Array, far: Array) -> Array:
    """Returns the sum by a term for each rank: elementwise, so XLA fuses it into what made base."""
    first, second = Factor(hidden, form.hidden), Factor(far, form.far)
    for k in range(first.size(RANK)):
        left, right = (
            Factor(
                lax.index_in_dim(f.array, k, f.axes.index(RANK), keepdims=False),
                tuple(a for a in f.axes if a != RANK),
            ).astype(base.dtype)
            for f in (first, second)
        )
        base += left.spread(form.order, base.shape) * right.spread(form.order, base.shape)
    return base


def by_parts(form: Form, base: Array, hidden: Array, far: Array) -> Array:
    """Returns the sum by products of a part of the tokens each, in place."""
    *tokens, rank = hidden.shape
    length = max(tokens, default=1)
    if length < FEW:
        return product_added(form, base, hidden, far)
    axis = max(i for i, n in enumerate(tokens) if n == length)
    least = max(PARTS, length // ALONG)
    parts = next(n for n in range(least, length + 1) if length % n == 0)
    split = (*tokens[:axis], length // parts, parts, *tokens[axis + 1 :])
    shape, base, hidden = base.shape, base.reshape(*split, -1), hidden.reshape(*split, rank)
    far = _ranks_first(form, far).reshape(rank, -1)
    summed = (((len(tokens) + 1,), (0,)), ((), ()))

    # Without what it takes to allow a negative index. An axis that is dropped would be in the way
    # of fusing what is read with what is written in its place.
    place = {"axis": axis + 1, "allow_negative_indices": False}

    def body(i: Any, base: Array) -> Array:
        own = lax.dynamic_index_in_dim(hidden, i, **place)
        own = lax.dot_general(own, far, summed, form.precision, base.dtype)
        own += lax.dynamic_index_in_dim(base, i, **place)
        return lax.dynamic_update_index_in_dim(base, own, i, **place)

    return lax.fori_loop(0, parts, body, base).reshape(shape)
