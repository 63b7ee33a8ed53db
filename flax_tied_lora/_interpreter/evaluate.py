"""The evaluator: runs a jaxpr in which some values are symbolic weights.

The loop only. What an operation does with a weight is a rule (`rules/`); equations that touch no
weight run as they are. Follows `jax.core.eval_jaxpr`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax

from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.equations import last_uses, run, variables
from flax_tied_lora._interpreter.jaxprs import Literal as Constant
from flax_tied_lora._interpreter.jaxprs import Var, body, constants
from flax_tied_lora._interpreter.protocols import Evaluation


def evaluate(context: Evaluation, program: Any, args: Sequence[Any]) -> list[Any]:
    """Returns the outputs of a program; arguments and outputs are arrays or weights."""
    jaxpr = body(program)
    env: dict[Var, Any] = dict(zip(jaxpr.constvars, constants(program), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    context.provenance.enter(jaxpr)
    last_use = last_uses(jaxpr)
    weights = {var for var, value in env.items() if isinstance(value, Weight)}
    eqns = jaxpr.eqns

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Constant) else env[var]

    def keep(start: int, stop: int, made: Sequence[Var], values: Sequence[Any]) -> None:
        """Keeps what equations made, and lets go of what nothing after them reads."""
        env.update(zip(made, values, strict=True))
        weights.update(v for v, x in zip(made, values, strict=True) if isinstance(x, Weight))
        for var in variables(eqns[start:stop]):
            if last_use[var] < stop:
                env.pop(var, None)

    def run_untouched(start: int, stop: int) -> None:
        if start == stop:
            return
        made = dict.fromkeys(v for eqn in eqns[start:stop] for v in eqn.outvars)
        wanted = [v for v in made if last_use[v] >= stop]
        taken = {v: env[v] for v in variables(eqns[start:stop]) if v not in made}
        keep(start, stop, wanted, run(eqns[start:stop], taken, wanted))

    # Equations that nothing touched run together: one at a time they take several times as long.
    start = 0
    for index, eqn in enumerate(eqns):
        if weights.isdisjoint(v for v in eqn.invars if isinstance(v, Var)):
            continue
        run_untouched(start, index)
        start = index + 1
        operands = [read(v) for v in eqn.invars]
        context.here = str(eqn.source_info.name_stack)
        folded = [x.fold(index) if isinstance(x, Weight) else x for x in operands]
        with eqn.ctx.manager, _named(context.here):
            outputs = context.apply(eqn, folded)
        context.here = ""
        keep(index, start, eqn.outvars, outputs)
    run_untouched(start, len(eqns))
    return [read(v) for v in jaxpr.outvars]


def _named(scope: str) -> contextlib.AbstractContextManager[Any]:
    return jax.named_scope(scope) if scope else contextlib.nullcontext()
