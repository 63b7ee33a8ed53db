"""Operations that put weights together, or take them apart: the deltas are padded with zeros.

What is joined has the leaves of all its parts, and each delta is where its part is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_tied_lora._algebra.factor import Factor, NotServedError, accumulator, sum_of
from flax_tied_lora._algebra.site_filter import OTHER
from flax_tied_lora._algebra.term import LowRank
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._interpreter.rules.layout import same_axes


@rule("split")
def split(context, eqn, weight):
    axis, start, outputs = eqn.params["axis"], 0, []
    for outvar, size in zip(eqn.outvars, eqn.params["sizes"], strict=True):
        size = int(size)

        def cut(array, position, start=start, size=size):
            return lax.slice_in_dim(array, start, start + size, axis=position)

        outputs.append(
            weight.rearrange(
                outvar.aval,
                lambda f, cut=cut: (
                    Factor(cut(f.array, f.axes.index(axis)), f.axes) if axis in f.axes else f
                ),
                same_axes(eqn),
            )
        )
        start += size
    return outputs


@rule("pad")
def pad(context, eqn, weight, value):
    if not isinstance(weight, Weight):
        raise NotServedError
    margins = {i: c for i, c in enumerate(eqn.params["padding_config"]) if any(c)}
    dense, deltas = weight.folded().parted()
    # The delta of what is padded is 0, whatever the value.
    deltas = [_padded(term, margins) for term in deltas]
    return [Weight.of(context.run(eqn, [dense, value])[0], deltas, weight.origins)]


@rule("concatenate")
def concatenate(context, eqn, *operands):
    return [joined(operands, eqn.params["dimension"], eqn.outvars[0].aval)]


def joined(operands: Sequence[Any], axis: int, aval: Any) -> Weight:
    """Returns arrays and weights behind one another along an axis.

    The dense parts are concatenated; each delta is padded with zeros to the whole's size.
    """
    parts, deltas, origins, start = [], [], [], 0
    for operand in operands:
        size = operand.shape[axis]
        if isinstance(operand, Weight):
            weight = operand.folded()
            dense, others = weight.parted()
            parts.append(dense)
            margins = {axis: (start, aval.shape[axis] - start - size, 0)}
            deltas += [_padded(term, margins) for term in others]
            origins += weight.origins
        else:
            parts.append(operand)
        start += size
    return Weight.of(lax.concatenate(parts, axis), deltas, origins)


def _padded(term: Any, margins: Mapping[int, Sequence[int]]) -> Any:
    """Returns a delta padded with zeros: it is 0 where one of its factors is."""
    reached: set[Any] = set()

    def move(factor: Factor) -> Factor:
        reached.update(factor.axes)
        return factor.padded(margins)

    padded = term.rearrange(move)
    if not set(margins) <= reached:
        raise NotServedError  # the delta does not vary along an axis, so nothing of it can be 0
    return padded


@rule("add", "add_any", "sub")
def add(context, eqn, lhs, rhs):
    """Two weights of one shape: their dense parts are added, their deltas stand side by side."""
    if not isinstance(lhs, Weight) or not isinstance(rhs, Weight):
        return _to_data(context, eqn, lhs, rhs)
    if lhs.shape != rhs.shape:
        raise NotServedError
    left, right = lhs.folded(), rhs.folded()
    (left_dense, deltas), (right_dense, others) = left.parted(), right.parted()
    if eqn.primitive.name == "sub":
        minus = Factor(jnp.array(-1, right.dtype), ())
        others = tuple(term.times(minus) for term in others)
    dense = context.run(eqn, [left_dense, right_dense])[0]
    return [Weight.of(dense, (*deltas, *others), (*left.origins, *right.origins))]


def _to_data(context, eqn, lhs, rhs):
    """A weight beside data, as a table of positions is: it is repeated, its delta is not."""
    weight = lhs if isinstance(lhs, Weight) else rhs
    if not any(t.group for t in weight.terms) or any(t.sites is not None for t in weight.terms):
        raise NotServedError
    varying = {a for t in weight.terms if not t.whole for a in t.factor_axes()}
    if not any(n == 1 or i not in varying for i, n in enumerate(weight.shape)):
        raise NotServedError  # not repeated: what is made is a matrix of the weight's size
    terms = context.read(eqn.primitive.name, weight, OTHER)
    aval = eqn.outvars[0].aval
    accumulate, order = accumulator(aval.dtype), range(len(weight.shape))
    total = sum_of([
        term.product(order, weight.shape, aval.dtype) if isinstance(term, LowRank)
        else term.dense(weight.shape, accumulate)
        for term in terms
    ])  # fmt: skip
    if weight.scale is not None:
        total *= weight.scale.astype(accumulate).spread(order, weight.shape)
    pair = [
        jnp.broadcast_to(total if isinstance(x, Weight) else x, aval.shape).astype(accumulate)
        for x in (lhs, rhs)
    ]
    out = lax.sub(*pair) if eqn.primitive.name == "sub" else lax.add(*pair)
    return [lax.convert_element_type(out, aval.dtype)]


@rule("stack")
def stack(context, eqn, *operands):
    """As a concatenation of operands with one more axis."""
    axis, aval = eqn.params["axis"], eqn.outvars[0].aval
    grown = jax.ShapeDtypeStruct(
        tuple(1 if i == axis else n for i, n in enumerate(aval.shape)), aval.dtype
    )
    held = [() if i == axis else (i - (i > axis),) for i in range(len(aval.shape))]

    def grow_factor(factor: Factor) -> Factor:
        moved = factor.relabel(lambda a: a + (a >= axis))
        return Factor(lax.expand_dims(moved.array, (0,)), (axis, *moved.axes))

    def grow(operand: Any) -> Any:
        if not isinstance(operand, Weight):
            return lax.expand_dims(operand, (axis,))
        return operand.folded().rearrange(grown, grow_factor, held)

    return [joined([grow(x) for x in operands], axis, aval)]


@rule("unstack")
def unstack(context, eqn, weight):
    """Each slice along an axis, without it."""
    axis, outputs = eqn.params["axis"], []
    held = [(i,) for i in range(len(weight.shape)) if i != axis]
    for index, outvar in enumerate(eqn.outvars):
        outputs.append(
            weight.rearrange(outvar.aval, lambda f, index=index: f.at(axis, index), held)
        )
    return outputs
