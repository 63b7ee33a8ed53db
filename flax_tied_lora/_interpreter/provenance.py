"""What a jaxpr says of its values: along which axes one is one-hot, along which it may vary.

Read backwards from the value, axis by axis, through what only rearranges it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from flax_tied_lora._interpreter.jaxprs import (
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    body,
    operation_of,
)

Axes = frozenset[int]

# Hand on every entry in its place.
_IN_PLACE = frozenset(
    {"convert_element_type", "copy", "copy_p", "stop_gradient", "sharding_constraint", "reshard",
     "reduce_precision", "name"}
)  # fmt: skip
# Vary where their operands do: an entry is made of those in its place.
_FOLLOWED = _IN_PLACE | frozenset(
    {"broadcast_in_dim", "add", "sub", "mul", "neg", "eq", "ne", "lt", "le", "gt", "ge", "and",
     "or", "not", "select_n", "max", "min", "rem", "clamp"}
)  # fmt: skip


@dataclasses.dataclass
class Provenance:
    """What can be read off a jaxpr about its values.

    Attributes:
      one_hot: pairs of an operand of the jaxpr, by position, and an axis that it is one-hot along
        outside of it.
    """

    one_hot: frozenset[tuple[int, int]] = frozenset()
    _made_by: dict[Var, tuple[JaxprEqn, int]] = dataclasses.field(default_factory=dict)
    _inputs: dict[Var, int] = dataclasses.field(default_factory=dict)
    # What was found out of each variable: a value that goes into two operations is read once.
    _known: dict[tuple[str, Var], Axes] = dataclasses.field(default_factory=dict)

    def enter(self, jaxpr: Jaxpr) -> None:
        """Goes by the equations of this jaxpr from now on."""
        self._made_by = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}
        self._inputs = {v: i for i, v in enumerate(jaxpr.invars)}
        self._known = {}

    def one_hot_axes(self, var: Any) -> Axes:
        """Returns the axes along which at most one entry of an array is not zero.

        Known of what compares indices with a range, as `jax.nn.one_hot` and `jnp.eye` do, and of
        rearrangements of it. An axis that was put together of several is none of them.
        """
        return self._once("one-hot", self._one_hot, var)

    def _one_hot(self, var: Any) -> Axes:
        if not isinstance(var, Literal) and var in self._inputs:
            position = self._inputs[var]
            return frozenset(axis for i, axis in self.one_hot if i == position)
        eqn, position = self._maker(var)
        if eqn is None:
            return frozenset()
        if operation_of(eqn) == "eq":
            return self._counted_beside(eqn)  # two arrays agree in one entry at most
        if operation_of(eqn) in ("jit", "pjit"):
            pairs = ((i, a) for i, v in enumerate(eqn.invars) for a in self.one_hot_axes(v))
            inner = Provenance(frozenset(pairs))
            jaxpr = body(eqn.params["jaxpr"])
            inner.enter(jaxpr)
            return inner.one_hot_axes(jaxpr.outvars[position])
        return _handed_on(eqn, position, self.one_hot_axes)

    def _counted_axes(self, var: Any) -> Axes:
        """Returns the axes along which no two entries of an array of integers are the same."""
        return self._once("counted", self._counted, var)

    def _counted(self, var: Any) -> Axes:
        eqn, position = self._maker(var)
        if eqn is None:
            return frozenset()
        if operation_of(eqn) == "iota":
            return frozenset({eqn.params["dimension"]})
        if operation_of(eqn) in ("add", "sub"):
            return self._counted_beside(eqn)
        return _handed_on(eqn, position, self._counted_axes)

    def _counted_beside(self, eqn: JaxprEqn) -> Axes:
        """Returns the axes along which one operand counts and the other is constant."""
        first, second = eqn.invars
        return frozenset(
            axis
            for counted, other in ((first, second), (second, first))
            for axis in self._counted_axes(counted) - set(self.varying_axes(other))
        )

    def varying_axes(self, var: Any) -> tuple[int, ...]:
        """Returns the axes along which an array may vary; it is constant along the others."""
        todo = [var]  # and no recursion: thousands of operations may follow on one another
        while todo:
            eqn, _ = self._maker(todo[-1])
            read = eqn.invars if eqn is not None and operation_of(eqn) in _FOLLOWED else ()
            unknown = [v for v in read if not self._knows("varying", v)]
            todo += unknown
            if not unknown:
                self._once("varying", self._varying, todo.pop())
        return tuple(sorted(self._once("varying", self._varying, var)))

    def _varying(self, var: Any) -> Axes:
        shape = _shape(var)
        every = frozenset(i for i, n in enumerate(shape) if n != 1)
        eqn, _ = self._maker(var)
        if eqn is None:
            return every
        name = operation_of(eqn)
        if name == "iota":
            return every & {eqn.params["dimension"]}
        if name == "broadcast_in_dim":
            inner, before = self.varying_axes(eqn.invars[0]), _shape(eqn.invars[0])
            dims = eqn.params["broadcast_dimensions"]
            return frozenset(d for i, d in enumerate(dims) if i in inner and before[i] == shape[d])
        if name in _FOLLOWED:
            whole = [v for v in eqn.invars if _shape(v) == shape]  # a scalar varies along no axis
            return every & {i for v in whole for i in self.varying_axes(v)}
        return every

    def _knows(self, what: str, var: Any) -> bool:
        return isinstance(var, Literal) or (what, var) in self._known

    def _once(self, what: str, find: Callable[[Any], Axes], var: Any) -> Axes:
        """Returns what is found out of a value; of a variable it is found out once."""
        if isinstance(var, Literal):
            return find(var)
        if (what, var) not in self._known:
            self._known[what, var] = find(var)
        return self._known[what, var]

    def _maker(self, var: Any) -> tuple[JaxprEqn | None, int]:
        """Returns the equation that made a value, if one did, and which of its outputs it is."""
        return (None, 0) if isinstance(var, Literal) else self._made_by.get(var, (None, 0))


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))


def _handed_on(eqn: JaxprEqn, position: int, known: Callable[[Any], Axes]) -> Axes:
    """Returns the axes of a result that are axes of an operand of which something is known."""
    name = operation_of(eqn)
    if name == "optimization_barrier":
        return known(eqn.invars[position])
    if name in _IN_PLACE:
        return known(eqn.invars[0])
    if name in _MOVED:
        moved = _MOVED[name](eqn)
        return frozenset(moved[axis] for axis in known(eqn.invars[0]) if axis in moved)
    return frozenset()


def _transposed(eqn: JaxprEqn) -> dict[int, int]:
    return {axis: i for i, axis in enumerate(eqn.params["permutation"])}


def _squeezed(eqn: JaxprEqn) -> dict[int, int]:
    kept = [i for i in range(len(_shape(eqn.invars[0]))) if i not in eqn.params["dimensions"]]
    return {axis: i for i, axis in enumerate(kept)}


def _broadcast(eqn: JaxprEqn) -> dict[int, int]:
    before, after = _shape(eqn.invars[0]), eqn.params["shape"]
    dims = eqn.params["broadcast_dimensions"]
    return {axis: d for axis, d in enumerate(dims) if before[axis] == after[d]}


def _reshaped(eqn: JaxprEqn) -> dict[int, int]:
    """Follows the axes that are neither put together with others nor taken apart."""
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    if eqn.params.get("dimensions") is not None or 0 in before:
        return {}
    places = {(math.prod(after[:i]), n): i for i, n in enumerate(after) if n != 1}
    starts = ((math.prod(before[:axis]), n) for axis, n in enumerate(before))
    return {axis: places[start] for axis, start in enumerate(starts) if start in places}


def _cut(eqn: JaxprEqn) -> dict[int, int]:
    return {axis: axis for axis in range(len(_shape(eqn.invars[0])))}


def _gathered(eqn: JaxprEqn) -> dict[int, int]:
    """Follows the axes that a gather takes whole or a window of."""
    dims = eqn.params["dimension_numbers"]
    gone = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
    kept = [i for i in range(len(_shape(eqn.invars[0]))) if i not in gone]
    return dict(zip(kept, dims.offset_dims, strict=True))


# By name: how an operation that only rearranges moves each axis of its first operand.
_MOVED: dict[str, Callable[[JaxprEqn], dict[int, int]]] = {
    "transpose": _transposed,
    "squeeze": _squeezed,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "slice": _cut,
    "dynamic_slice": _cut,
    "rev": _cut,
    "gather": _gathered,
}
