"""`custom_rule`: a function that carries with it how it is served, known by identity."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax.interpreters import ad, batching, mlir

from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.jaxprs import (
    JaxprEqn,
    Primitive,
    body,
    closed,
    jaxpr_as_fun,
    opened,
    programs_inside,
)
from flax_tied_lora._interpreter.protocols import Rule
from flax_tied_lora._interpreter.tracing import Calls, filling, is_traced

P = ParamSpec("P")
R = TypeVar("R")

NAME = "custom_rule"

# Operands: the arrays that the function closes over, and those among its arguments. Parameters:
# ``jaxpr``, its program on these; ``call``, a `_Call`.
custom_rule_p = Primitive(NAME)
custom_rule_p.multiple_results = True


def custom_rule(fn: Callable[P, R], rule: Rule) -> Callable[P, R]:
    """Returns ``fn`` with a rule for how `adapt` serves it where a symbolic weight enters it.

    To everything else it is ``fn``: its derivatives, `jax.vmap` and compiled programs are those of
    ``fn``. Its identity is the function returned here, so that closures, lambdas, partials and
    functions that differ only in their derivative are all told apart. Through `jax.vmap`, which the
    rule knows nothing of, it is ``fn`` alone, and its weights are materialised.

    Args:
      fn: a function of arrays, pytrees of them and anything else; only arrays are traced. Usually
        one made with `jax.custom_vjp`, whose derivatives are to be kept.
      rule: called as ``rule(context, equation, *args, **kwargs)`` with the arguments of ``fn``,
        weights among their arrays symbolic. Returns what ``fn`` returns, or `NotImplemented` to
        have the weights materialised.

    Raises:
      TypeError: ``fn`` or ``rule`` is no function.

    Example::

      def served(context, equation, hidden, table):
          # The same in plain JAX; the table stays symbolic in it.
          return context.evaluate(my_plain_loss, hidden, table)

      my_fused_loss = tied_lora.custom_rule(my_fused_loss, served)
    """
    for name, function in {"fn": fn, "rule": rule}.items():
        if not callable(function):
            raise TypeError(
                f"custom_rule: {name} is a {type(function).__name__}; expected a function"
            )

    @functools.wraps(fn, updated=())
    def ruled(*args: P.args, **kwargs: P.kwargs) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        places = [i for i, x in enumerate(leaves) if is_traced(x)]
        fill = filling(tree, leaves, places)
        arrays = [leaves[i] for i in places]
        traced, outputs = Calls(fn, fill).jaxpr([jax.typeof(x) for x in arrays])
        left = [None if i in places else x for i, x in enumerate(leaves)]
        jaxpr, consts = opened(traced)
        call = _Call(rule, filling(tree, left, places), len(consts))
        results = custom_rule_p.bind(*consts, *arrays, jaxpr=closed(jaxpr), call=call)
        return outputs.filled(results)

    return ruled


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """A call of a function that has a rule.

    Attributes:
      rule: of the function.
      arguments: returns ``(args, kwargs)`` from the arrays among them.
      closed_over: number of operands that are no arguments.
    """

    rule: Rule
    arguments: Callable[[Sequence[Any]], tuple[Any, Any]]
    closed_over: int


def served(context: Any, eqn: Any, *operands: Any) -> Any:
    """Returns what the rule of a function returns for a call of it: the rule of the primitive."""
    call: _Call = eqn.params["call"]
    closed_over, arrays = operands[: call.closed_over], operands[call.closed_over :]
    if any(isinstance(x, Weight) for x in closed_over):
        return NotImplemented  # the rule is not given it
    args, kwargs = call.arguments(arrays)
    outputs = call.rule(context, eqn, *args, **kwargs)
    if outputs is NotImplemented:
        return NotImplemented
    return jax.tree.leaves(outputs, is_leaf=lambda x: isinstance(x, Weight))


def carried(eqn: JaxprEqn) -> Rule | None:
    """Returns the rule of a call whose program is a call of a function that has one, or None.

    So a derivative of its own can be around the function: `jax.custom_vjp` and its like.
    """
    program = body(programs_inside(eqn)[0])
    if [e.primitive.name for e in program.eqns] != [NAME]:
        return None
    (inner,) = program.eqns
    places: dict[Any, int] = {v: i for i, v in enumerate(program.invars)}
    results: dict[Any, int] = {v: i for i, v in enumerate(inner.outvars)}
    if not all(v in places for v in inner.invars) or not all(v in results for v in program.outvars):
        return None  # a constant, or an operand that is handed back

    def rule(context: Any, equation: Any, *operands: Any) -> Any:
        outputs = served(context, inner, *[operands[places[v]] for v in inner.invars])
        if outputs is NotImplemented:
            return NotImplemented
        return [outputs[results[v]] for v in program.outvars]

    return rule


# To every transformation the operation is the program inside.


def _computed(*operands: Any, jaxpr: Any, call: _Call) -> list[Any]:
    return jaxpr_as_fun(jaxpr)(*operands)


custom_rule_p.def_impl(_computed)
# Asked for where the program inside applies a `HiPrim`.
custom_rule_p.to_lojax = _computed
mlir.register_lowering(custom_rule_p, mlir.lower_fun(_computed, multiple_results=True))


@custom_rule_p.def_effectful_abstract_eval
def _abstract(*operands: Any, jaxpr: Any, call: _Call) -> Any:
    return jaxpr.out_avals, jaxpr.effects


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, jaxpr: Any, call: _Call) -> Any:
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def of_moving(*values: Any) -> list[Any]:
        operands = list(primals)
        for i, value in zip(moving, values, strict=True):
            operands[i] = value
        return jaxpr_as_fun(jaxpr)(*operands)

    return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])


ad.primitive_jvps[custom_rule_p] = _jvp


def _batched(
    operands: Sequence[Any], axes: Sequence[int | None], *, jaxpr: Any, call: _Call
) -> Any:
    outputs = jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(axes))(*operands)
    return outputs, [0] * len(outputs)


batching.primitive_batchers[custom_rule_p] = _batched
