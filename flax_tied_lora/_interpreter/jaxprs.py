"""Jaxprs, made and opened here for every other file: `jax.extend` is no stable interface.

Before jax 0.11 a program is a `Jaxpr`, and a `ClosedJaxpr` holds one beside its constants. Since
then a `Jaxpr` has its constants itself, and the other name is an alias that is to be deleted.

With the flags ``jax_remat3``, ``jax_scan3``, ``jax_custom_vjp3`` and ``jax_custom_jvp3``, off since
jax 0.11 and to be turned on, a checkpoint, a scan and a custom derivative are objects, each a
`jax.experimental.hijax.HiPrim`, which one primitive applies. The names of that primitive, of its
parameter and of JAX's classes are no interface: they are known here only. Where they are others,
weights are materialised, and a test says which have changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.stages import Traced

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
    "PROGRAMS", "Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var", "applied", "body", "closed",
    "constants", "jaxpr_as_fun", "opened", "operation_of", "parameters_of", "program",
    "programs_inside",
]  # fmt: skip

_CLOSED: Any = Jaxpr if hasattr(Jaxpr, "consts") else vars(core)["ClosedJaxpr"]
PROGRAMS: tuple[type, ...] = (Jaxpr, _CLOSED)

# JAX's own classes of these objects, and the primitives that do the same without the flags.
_SAME_AS = {
    "RematTraced": "checkpoint",
    "CheckpointName": "name",
    "Scan3": "scan",
    "CustomVJPTraced": "custom_vjp_call",
    "CustomJVPTraced": "custom_jvp_call",
}


_HIGH = "call_hi_primitive"


def applied(eqn: JaxprEqn) -> Any:
    """Returns the `jax.experimental.hijax.HiPrim` that an equation applies, or None."""
    return eqn.params.get("_prim") if eqn.primitive.name == _HIGH else None


def operation_of(eqn: JaxprEqn) -> str:
    """Returns the name of what an equation does: of its primitive, or ``module.class``."""
    primitive = eqn.primitive.name
    if primitive != _HIGH or (high := applied(eqn)) is None:  # asked of every equation
        return primitive
    module, name = type(high).__module__, type(high).__qualname__
    own = module.partition(".")[0] == "jax"
    return _SAME_AS[name] if own and name in _SAME_AS else f"{module}.{name}"


def parameters_of(eqn: JaxprEqn) -> Mapping[str, Any]:
    """Returns the parameters of what an equation does."""
    high = applied(eqn)
    return eqn.params if high is None else high.params


def programs_inside(eqn: JaxprEqn) -> list[Any]:
    """Returns the programs among the parameters of an equation."""
    values = parameters_of(eqn).items()
    traced = {k: v.jaxpr if isinstance(v, Traced) else v for k, v in values}
    return list(jaxprs_in_params(traced))


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
