"""A product of data with each term of a weight, summed: what all rules of products share."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra import logits_product
from flax_tied_lora._algebra.factor import (
    Factor,
    NotServedError,
    accumulator,
    operation_dtype,
    sum_of,
)
from flax_tied_lora._algebra.quantized import Quantized
from flax_tied_lora._algebra.rows import Rows
from flax_tied_lora._algebra.term import Dense, LowRank, Term
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._tree.sharding import placed_as, split, varying

# A part of the result, or a function that adds it to the others.
Part = Array | Callable[[Array], Array]


class Products(abc.ABC):
    """The products that an equation is, with each kind of term.

    What raises `NotServedError` has its term materialised instead; a delta has the whole weight so.
    """

    @abc.abstractmethod
    def dense(self, factor: Factor) -> Array:
        """Returns the product with an array over all of the weight's axes, as it is stored."""

    @abc.abstractmethod
    def low_rank(self, term: LowRank, data: Any, sharding: Any) -> Part:
        """Returns the product with a delta, with the sharding given if there is one."""

    def rows(self, term: Rows, data: Array) -> Part:
        """Returns the product with replaced rows."""
        raise NotServedError

    def quantized(self, term: Quantized, data: Array) -> Part:
        """Returns the product with a weight that is stored quantised."""
        raise NotServedError


def serve(
    context: Any, eqn: Any, weight: Weight, x: Any, terms: Sequence[Term], products: Products,
    scale: Array | None = None,
) -> Array:  # fmt: skip
    """Returns the sum over terms of a product with data, cast once to the equation's dtype.

    Args:
      x: the data; or another weight.
      scale: multiplied in before that cast.
    """
    aval, accumulate = eqn.outvars[0].aval, accumulator(eqn.outvars[0].aval.dtype)
    data = x
    if not isinstance(x, Weight):
        data = lax.convert_element_type(x, operation_dtype(x.dtype, weight.dtype))
    arrays: list[Array] = []
    adders: list[Callable[[Array], Array]] = []
    wide = False
    for term in terms:
        part = _part(context, eqn, weight, term, data, products, arrays)
        if callable(part):
            adders.append(part)
            wide |= isinstance(term, LowRank)
        else:
            arrays.append(part)
    if len(arrays) == 1 and arrays[0].dtype == aval.dtype and scale is None and not adders:
        return arrays[0]
    out = sum_of([lax.convert_element_type(p, accumulate) for p in arrays])
    for adder in adders:
        out = adder(out)
    if scale is not None:
        out *= placed_as(lax.convert_element_type(scale, accumulate), out)
    out = lax.convert_element_type(out, aval.dtype)
    return logits_product.kept(out) if wide else out


def _part(
    context: Any, eqn: Any, weight: Weight, term: Term, data: Any, products: Products,
    before: Sequence[Array],
) -> Part:  # fmt: skip
    """Returns the product with a term; with one that nothing else serves it is materialised."""
    if isinstance(term, LowRank):
        refuse_differentiated(context, term)
        if term.key is not None and not isinstance(data, Weight):
            data = dropped(term, data)
        return products.low_rank(term, data, split(before[0]) if before else None)
    if not isinstance(data, Weight):
        with contextlib.suppress(NotServedError):
            if isinstance(term, Rows):
                return products.rows(term, data)
            if isinstance(term, Quantized):
                return products.quantized(term, data)
    if not isinstance(term, Dense):
        context.materialises(eqn.primitive.name, weight, [term])
        term = Dense.of(term.dense(weight.shape, weight.dtype))
    return products.dense(term.factor.astype(weight.dtype))


def refuse_differentiated(context: Any, term: Term) -> None:
    """Refuses dropout in a differentiated program: its passes would draw different masks."""
    if not isinstance(term, LowRank) or term.key is None:
        return
    if "transpose(" in context.full_scope or "jvp(" in context.full_scope:
        raise ValueError(
            f"adapt: dropout is on, and {term.group!r} is read in a function that was "
            "differentiated before it was adapted, where each pass would draw masks of its own. "
            "Differentiate the adapted function instead, as in "
            "tied_lora.value_and_grad, or turn dropout off with adapted.eval()"
        )


def dropped(term: LowRank, x: Array) -> Array:
    """Returns data with dropout, on its way to a delta (``peft.tuners.lora.layer.Linear``)."""
    keep = 1.0 - term.dropout
    assert term.key is not None
    key = term.key
    for name in sorted(varying(x)):
        key = jax.random.fold_in(key, lax.axis_index(name))  # other data, another mask
    mask = jax.random.bernoulli(key, keep, x.shape)
    return lax.select(mask, x / jnp.array(keep, x.dtype), jnp.zeros_like(x))


def without_dropout(term: Term) -> Term:
    """Returns the term as it is where nothing is dropped."""
    return dataclasses.replace(term, key=None) if isinstance(term, LowRank) else term
