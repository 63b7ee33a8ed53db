"""What a program costs: the FLOPs of its products, and the bytes of their results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from flax_tied_lora._algebra.factor import accumulator
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.jaxprs import (
    Jaxpr,
    JaxprEqn,
    body,
    operation_of,
    parameters_of,
    programs_inside,
)
from flax_tied_lora._tree.open_sizes import is_open, supposed


class Cost(NamedTuple):
    """What a program costs.

    Attributes:
      flops: of its products.
      bytes: of their results before they are cast; none for what a loop makes a part at a time.
    """

    flops: int = 0
    bytes: int = 0

    def without(self, part: Cost) -> Cost:
        """Returns what is left of it, none being less than nothing."""
        return Cost(
            *(n - m if is_open(n - m) else max(n - m, 0) for n, m in zip(self, part, strict=True))
        )


_COSTS: dict[str, Callable[[JaxprEqn], Cost]] = {}


def cost_of(*names: str) -> Callable[[Callable[[JaxprEqn], Cost]], Callable[[JaxprEqn], Cost]]:
    """Registers what an equation of the primitives named costs."""

    def decorate(function: Callable[[JaxprEqn], Cost]) -> Callable[[JaxprEqn], Cost]:
        _COSTS.update(dict.fromkeys(names, function))
        return function

    return decorate


def total(costs: Iterable[Cost]) -> Cost:
    """Returns the sum of costs."""
    costs = list(costs)
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))


def cost(jaxpr: Jaxpr) -> Cost:
    """Returns what a program costs."""
    return total(_of_equation(eqn) for eqn in jaxpr.eqns)


def cost_beyond_plain(serve: Callable[[Sequence[Any]], Any], operands: Sequence[Any]) -> Cost:
    """Returns what serving an equation costs beyond the same without adapters.

    Args:
      serve: serves it on arrays and weights.
    """

    def of(operands: Sequence[Any]) -> Cost:
        avals = jax.tree.map(jax.typeof, list(operands))
        return cost(body(jax.make_jaxpr(serve)(avals)))

    plain = [_without_adapters(x) if isinstance(x, Weight) else x for x in operands]
    served, unadapted = of(operands), of(plain)
    return Cost(served.flops - unadapted.flops, served.bytes - unadapted.bytes)


def _without_adapters(weight: Weight) -> Weight:
    frozen: Any = next(t for t in weight.terms if t.whole or t.stored)
    return weight.replace(terms=(dataclasses.replace(frozen, sites=None),), scale=None)


def _of_equation(eqn: JaxprEqn) -> Cost:
    name = operation_of(eqn)
    if name in _COSTS:
        return _COSTS[name](eqn)
    inner = [cost(body(jaxpr)) for jaxpr in programs_inside(eqn)]
    if name == "cond":
        # Branches for several platforms differ in form: the CPU's, as it is first.
        return inner[0] if "branches_platforms" in eqn.params else max(inner, key=_size)
    if name in ("scan", "while"):
        return Cost(total(inner).flops * parameters_of(eqn).get("length", 1))
    return total(inner)


def _size(of: Cost) -> tuple[int, ...]:
    return tuple(map(supposed, of))


def _product(eqn: JaxprEqn, contracting: Sequence[int], operand: int = 0) -> Cost:
    """Returns what a product costs that sums over axes of one of its operands."""
    summed: Any = eqn.invars[operand].aval
    out: Any = eqn.outvars[0].aval
    flops = 2 * out.size * math.prod(summed.shape[i] for i in contracting)
    return Cost(flops, out.size * accumulator(out.dtype).itemsize)


@cost_of("dot_general")
def _dot_general(eqn: JaxprEqn) -> Cost:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    return _product(eqn, contracting)


@cost_of("ragged_dot_general", "ragged_dot")
def _ragged_dot(eqn: JaxprEqn) -> Cost:
    (contracting, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return _product(eqn, contracting)


@cost_of("conv_general_dilated")
def _convolution(eqn: JaxprEqn) -> Cost:
    _, *summed = eqn.params["dimension_numbers"].rhs_spec
    return _product(eqn, summed, operand=1)
