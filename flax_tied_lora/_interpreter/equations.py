"""Equations of a jaxpr, run as they stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax_tied_lora._interpreter.jaxprs import Jaxpr, JaxprEqn, Var, jaxpr_as_fun, program


def run(eqns: Sequence[JaxprEqn], operands: Mapping[Var, Any], wanted: Sequence[Var]) -> list[Any]:
    """Returns values that equations make, run in one go by `jax.extend.core.jaxpr_as_fun`.

    Args:
      operands: the values that the equations read and do not make, by variable.
      wanted: the variables whose values are returned.
    """
    return jaxpr_as_fun(program(eqns, list(operands), wanted))(*operands.values())


def variables(eqns: Iterable[JaxprEqn]) -> list[Var]:
    """Returns the variables that equations read and make."""
    return [v for e in eqns for v in (*e.invars, *e.outvars) if isinstance(v, Var)]


def last_uses(jaxpr: Jaxpr) -> dict[Var, int]:
    """Returns, for each variable, the last equation that has it; what is returned is kept."""
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in variables([eqn])}
    return last | {v: len(jaxpr.eqns) for v in jaxpr.outvars if isinstance(v, Var)}
