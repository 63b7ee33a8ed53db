"""Equations of a jaxpr, run as they stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Var, jaxpr_as_fun


def run(eqns: Sequence[JaxprEqn], operands: Mapping[Var, Any], wanted: Sequence[Var]) -> list[Any]:
    """Returns values that equations make, run in one go by `jax.extend.core.jaxpr_as_fun`.

    Args:
      operands: the values that the equations read and do not make, by variable.
      wanted: the variables whose values are returned.
    """
    info = DebugInfo("tied_lora.run", eqns[0].primitive.name, None, None)
    # Effects of refs are numbered by operand: the equations say them when they run.
    program = Jaxpr((), list(operands), list(wanted), list(eqns), frozenset(), info)
    return jaxpr_as_fun(ClosedJaxpr(program, ()))(*operands.values())


def variables(eqns: Iterable[JaxprEqn]) -> list[Var]:
    """Returns the variables that equations read and make."""
    return [v for e in eqns for v in (*e.invars, *e.outvars) if isinstance(v, Var)]


def last_uses(jaxpr: Jaxpr) -> dict[Var, int]:
    """Returns, for each variable, the last equation that has it; what is returned is kept."""
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in variables([eqn])}
    return last | {v: len(jaxpr.eqns) for v in jaxpr.outvars if isinstance(v, Var)}
