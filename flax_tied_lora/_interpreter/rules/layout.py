"""Operations that only rearrange a weight: it stays symbolic, its factors follow.

A rule here is what the operation does to one `Factor`, an array with some of the weight's axes, and
for each axis of the result the weight axes that it holds. Where that does not say all that the
equation does, the equation itself runs on an array that has all of the weight's axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from flax_tied_lora._algebra.factor import RANK, Factor, NotServedError
from flax_tied_lora._algebra.site_filter import PROJECTION
from flax_tied_lora._algebra.term import LowRank
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._tree.open_sizes import supposed

Axes = Sequence[Sequence[int]]


def same_axes(eqn: Any) -> Axes:
    return [(i,) for i in range(eqn.invars[0].aval.ndim)]


def on_arrays(
    context: Any, eqn: Any, move: Callable[[Factor], Factor], others: Sequence[Any] = ()
) -> Callable[[Factor], Factor]:
    """Returns what moves a factor, but runs the equation on one with all of the weight's axes."""
    ndim = eqn.invars[0].aval.ndim

    def moved(factor: Factor) -> Factor:
        if not factor.is_array(ndim):
            return move(factor)
        (array,) = context.run(eqn, [factor.ordered(range(ndim)).array, *others])
        return Factor(array, tuple(range(array.ndim)))

    return moved


def _layout(
    *names: str, axes: Callable[[Any], Axes] = same_axes, arrays: bool = False
) -> Callable[[Any], Any]:
    """Makes a rule of what an operation does to a factor: ``move(factor, equation, *others)``.

    Args:
      axes: returns for each axis of the result the weight axes that it holds.
      arrays: whether the equation itself runs on arrays that have all axes.
    """

    def decorate(move: Callable[..., Factor]) -> Callable[..., Factor]:
        @rule(*names)
        def apply(context, eqn, weight, *others):
            if not isinstance(weight, Weight) or any(isinstance(x, Weight) for x in others):
                raise NotServedError

            def moved(factor: Factor) -> Factor:
                return move(factor, eqn, *others)

            run = on_arrays(context, eqn, moved, others) if arrays else moved
            return [weight.rearrange(eqn.outvars[0].aval, run, axes(eqn))]

        return move

    return decorate


@_layout("transpose", axes=lambda eqn: [(p,) for p in eqn.params["permutation"]])
def transpose(factor: Factor, eqn: Any) -> Factor:
    return factor.relabel(list(eqn.params["permutation"]).index)


def _kept(eqn: Any) -> list[int]:
    return [i for i in range(eqn.invars[0].aval.ndim) if i not in eqn.params["dimensions"]]


@_layout("squeeze", axes=lambda eqn: [(i,) for i in _kept(eqn)])
def squeeze(factor: Factor, eqn: Any) -> Factor:
    return drop(factor, eqn.params["dimensions"]).relabel(_kept(eqn).index)


def drop(factor: Factor, axes: Sequence[int]) -> Factor:
    """Returns a factor without the axes named, which have size 1."""
    present = [i for i, a in enumerate(factor.axes) if a in axes and a != RANK]
    labels = tuple(a for i, a in enumerate(factor.axes) if i not in present)
    return Factor(lax.squeeze(factor.array, present), labels) if present else factor


def _broadcast_axes(eqn: Any) -> Axes:
    dims = eqn.params["broadcast_dimensions"]
    return [(dims.index(o),) if o in dims else () for o in range(len(eqn.params["shape"]))]


@_layout("broadcast_in_dim", axes=_broadcast_axes, arrays=True)
def broadcast_in_dim(factor: Factor, eqn: Any, *dynamic_shape: Any) -> Factor:
    if dynamic_shape:
        raise NotServedError
    dims, shape, operand = (
        eqn.params["broadcast_dimensions"], eqn.params["shape"], eqn.invars[0].aval.shape,
    )  # fmt: skip
    # A factor that lacks an axis does not vary along it, so it need not be repeated.
    grown = [i for i, d in enumerate(dims) if operand[i] != shape[d]]
    return drop(factor, grown).relabel(lambda axis: dims[axis])


def _reshape_groups(eqn: Any) -> list[tuple[list[int], list[int]]]:
    """Returns the finest ``(operand axes, result axes)`` that a reshape maps onto one another."""
    before, after = _permuted(eqn), eqn.outvars[0].aval.shape
    groups, i, o = [], 0, 0
    while i < len(before) or o < len(after):
        ins, outs, size_in, size_out = [], [], 1, 1
        while not (ins or outs) or size_in != size_out:
            less = supposed(size_in) <= supposed(size_out)
            if i < len(before) and (less or o == len(after)):
                ins.append(i)
                size_in *= before[i]
                i += 1
            elif o < len(after):
                outs.append(o)
                size_out *= after[o]
                o += 1
            else:
                raise NotServedError  # an axis of size 0
        groups.append((ins, outs))
    return groups


def _order(eqn: Any) -> list[int]:
    """Returns the order in which a reshape takes the axes of its operand: `vmap` changes it."""
    dimensions = eqn.params.get("dimensions")
    return list(range(eqn.invars[0].aval.ndim) if dimensions is None else dimensions)


def _permuted(eqn: Any) -> list[int]:
    return [eqn.invars[0].aval.shape[i] for i in _order(eqn)]


def _reshape_axes(eqn: Any) -> Axes:
    held: list[Sequence[int]] = [()] * eqn.outvars[0].aval.ndim
    order = _order(eqn)
    for ins, outs in _reshape_groups(eqn):
        for o in outs:
            held[o] = [order[i] for i in ins]
    return held


@_layout("reshape", axes=_reshape_axes, arrays=True)
def reshape(factor: Factor, eqn: Any, *dynamic_shape: Any) -> Factor:
    if dynamic_shape:
        raise NotServedError
    before, after = _permuted(eqn), eqn.outvars[0].aval.shape
    factor = factor.relabel(_order(eqn).index)
    labels: list[Any] = []
    unit: list[int] = []
    for ins, outs in _reshape_groups(eqn):
        present = [i for i in ins if i in factor.axes and before[i] != 1]
        unit += [i for i in ins if before[i] == 1]
        if not present:
            continue
        if any(before[i] != 1 for i in ins if i not in present):
            raise NotServedError  # rows and columns in one axis
        labels += outs
    factor = drop(factor, unit)
    sources = sorted(a for a in factor.axes if a != RANK)
    if RANK not in factor.axes:
        order = sources
    elif factor.axes[0] == RANK:
        order, labels = [RANK, *sources], [RANK, *labels]
    else:
        order, labels = [*sources, RANK], [*labels, RANK]
    shape = [factor.size(RANK) if o == RANK else after[o] for o in labels]
    return Factor(lax.reshape(factor.ordered(order).array, shape), tuple(labels))


@_layout("slice")
def slice_(factor: Factor, eqn: Any) -> Factor:
    p, ndim = eqn.params, eqn.invars[0].aval.ndim
    strides = p["strides"] or (1,) * ndim
    bounds = [
        (0, n, 1) if a == RANK else (p["start_indices"][a], p["limit_indices"][a], strides[a])
        for a, n in zip(factor.axes, factor.array.shape, strict=True)
    ]
    if bounds == [(0, n, 1) for n in factor.array.shape]:
        return factor
    starts, limits, steps = zip(*bounds, strict=True)
    return Factor(lax.slice(factor.array, starts, limits, steps), factor.axes)


@rule("reduce_sum")
def reduce_sum(context, eqn, weight):
    """Summed over axes that one factor has: that factor is summed."""
    axes, weight = eqn.params["axes"], weight.folded()
    for term in weight.terms:
        if not isinstance(term, LowRank):
            if not term.whole:
                raise NotServedError
        elif any((i in term.a.axes) == (i in term.b.axes) for i in axes):
            raise NotServedError

    def move(factor: Factor) -> Factor:
        summed = [i for i, a in enumerate(factor.axes) if a in axes]
        left = tuple(a for a in factor.axes if a not in axes)
        return Factor(jnp.sum(factor.array, axis=summed), left).relabel(kept.index)

    def reduced(weight: Weight) -> Weight:
        held = [(i,) for i in kept]
        return weight.rearrange(eqn.outvars[0].aval, on_arrays(context, eqn, move), held)

    kept = [i for i in range(len(weight.shape)) if i not in axes]
    out = reduced(weight)
    if any(isinstance(t, LowRank) and (RANK,) in (t.a.axes, t.b.axes) for t in out.terms):
        # All rows, or all columns: a product with ones, whose result is data.
        terms = context.read(eqn.primitive.name, weight, PROJECTION, rows=axes)
        return [reduced(weight.replace(terms=terms)).dense()]
    return [out]


@rule("tile")
def tile(context, eqn, weight):
    def move(factor: Factor) -> Factor:
        reps = [1 if a == RANK else eqn.params["reps"][a] for a in factor.axes]
        return Factor(jnp.tile(factor.array, reps), factor.axes)

    aval, run = eqn.outvars[0].aval, on_arrays(context, eqn, move)
    out = weight.rearrange(aval, run, same_axes(eqn))
    return [out.replace(terms=tuple(t.repeated() for t in out.terms))]


@_layout("rev")
def rev(factor: Factor, eqn: Any) -> Factor:
    dims = [i for i, a in enumerate(factor.axes) if a in eqn.params["dimensions"]]
    return Factor(lax.rev(factor.array, dims), factor.axes) if dims else factor
