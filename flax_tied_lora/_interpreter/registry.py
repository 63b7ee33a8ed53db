"""One short rule for each operation that is linear in a weight, and what happens without one.

A rule is a function ``rule(context, equation, *operands)`` that returns the equation's outputs, or
`NotImplemented` where it cannot serve this form of it. At least one operand is a `Weight`; the
others are arrays. An output is an array, or a `Weight` again if the operation only rearranges.
Without a rule the weight is added up, which is always correct and always reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import JaxprEqn, Primitive

from flax_tied_lora._algebra.factor import NotServedError
from flax_tied_lora._algebra.weight import Weight

Rule = Callable[..., Any]

_RULES: dict[str, Rule] = {}
_CUSTOM: dict[str, Rule] = {}


def register_rule(operation: Any, rule: Rule | None = None) -> Any:
    """Registers how an operation is served when a symbolic weight is among its operands.

    Usable as a decorator. The rule is called ``rule(context, equation, *operands)`` and returns the
    list of the operation's outputs, or `NotImplemented` to have the weight added up after all.

    Args:
      operation: a `jax.extend.core.Primitive` or its name; or a function made with
        `jax.custom_vjp` or `jax.custom_jvp`, which without a rule gets the weight added up, so that
        its author's derivative is kept.
      rule: the rule.

    Raises:
      TypeError: ``operation`` is none of these.
      ValueError: the function closes over something: functions of one definition that differ in
        that could not be told apart.

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
    elif hasattr(operation, "defvjp") or hasattr(operation, "defjvp"):
        if getattr(operation.__wrapped__, "__closure__", None):
            raise ValueError(
                f"register_rule: {operation.__wrapped__.__name__!r} closes over "
                f"{', '.join(operation.__wrapped__.__code__.co_freevars)}; functions that differ "
                "only in that cannot be told apart in a traced program. Pass it as an argument "
                "(nondiff_argnums), or define the function at module level"
            )
        _CUSTOM[_source_of(operation.__wrapped__)] = rule
    else:
        raise TypeError(
            "register_rule: expected a jax.extend.core.Primitive, its name, or a jax.custom_vjp "
            f"or jax.custom_jvp function, got {type(operation).__name__}"
        )
    return rule


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for each of the primitives named."""

    def decorate(function: Rule) -> Rule:
        for name in names:
            register_rule(name, function)
        return function

    return decorate


def _source_of(function: Any) -> str:
    code = function.__code__
    return f"{function.__name__} at {code.co_filename}:{code.co_firstlineno}"


def find(eqn: JaxprEqn) -> Rule | None:
    """Returns the rule for an equation, or None."""
    call = eqn.params.get("call_jaxpr")
    if eqn.primitive.name in ("custom_vjp_call", "custom_jvp_call") and call is not None:
        return _CUSTOM.get(call.jaxpr.debug_info.func_src_info)
    return _RULES.get(eqn.primitive.name)


def apply(context: Any, eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Returns the outputs of an equation that has a weight among its operands."""
    found = find(eqn)
    if found is not None:
        try:
            outputs = found(context, eqn, *operands)
        except NotServedError:
            outputs = NotImplemented
        if outputs is not NotImplemented:
            return list(outputs)
    return context.run(
        eqn, [context.dense(eqn, x) if isinstance(x, Weight) else x for x in operands]
    )
