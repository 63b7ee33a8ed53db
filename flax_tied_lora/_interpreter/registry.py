"""One short rule for each operation that is linear in a weight, and what happens without one.

A rule is a function ``rule(context, equation, *operands)`` that returns the equation's outputs, or
`NotImplemented` where it cannot serve this form of it. At least one operand is a `Weight`; the
others are arrays. An output is an array, or a `Weight` again if the operation only rearranges.
Without a rule the weight is materialised, which is always correct and always reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import jax

from flax_tied_lora._algebra.factor import NotServedError
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.custom_rule import NAME, carried, custom_rule, served
from flax_tied_lora._interpreter.jaxprs import JaxprEqn, Primitive, operation_of
from flax_tied_lora._interpreter.protocols import Rule, RuleContext
from flax_tied_lora._interpreter.same_function import CUSTOM_CALLS, is_call_of
from flax_tied_lora._tree.foreign import loaded_type

R = TypeVar("R", bound=Rule)
# What jax.custom_vjp returns has no public type.
Operation = Primitive | str | Callable[..., Any]

_RULES: dict[str, Rule] = {NAME: served}
_CUSTOM: dict[Callable[..., Any], Rule] = {}


@overload
def register_rule(operation: Operation, rule: None = None) -> Callable[[R], R]: ...
@overload
def register_rule(operation: Operation, rule: R) -> R: ...
def register_rule(operation: Operation, rule: Any = None) -> Any:
    """Registers how an operation is served when a symbolic weight is among its operands.

    Usable as a decorator. The rule is called ``rule(context, equation, *operands)`` and returns the
    list of the operation's outputs, or `NotImplemented` to have the weight materialised after all.

    A traced program does not say which `jax.custom_vjp` or `jax.custom_jvp` function it calls. The
    rule of one is used where program and derivative of the call are those of the function on the
    same arrays. A call through `jax.vmap`, or with anything but arrays, is not recognised: its
    weights are materialised. `custom_rule` makes a function that carries its rule with it.

    Args:
      operation: a `jax.extend.core.Primitive` or its name, ``"module.class"`` for a
        `jax.experimental.hijax.HiPrim`; or a function made with `jax.custom_vjp` or
        `jax.custom_jvp` that takes arrays one by one. Without a rule the weight that enters it is
        materialised, so that its author's derivative is kept. Or what
        ``equinox.filter_custom_vjp`` made: its ``fn`` is then a `custom_rule`, so that each call
        is known, and the rule gets what it was called with, as a rule of `custom_rule` does.
      rule: the rule.

    Raises:
      TypeError: ``operation`` is none of these.
      ValueError: the function closes over something, or has arguments that are not traced
        (``nondiff_argnums``), so that a traced program does not show all that a call depends on.

    Example::

      @tied_lora.register_rule(my_fused_loss)          # a jax.custom_vjp of (hidden, table)
      def _(context, equation, hidden, table):
          # The same in plain JAX; the table stays symbolic in it.
          return [context.evaluate(my_plain_loss, hidden, table)]
    """
    if rule is None:
        return lambda function: register_rule(operation, function)
    if isinstance(operation, Primitive):
        _RULES[operation.name] = rule
    elif isinstance(operation, str):
        _RULES[operation] = rule
    elif isinstance(operation, jax.custom_vjp | jax.custom_jvp):
        _refuse_hidden_inputs(operation)
        _CUSTOM[operation] = rule
    elif isinstance(operation, loaded_type("equinox", "filter_custom_vjp")):
        filtered: Any = operation
        filtered.fn = custom_rule(filtered.fn, rule)
    else:
        raise TypeError(
            "register_rule: expected a jax.extend.core.Primitive, its name, or a jax.custom_vjp "
            f"or jax.custom_jvp function, got {type(operation).__name__}; a function of any other "
            "kind gets its rule by tied_lora.custom_rule(function, rule)"
        )
    return rule


def _refuse_hidden_inputs(function: Any) -> None:
    """Refuses a function that depends on more than the operands of its calls."""
    wrapped = function.__wrapped__
    name = getattr(wrapped, "__name__", repr(wrapped))
    remedy = "use tied_lora.custom_rule(function, rule), which knows its function"
    if getattr(wrapped, "__closure__", None):
        raise ValueError(
            f"register_rule: {name!r} closes over {', '.join(wrapped.__code__.co_freevars)}; "
            "functions that differ in what they close over cannot always be recognised in a "
            f"traced program. Define the function at module level, or {remedy}"
        )
    if function.nondiff_argnums:
        raise ValueError(
            f"register_rule: {name!r} has nondiff_argnums={tuple(function.nondiff_argnums)}, "
            f"which its calls in a traced program do not show; {remedy}"
        )


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for each of the primitives named."""

    def decorate(function: Rule) -> Rule:
        for name in names:
            register_rule(name, function)
        return function

    return decorate


def find(eqn: JaxprEqn) -> Rule | None:
    """Returns the rule for an equation, or None."""
    name = operation_of(eqn)
    if name in CUSTOM_CALLS:
        known = next((rule for f, rule in _CUSTOM.items() if is_call_of(eqn, f)), None)
        if found := known or carried(eqn):
            return found
    return _RULES.get(name)


def apply(context: RuleContext, eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Returns the outputs of an equation that has a weight among its operands.

    Raises:
      ValueError: its rule returned other outputs than it has.
    """
    found = find(eqn)
    if found is not None:
        try:
            outputs = found(context, eqn, *operands)
        except NotServedError:
            outputs = NotImplemented
        if outputs is not NotImplemented:
            return _checked(eqn, outputs)
    return context.run(
        eqn, [context.dense(eqn, x) if isinstance(x, Weight) else x for x in operands]
    )


def _checked(eqn: JaxprEqn, outputs: Any) -> list[Any]:
    """Returns what a rule returned, having checked that these are an equation's outputs."""
    shapes = [getattr(v.aval, "shape", ()) for v in eqn.outvars]
    if not isinstance(outputs, list | tuple):
        found = f"a {type(outputs).__name__}"
    elif (given := [*map(_shape, outputs)]) != shapes:
        found = f"outputs of shapes {given}"
    else:
        return list(outputs)
    raise ValueError(
        f"adapt: the rule for {operation_of(eqn)!r} returned {found}; expected a list of outputs "
        f"of shapes {shapes}, or NotImplemented"
    )


def _shape(value: Any) -> tuple[int, ...]:
    """Returns the shape of a weight, or of a value of any type that JAX was told of."""
    shape = getattr(value, "shape", None)  # of a weight or an array; jax.typeof takes longer
    return getattr(jax.typeof(value), "shape", ()) if shape is None else shape
