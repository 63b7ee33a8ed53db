"""Jaxprs, made and opened here for every other file: `jax.extend` is no stable interface.

Before jax 0.11 a program is a `Jaxpr`, and a `ClosedJaxpr` holds one beside its constants. Since
then a `Jaxpr` has its constants itself, and the other name is an alias that is to be deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

NEWEST_TESTED = "0.12.0.1"

try:
    import jax.extend.core as core
    from jax.extend.core import (
        DebugInfo,
        Jaxpr,
        JaxprEqn,
        Literal,
        Primitive,
        Var,
        jaxpr_as_fun,
        jaxprs_in_params,
    )
except ImportError as error:
    raise ImportError(
        f"flax_tied_lora: jax {jax.__version__} has another jax.extend.core than this release "
        f"knows ({error}); the newest jax that it is tested on is {NEWEST_TESTED}: install that "
        "one, or a newer flax-tied-lora"
    ) from error

__all__ = [
    "PROGRAMS", "Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var", "body", "closed", "constants",
    "jaxpr_as_fun", "jaxprs_in_params", "opened", "program",
]  # fmt: skip

_CLOSED: Any = Jaxpr if hasattr(Jaxpr, "consts") else vars(core)["ClosedJaxpr"]
PROGRAMS: tuple[type, ...] = (Jaxpr, _CLOSED)


def body(jaxpr: Any) -> Jaxpr:
    """Returns the `Jaxpr` of a program, in either form."""
    return jaxpr if isinstance(jaxpr, Jaxpr) else jaxpr.jaxpr


def constants(jaxpr: Any) -> Sequence[Any]:
    """Returns the values of a program's constants."""
    return getattr(jaxpr, "consts", ())


def closed(jaxpr: Jaxpr) -> Any:
    """Returns a program without constants in the form that `jaxpr_as_fun` takes."""
    return jaxpr if _CLOSED is Jaxpr else _CLOSED(jaxpr, ())


def opened(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Returns a program that takes its constants as its first operands, and the constants."""
    inner, info = body(jaxpr), jaxpr.debug_info
    made = Jaxpr(
        (), [*inner.constvars, *inner.invars], inner.outvars, inner.eqns, inner.effects,
        DebugInfo(info.traced_for, info.func_src_info, None, None), is_high=inner.is_high,
    )  # fmt: skip
    return made, constants(jaxpr)


def program(eqns: Sequence[JaxprEqn], operands: Sequence[Var], wanted: Sequence[Var]) -> Any:
    """Returns the program that runs equations."""
    info = DebugInfo("tied_lora.run", eqns[0].primitive.name, None, None)
    # Effects of refs are numbered by operand: the equations say them when they run.
    return closed(Jaxpr((), [*operands], [*wanted], [*eqns], frozenset(), info))
