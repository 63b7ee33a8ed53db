"""Where the values of a jaxpr come from: whether one is one-hot, along which axes it may vary."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

# Operations that hand a one-hot array on as one.
_HANDED_ON = frozenset(
    {"convert_element_type", "broadcast_in_dim", "reshape", "transpose", "squeeze", "copy",
     "stop_gradient", "optimization_barrier", "sharding_constraint", "gather"}
)  # fmt: skip


@dataclasses.dataclass
class Provenance:
    """What can be read off a jaxpr about its values.

    Attributes:
      one_hot: operands of the jaxpr, by position, that are one-hot outside of it.
    """

    one_hot: frozenset[int] = frozenset()
    _made_by: dict[Var, tuple[JaxprEqn, int]] = dataclasses.field(default_factory=dict)
    _inputs: dict[Var, int] = dataclasses.field(default_factory=dict)

    def enter(self, jaxpr: Jaxpr) -> None:
        self._made_by = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}
        self._inputs = {v: i for i, v in enumerate(jaxpr.invars)}

    def is_one_hot(self, var: Any) -> bool:
        """Returns whether an array compares indices with a range, as `jax.nn.one_hot` does."""
        if isinstance(var, Literal):
            return False
        if var in self._inputs:
            return self._inputs[var] in self.one_hot
        if var not in self._made_by:
            return False
        eqn, position = self._made_by[var]
        name = eqn.primitive.name
        if name in _HANDED_ON:
            return self.is_one_hot(eqn.invars[0])
        if name == "eq":
            return any(self._is_range(v) for v in eqn.invars)
        if name in ("jit", "pjit"):
            inner = Provenance(frozenset(i for i, v in enumerate(eqn.invars) if self.is_one_hot(v)))
            jaxpr = eqn.params["jaxpr"].jaxpr
            inner.enter(jaxpr)
            return inner.is_one_hot(jaxpr.outvars[position])
        return False

    def _is_range(self, var: Any) -> bool:
        if isinstance(var, Literal) or var not in self._made_by:
            return False
        eqn, _ = self._made_by[var]
        if eqn.primitive.name == "iota":
            return True
        return eqn.primitive.name in _HANDED_ON and self._is_range(eqn.invars[0])

    def varying_axes(self, var: Any) -> tuple[int, ...]:
        """Returns the axes along which an array may vary; it is constant along the others."""
        shape = getattr(var.aval, "shape", ())
        every = tuple(i for i, n in enumerate(shape) if n != 1)
        if isinstance(var, Literal) or var not in self._made_by:
            return every
        eqn, _ = self._made_by[var]
        if eqn.primitive.name == "broadcast_in_dim":
            inner = self.varying_axes(eqn.invars[0])
            before = getattr(eqn.invars[0].aval, "shape", ())
            after = eqn.params["shape"]
            dims = eqn.params["broadcast_dimensions"]
            return tuple(d for i, d in enumerate(dims) if i in inner and before[i] == after[d])
        if eqn.primitive.name in ("convert_element_type", "copy", "stop_gradient"):
            return self.varying_axes(eqn.invars[0])
        return every
