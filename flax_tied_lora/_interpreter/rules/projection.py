"""Operations that multiply data with a weight: the delta is served by two thin products."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra import kernel_product, logits_product
from flax_tied_lora._algebra import quantized_product as _quantized_product
from flax_tied_lora._algebra import rows as replaced_rows
from flax_tied_lora._algebra.factor import (
    RANK,
    Axis,
    Factor,
    MixedAxesError,
    accumulator,
    contract,
    operation_dtype,
    times_chain,
)
from flax_tied_lora._algebra.quantized import Quantized
from flax_tied_lora._algebra.rows import Rows
from flax_tied_lora._algebra.site_filter import LOOKUP, PROJECTION
from flax_tied_lora._algebra.weight import Dense, LowRank, Term, Weight, add
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._tree.sharding import explicit, placed_as, split, varying


def serve(
    context: Any, eqn: Any, weight: Weight, x: Any, terms: Sequence[Term],
    dense: Callable[[Factor], Array], low_rank: Callable[[LowRank, Any, Any], Any],
    scale: Array | None = None, rows: Callable[[Rows, Any], Any] | None = None,
    quantized: Callable[[Quantized, Array], Array] | None = None,
) -> Array:  # fmt: skip
    """Returns the sum over terms of a product with data, cast once to the equation's dtype.

    Args:
      dense: the product with an array over the weight's axes, as it is stored.
      low_rank: the product with a delta, or a function that adds it to a result; called with the
        term, the data, and the sharding that the result must have, or None.
      scale: multiplied in before that cast.
      rows: returns a function that adds the product with replaced rows to a result; None where
        there is none.
      quantized: the product with a weight that is stored quantised; None where there is none.
    """
    aval, accumulate = eqn.outvars[0].aval, accumulator(eqn.outvars[0].aval.dtype)
    parts, adders, wide = [], [], False
    plain = None
    if not isinstance(x, Weight):
        plain = lax.convert_element_type(x, operation_dtype(x.dtype, weight.dtype))
    for term in terms:
        if isinstance(term, LowRank):
            _refuse_differentiated(context, term)
            data = x if plain is None else plain
            if plain is not None and term.key is not None:
                data = dropped(term, plain)
            sharding = split(parts[0]) if parts else None
            served = low_rank(term, data, sharding)
            wide |= callable(served)
            (adders if callable(served) else parts).append(served)
            continue
        if isinstance(term, Rows) and rows is not None and plain is not None:
            with contextlib.suppress(MixedAxesError):
                adders.append(rows(term, plain))
                continue
        if isinstance(term, Quantized) and quantized is not None and plain is not None:
            with contextlib.suppress(MixedAxesError):
                parts.append(quantized(term, plain))
                continue
        if not isinstance(term, Dense):
            context.added_up(eqn.primitive.name, weight, [term])
            term = Dense.of(term.dense(weight.shape, weight.dtype))
        parts.append(dense(term.factor.astype(weight.dtype)))
    if len(parts) == 1 and parts[0].dtype == aval.dtype and scale is None and not adders:
        return parts[0]
    out = add([lax.convert_element_type(p, accumulate) for p in parts])
    for adder in adders:
        out = adder(out)
    if scale is not None:
        out *= placed_as(lax.convert_element_type(scale, accumulate), out)
    out = lax.convert_element_type(out, aval.dtype)
    return logits_product.kept(out) if wide else out


def _refuse_differentiated(context: Any, term: Term) -> None:
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


@rule("dot_general")
def dot_general(context, eqn, lhs, rhs):
    (contracting, batching) = eqn.params["dimension_numbers"]
    first = isinstance(lhs, Weight)
    weight, x, var = (lhs, rhs, eqn.invars[1]) if first else (rhs, lhs, eqn.invars[0])
    own, other = (0, 1) if first else (1, 0)
    summed, batch = contracting[own], batching[own]
    names = _names(x, contracting[other], batching[other], summed, batch)
    free = [i for i in range(len(weight.shape)) if i not in (*summed, *batch)]
    rest = [n for n in names if isinstance(n, str)]
    order = (*batch, *free, *rest) if first else (*batch, *rest, *free)

    role = LOOKUP if context.picks_rows(weight, summed, var) else PROJECTION
    scale = weight.scale
    scaled = set() if scale is None else set(scale.axes)
    if not (scaled <= {*summed, *batch} or scaled <= {*free, *batch}):
        raise MixedAxesError
    terms = context.read(eqn.primitive.name, weight, role, rows=summed, cols=free, batch=batch)
    params = {k: eqn.params[k] for k in ("precision", "out_sharding")}
    accumulate = accumulator(eqn.outvars[0].aval.dtype)
    if not isinstance(params["precision"], (type(None), tuple, lax.Precision)):
        accumulate = eqn.outvars[0].aval.dtype  # a named algorithm says itself what it adds up in

    before = bool(scaled & set(summed))
    if scale is not None and before:
        x = _scaled(x, names, scale, operation_dtype(x.dtype, weight.dtype))

    def dense(factor: Factor) -> Array:
        if isinstance(x, Weight):
            array = factor.ordered(range(len(weight.shape))).array
            return context.apply(eqn, [array, x] if first else [x, array])[0]
        array, numbers = _as_stored(factor, eqn.params["dimension_numbers"], own)
        pair = (array, x) if first else (x, array)
        alone = len(terms) == 1 and (scale is None or before)
        kind = eqn.params["preferred_element_type"] if alone else accumulate
        return lax.dot_general(*pair, numbers, **params, preferred_element_type=kind)

    def low_rank(term: LowRank, data: Any, sharding: Any) -> Any:
        options = {"accumulate": accumulate, "precision": params["precision"]}
        shape = eqn.outvars[0].aval.shape
        if isinstance(data, Weight):
            return between(term, data, names, order, shape, **options)
        hidden, far = halfway(term, data, names, order, **options)
        rows = math.prod(weight.shape[i] for i in summed)
        if len(terms) > 1 and logits_product.fits(hidden, far, order, rows):
            form = logits_product.Form(hidden.axes, far.axes, tuple(order), params["precision"])
            return lambda base: logits_product.added(form, base, hidden.array, far.array)
        out = _second(hidden, far, tuple(order), **options, out_sharding=sharding)
        return out.spread(order, shape)

    def rows(term: Rows, data: Array) -> Any:
        return replaced_rows.product(
            term, data, names, order, eqn.outvars[0].aval.shape,
            accumulate=accumulate, precision=params["precision"],
        )  # fmt: skip

    def quantized(term: Quantized, data: Array) -> Array:
        return _quantized_product.product(
            term, data, names, order, dtype=weight.dtype, accumulate=accumulate,
            precision=params["precision"], out_sharding=explicit(eqn.outvars[0].aval),
        )  # fmt: skip

    if role == LOOKUP:
        for term in terms:
            # The transpose of a projection reads as a lookup: rows are summed over.
            _refuse_differentiated(context, term)
        terms = tuple(without_dropout(t) for t in terms)
    if (scale is None or before) and not isinstance(x, Weight):
        height = math.prod(weight.shape[i] for i in summed)
        served = _together(context, eqn, weight, x, first, names, order, terms, height, accumulate)
        if served is not None:
            return [served]
    after = None if scale is None or before else scale.spread(order, eqn.outvars[0].aval.shape)
    return [serve(context, eqn, weight, x, terms, dense, low_rank, after, rows, quantized)]


def _together(
    context: Any, eqn: Any, weight: Weight, x: Array, first: bool, names: Sequence[Axis],
    order: Sequence[Axis], terms: Sequence[Term], rows: int, accumulate: Any,
) -> Array | None:  # fmt: skip
    """Returns the product with an array and one delta, or None where there is something else."""
    if len(terms) != 2 or not isinstance(terms[0], Dense) or not isinstance(terms[1], LowRank):
        return None
    term, near, far = terms[1], terms[1].a, terms[1].b
    if not times_chain(Factor(x, tuple(names)), near, far, order):
        near, far = far, near
    form = kernel_product.Form(
        tuple(names), near.axes, far.axes, tuple(order), accumulate, eqn.params["precision"]
    )
    if logits_product.is_wide(far, rows) or not form.fits():
        return None
    array, numbers = _as_stored(
        terms[0].factor.astype(weight.dtype), eqn.params["dimension_numbers"], 0 if first else 1
    )
    if any(split(a) is not None for a in (x, array, near.array, far.array)):
        return None
    _refuse_differentiated(context, term)
    data = lax.convert_element_type(x, operation_dtype(x.dtype, weight.dtype))
    data = dropped(term, data) if term.key is not None else data
    kept = [
        ("dimension_numbers", numbers),
        *((k, eqn.params[k]) for k in ("out_sharding", "precision")),
    ]
    return kernel_product.served(
        form, tuple(kept), eqn.outvars[0].aval.dtype,
        (array, x) if first else (x, array), data, near.array, far.array, term.scaling,
    )  # fmt: skip


def _as_stored(factor: Factor, numbers: Any, operand: int) -> tuple[Array, Any]:
    """Returns a weight's array as it is stored, and the numbers of its product's dimensions so.

    XLA for the CPU copies the transpose of a table that a vector is multiplied with, and before a
    loop all of it. Where axes that are kept would change places, they are put in order.

    Args:
      numbers: the dimension numbers for the array with its axes in order.
      operand: which operand of the product it is.
    """
    gone = {i for pair in numbers for i in pair[operand]}
    kept = [a for a in factor.axes if a not in gone]
    if kept != sorted(kept):
        factor = factor.ordered(range(len(factor.axes)))
    moved = [list(pair) for pair in numbers]
    for pair in moved:
        pair[operand] = tuple(factor.axes.index(i) for i in pair[operand])
    return factor.array, tuple(map(tuple, moved))


def without_dropout(term: Term) -> Term:
    if isinstance(term, LowRank):
        return LowRank(term.a, term.b, term.scaling, None, term.group, term.sites)
    return term


def _names(x: Any, contracted: Sequence[int], batched: Sequence[int], summed: Any, batch: Any):
    """Returns labels for data's axes: the weight axis that each is paired with, or its own."""
    paired = dict(zip((*contracted, *batched), (*summed, *batch), strict=True))
    return tuple(paired.get(i, f"x{i}") for i in range(len(x.shape)))


def _scaled(x: Any, names: Sequence[Axis], scale: Factor, dtype: Any) -> Any:
    if isinstance(x, Weight):
        return x.with_scale(scale.relabel(names.index))
    return Factor(x, tuple(names)).astype(dtype).times(scale).array


def halfway(
    term: LowRank, data: Array, names: Sequence[Axis], order: Sequence[Axis], *,
    accumulate: Any, precision: Any,
) -> tuple[Factor, Factor]:  # fmt: skip
    """Returns the scaled product of data with one factor of a delta, and the other factor.

    Args:
      names: a label for each axis of the data: the weight axis that it is paired with, or its own.
      order: the labels of the axes of the whole product, whose cheaper order it is.
      accumulate, precision: as `contract` has them.
    """
    dtype = data.dtype
    # An axis that neither factor has is one along which the delta is constant.
    own = {*term.a.axes, *term.b.axes, *order}
    lone = tuple(i for i, n in enumerate(names) if n not in own)
    if lone:
        total = jnp.sum(lax.convert_element_type(data, accumulate), axis=lone)
        data = lax.convert_element_type(total, dtype)
    x = Factor(data, tuple(n for n in names if n in own))
    near, far = (term.a, term.b) if times_chain(x, term.a, term.b, order) else (term.b, term.a)
    return _first(
        x, near, far, term.scaling, tuple(order), accumulate=accumulate, precision=precision
    )


# What `_together` does not serve, as layers over a quantised base: the two products are traced and
# linearised once for all of them, as its one function is. Inlined, so the program is as without.
_OPTIONS = ("order", "accumulate", "precision")


@functools.partial(jax.jit, static_argnames=_OPTIONS, inline=True)
def _first(
    x: Factor, near: Factor, far: Factor, scaling: Array, order: tuple[Axis, ...], *,
    accumulate: Any, precision: Any,
) -> tuple[Factor, Factor]:  # fmt: skip
    dtype = x.array.dtype
    near, far = near.astype(dtype), far.astype(dtype)
    hidden = contract(x, near, (*order, *far.axes), accumulate=accumulate, precision=precision)
    scaled = hidden.array * lax.convert_element_type(scaling, accumulate)
    return Factor(lax.convert_element_type(scaled, dtype), hidden.axes), far


_second = jax.jit(kernel_product.second, static_argnames=(*_OPTIONS, "out_sharding"), inline=True)


def between(
    term: LowRank, weight: Weight, names: Sequence[Axis], order: Sequence[Axis],
    shape: tuple[int, ...], *, accumulate: Any, precision: Any,
) -> Array:  # fmt: skip
    """Returns the product of another weight with a delta: the nearer factor meets it first."""
    options = {"accumulate": accumulate, "precision": precision}
    near, far = (term.a, term.b) if set(names) & set(term.a.axes) else (term.b, term.a)
    summed = {n for n in names if n not in order}
    parts = []
    for part in weight.folded().terms:
        if isinstance(part, LowRank):
            varying = {names[n] for f in (part.a, part.b) for n in f.axes if n != RANK}
        else:
            varying = set(names)
        if not summed <= varying & {*near.axes, *far.axes}:
            raise MixedAxesError  # summed over an axis along which one of the two is constant
        if isinstance(part, LowRank):
            inner = [
                Factor(f.array, tuple("rank of x" if n == RANK else names[n] for n in f.axes))
                for f in (part.a, part.b)
            ]
            hit = 0 if set(inner[0].axes) & set(near.axes) else 1
            factors, scaling = [inner[hit], near, inner[1 - hit], far], part.scaling * term.scaling
        else:
            array = part.dense(weight.shape, weight.dtype)
            factors, scaling = [Factor(array, tuple(names)), near, far], term.scaling
        product, *others = (f.astype(accumulate) for f in factors)
        for i, factor in enumerate(others, 1):
            later = {n for f in others[i:] for n in f.axes}
            product = contract(product, factor, {*order, *later}, **options)
        scaling = lax.convert_element_type(scaling, accumulate)
        parts.append(Factor(product.array * scaling, product.axes).spread(order, shape))
    return add(parts)
