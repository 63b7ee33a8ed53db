"""DoRA (arXiv:2402.09353): the scale of a weight that a magnitude and its columns' norms make."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_tied_lora._algebra.factor import RANK, Factor, accumulator, contract
from flax_tied_lora._algebra.product import Product
from flax_tied_lora._algebra.quantized import Quantized
from flax_tied_lora._algebra.quantized_product import product, squares
from flax_tied_lora._algebra.term import LowRank, Term
from flax_tied_lora._planning.plan import MAGNITUDE, GroupPlan
from flax_tied_lora._tree.boxes import unboxed
from flax_tied_lora._tree.quantized_array import is_quantized
from flax_tied_lora._tree.sharding import automatic, explicit


def scale(array: Any, delta: Term, arrays: Mapping[str, Any], group: GroupPlan) -> Factor:
    """Returns DoRA's scale: the magnitude over the norm of each column of weight and delta.

    The norm is a constant to differentiation (section 4.3; PEFT's ``DoraLinearLayer``). The delta
    is not materialised: ``|w + d|^2 = |w|^2 + 2 w.d + |d|^2``, the last two by way of the rank.

    Args:
      array: the frozen weight.
      arrays: those of the adapter, by name.
    """
    assert isinstance(delta, LowRank)
    magnitude = jnp.asarray(unboxed(arrays[MAGNITUDE]))
    accumulate = accumulator(array.dtype)
    keep = (*group.batch, *group.cols)
    options: dict[str, Any] = {"accumulate": accumulate}
    a, b, scaling = jax.tree.map(
        lax.stop_gradient,
        (delta.a.astype(accumulate), delta.b.astype(accumulate),
         lax.convert_element_type(delta.scaling, accumulate)),
    )  # fmt: skip
    squares, cross = _norms_and_product(array, a, keep, accumulate)

    def over_rank(first: Factor) -> jax.Array:
        product = contract(first, b, keep, **options).ordered(keep)
        return product.array

    cross = over_rank(cross)
    other = Factor(a.array, tuple("rank of b" if n == RANK else n for n in a.axes))
    gram = contract(a, other, (*group.batch, RANK, "rank of b"), **options)
    second = Factor(b.array, tuple("rank of b" if n == RANK else n for n in b.axes))
    inner = contract(gram, second, (*keep, RANK), **options)
    norm = jnp.sqrt(jnp.maximum(squares + 2 * scaling * cross + scaling**2 * over_rank(inner), 0))
    # A column of zeros has no direction; PEFT makes it NaN.
    norm = jnp.where(norm > 0, norm, 1)
    return Factor(magnitude.astype(accumulate) / norm, keep)


def _norms_and_product(
    array: Any, a: Factor, keep: tuple[int, ...], accumulate: Any
) -> tuple[jax.Array, Factor]:
    """Returns the sum of a weight's squares over its rows, and its product with a factor."""
    order = (*keep, RANK)
    if is_quantized(array):
        term = Quantized.of(array)
        what = Product(a.axes, order, accumulate, None)
        out_sharding = None
        sharding = explicit(jax.typeof(array.values))
        summed = functools.partial(squares, keep=keep, accumulate=accumulate)
        if sharding is not None:
            names = [sharding.spec[i] for i in keep]
            out_sharding = jax.NamedSharding(sharding.mesh, jax.P(*names, None))
            summed = automatic(summed, jax.NamedSharding(sharding.mesh, jax.P(*names)))
        both = summed(term), product(term, a.array, what, array.dtype, out_sharding)
        return jax.tree.map(lax.stop_gradient, (both[0], Factor(both[1], order)))
    w = Factor(lax.stop_gradient(array), tuple(range(array.ndim))).astype(accumulate)
    left = tuple(i for i in w.axes if i in keep)
    rows = [i for i in w.axes if i not in keep]
    summed = Factor(jnp.sum(jnp.square(w.array), axis=rows), left).ordered(keep).array
    return summed, contract(w, a, order, accumulate=accumulate)
