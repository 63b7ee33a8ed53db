"""Multiplication of a weight by what varies along some of its axes only: its scale."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax

from flax_tied_lora._algebra.factor import Factor, NotServedError, accumulator
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.registry import rule


@rule("neg")
def neg(context, eqn, weight):
    return [weight.with_scale(Factor(jnp.array(-1, weight.dtype), ()))]


@rule("mul", "div")
def mul(context, eqn, lhs, rhs):
    """By a scalar, or by what varies along some of the axes only: part of the weight's scale."""
    if isinstance(lhs, Weight) and isinstance(rhs, Weight):
        raise NotServedError
    weight, other, var = (
        (lhs, rhs, eqn.invars[1]) if isinstance(lhs, Weight) else (rhs, lhs, eqn.invars[0])
    )
    if eqn.primitive.name == "div" and weight is rhs:
        raise NotServedError
    varying = context.varying_axes(var)
    # A weight of one entry may meet an operand of any shape.
    if len(varying) == len(weight.shape) or weight.shape != eqn.outvars[0].aval.shape:
        raise NotServedError
    # The operand is constant along the other axes: one entry of each is all of it.
    other = jnp.asarray(other)
    limits = [n if i in varying else 1 for i, n in enumerate(other.shape)]
    small = lax.slice(other, [0] * other.ndim, limits)
    array = lax.squeeze(small, [i for i in range(other.ndim) if i not in varying])
    if eqn.primitive.name == "div":
        wide = lax.convert_element_type(array, accumulator(array.dtype))
        array = jnp.ones((), wide.dtype) / wide
    out = weight.with_scale(Factor(array, tuple(varying)))
    return [dataclasses.replace(out, dtype=eqn.outvars[0].aval.dtype)]
