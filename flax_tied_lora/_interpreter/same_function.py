"""Whether an equation is a call of a given function with a derivative of its own.

A `jax.custom_vjp` or `jax.custom_jvp` leaves no mark of its identity in a traced program. So the
two are compared by what they compute: the function is traced on the equation's operands, and its
program and that of its derivative must be the equation's, operation by operation. Functions that
are the same in both need not be told apart: a rule for one is right for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Traced

from flax_tied_lora._interpreter.equations import run
from flax_tied_lora._interpreter.jaxprs import (
    PROGRAMS,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    body,
    constants,
    operation_of,
    parameters_of,
)

CUSTOM_CALLS = ("custom_vjp_call", "custom_jvp_call")


def is_call_of(eqn: JaxprEqn, function: Callable[..., Any]) -> bool:
    """Returns whether an equation is a call of a function that takes arrays one by one."""
    avals = [v.aval for v in eqn.invars]
    operands, results = _fresh(eqn.invars), _fresh(eqn.outvars)
    one = eqn.replace(invars=[*operands], outvars=[*results])

    def called(*values: Any) -> list[Any]:
        return run([one], dict(zip(operands, values, strict=True)), results)

    forward = operation_of(eqn) == "custom_jvp_call"
    moved = operands if forward else results
    moved = [v.aval for v in moved if _is_inexact(v.aval)]

    def derivative(f: Callable[..., Any]) -> Any:
        return jax.make_jaxpr(_derivative(f, forward, len(avals)))(*avals, *moved)

    try:
        if not _same(*[jax.make_jaxpr(f)(*avals) for f in (called, function)]):
            return False
        return _same(derivative(called), derivative(function))
    # A function that is given another one's operands may raise anything.
    except Exception:
        return False


def _fresh(variables: Sequence[Any]) -> list[Var]:
    return [Var(v.aval) for v in variables]


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _no_tangent(x: Any) -> Any:
    return np.zeros(x.shape, jax.dtypes.float0)


def _derivative(function: Callable[..., Any], forward: bool, count: int) -> Callable[..., Any]:
    """Returns the derivative of a function of ``count`` arrays, tangents or cotangents after them.

    Only what is floating point has a tangent, or a cotangent.

    Args:
      forward: whether it is that of tangents.
    """

    def derivative(*values: Any) -> Any:
        operands, moved = values[:count], iter(values[count:])
        places = [i for i, x in enumerate(operands) if _is_inexact(x)]

        def of_places(*xs: Any) -> list[Any]:
            filled = list(operands)
            for i, x in zip(places, xs, strict=True):
                filled[i] = x
            return jax.tree.leaves(function(*filled))

        primals = [operands[i] for i in places]
        if forward:
            return jax.jvp(of_places, primals, list(moved))
        outputs, backward = jax.vjp(of_places, *primals)
        return backward([next(moved) if _is_inexact(x) else _no_tangent(x) for x in outputs])

    return derivative


def _same(a: Any, b: Any) -> bool:
    """Returns whether two programs, or two parameters of operations, are the same."""
    if isinstance(a, Traced) and isinstance(b, Traced):
        a, b = a.jaxpr, b.jaxpr
    if isinstance(a, PROGRAMS) and isinstance(b, PROGRAMS):
        return _same_each(constants(a), constants(b)) and _same_jaxpr(body(a), body(b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return _same_each(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a is b or bool(a == b)


def _same_each(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


def _same_jaxpr(a: Jaxpr, b: Jaxpr) -> bool:
    names: dict[Var, Var] = {}

    def named(of_a: Sequence[Var], of_b: Sequence[Var]) -> bool:
        names.update(zip(of_a, of_b, strict=False))
        return _same_each([v.aval for v in of_a], [v.aval for v in of_b])

    def read(x: Any, y: Any) -> bool:
        if isinstance(x, Literal) and isinstance(y, Literal):
            # As bytes: a NaN is the same NaN.
            return x.aval == y.aval and _same(np.asarray(x.val), np.asarray(y.val))
        return not isinstance(x, Literal) and names.get(x) is y

    def same_equation(x: JaxprEqn, y: JaxprEqn) -> bool:
        return (
            x.primitive is y.primitive
            and operation_of(x) == operation_of(y)
            and len(x.invars) == len(y.invars)
            and all(map(read, x.invars, y.invars))
            and _same(_compared(x), _compared(y))
            and named(x.outvars, y.outvars)
        )

    return (
        named([*a.constvars, *a.invars], [*b.constvars, *b.invars])
        and len(a.constvars) == len(b.constvars)
        and len(a.eqns) == len(b.eqns)
        and all(map(same_equation, a.eqns, b.eqns))
        and len(a.outvars) == len(b.outvars)
        and all(map(read, a.outvars, b.outvars))
    )


def _compared(eqn: JaxprEqn) -> Mapping[str, Any]:
    """Returns the parameters of an equation without functions that are made anew in each trace.

    Those make the derivative, which is compared as a program of its own.
    """
    params = parameters_of(eqn)
    if operation_of(eqn) in CUSTOM_CALLS:
        names = ("call_jaxpr", "traced", "num_consts", "symbolic_zeros")
        return {name: params.get(name) for name in names}
    return params
