"""Programs inside an equation: traced with the parts of weights in place of weights, memoised.

Inside, leaves have stand-in names: six layers that differ only in their leaves are one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.evaluate import evaluate
from flax_tied_lora._interpreter.jaxprs import JaxprEqn, Var
from flax_tied_lora._interpreter.protocols import Evaluation
from flax_tied_lora._interpreter.provenance import Provenance
from flax_tied_lora._interpreter.sites import Read
from flax_tied_lora._tree.keys import is_key


def _rename(weight: Weight, names: Callable[[str], str]) -> Weight:
    terms = tuple(t.renamed(names) for t in weight.terms)
    origins = tuple(dataclasses.replace(o, leaf=names(o.leaf)) for o in weight.origins)
    return weight.replace(terms=terms, origins=origins)


class StandIns:
    """Stand-ins for the names of leaves, so that six layers have one structure."""

    def __init__(self) -> None:
        self.stand_ins: dict[str, str] = {}

    def hide(self, name: str) -> str:
        return self.stand_ins.setdefault(name, f"#{len(self.stand_ins)}")

    def show(self, name: str) -> str:
        return {v: k for k, v in self.stand_ins.items()}.get(name, name)


def shown_by(context: Evaluation, names: StandIns) -> dict[str, str]:
    return {hidden: context.shown.get(name, name) for name, hidden in names.stand_ins.items()}


def parts_of(operands: Sequence[Any]) -> tuple[list[Any], Any]:
    """Returns the arrays of arrays and weights, and their structure."""
    return jax.tree.flatten(list(operands))


@dataclasses.dataclass
class Rebuilt:
    """An inner program with the parts of weights in place of weights."""

    jaxpr: Any
    outputs: Any  # structure of the outputs, weights among them
    reads: list[Read]
    extra: Any = None


def rebuild(
    context: Evaluation, key: Any, body: Callable[..., tuple[list[Any], Any]],
    operands: Sequence[Any], avals: Sequence[Any], names: StandIns,
) -> Rebuilt:  # fmt: skip
    """Returns the program ``body(inner_context, *operands)`` traced on parts; memoised.

    Args:
      key: what the program depends on beside its operands' structure.
      body: returns its outputs, and anything static to be kept with the program.
      operands: arrays and weights, whose structure is used.
      avals: of the flattened operands.
    """
    _, tree = parts_of(operands)
    weights = [x for x in operands if isinstance(x, Weight)]
    # What is known of the leaves, and where a term depends on it the outer scope, goes in too.
    known = tuple((hidden, context.leaves.get(name)) for name, hidden in names.stand_ins.items())
    scoped = any(w.keyed or any(t.sites is not None for t in w.terms) for w in weights)
    full_key = (key, tree, tuple(avals), known, context.full_scope if scoped else "")
    if full_key in context.memo:
        return context.memo[full_key]
    result = Rebuilt(None, None, [])  # type: ignore[arg-type]
    leaves = {hidden: info for hidden, info in known if info is not None}

    def traced(*flat: Any) -> list[Any]:
        inner = context.inside(
            result.reads, Provenance(), leaves=leaves, shown=shown_by(context, names)
        )
        outputs, result.extra = body(inner, *jax.tree.unflatten(tree, flat))
        arrays, result.outputs = parts_of(outputs)
        return arrays

    result.jaxpr = jax.make_jaxpr(traced)(*avals)
    context.memo[full_key] = result
    return result


def met(context: Evaluation, reads: Sequence[Read], names: StandIns) -> None:
    context.met(
        [
            dataclasses.replace(
                r,
                site=dataclasses.replace(r.site, leaf=names.show(r.site.leaf)),
                groups=tuple(map(names.show, r.groups)),
            )
            for r in reads
        ]
    )


def hidden_names(operands: Sequence[Any]) -> tuple[list[Any], StandIns]:
    names = StandIns()
    return [_rename(x, names.hide) if isinstance(x, Weight) else x for x in operands], names


def shown(outputs: Sequence[Any], names: StandIns) -> list[Any]:
    return [_rename(x, names.show) if isinstance(x, Weight) else x for x in outputs]


def avals_of(operands: Sequence[Any], inner: Sequence[Var]) -> list[Any]:
    """Returns the avals of flattened operands: an array's is that of the inner program's input."""
    return [
        aval
        for x, var in zip(operands, inner, strict=True)
        for aval in (map(jax.typeof, jax.tree.leaves(x)) if isinstance(x, Weight) else [var.aval])
    ]


def one_hot_operands(
    context: Evaluation, eqn: JaxprEqn, skip: int = 0, walked: int | None = None
) -> frozenset[tuple[int, int]]:
    """Returns the operands of the inner program that are one-hot, each with an axis that it is so.

    Args:
      skip: operands of the equation before those of the inner program.
      walked: from which operand on the inner program gets a slice along the first axis.
    """
    pairs = set()
    for position, var in enumerate(eqn.invars[skip:]):
        less = walked is not None and position >= walked
        axes = context.provenance.one_hot_axes(var)
        pairs |= {(position, axis - less) for axis in axes if axis >= less}
    return frozenset(pairs)


def run_with(
    context: Evaluation,
    eqn: JaxprEqn,
    operands: Sequence[Any],
    outputs: Sequence[Any],
    **changes: Any,
) -> list[Any]:
    """Runs an equation with other operands, outputs and parameters."""
    invars = [Var(jax.typeof(x)) for x in operands]
    outvars = [Var(aval) for aval in outputs]
    effects = changes.pop("effects", eqn.effects)
    new = eqn.replace(
        invars=[*invars], outvars=outvars, params={**eqn.params, **changes}, effects=effects
    )
    return context.run(new, operands)


def evaluate_inner(
    context: Evaluation, jaxpr: Any, hot: frozenset[tuple[int, int]],
    operands: Sequence[Any],
) -> list[Any]:  # fmt: skip
    context.provenance = Provenance(hot)
    return evaluate(context, jaxpr, operands)


def handed_back(context: Evaluation, outputs: Sequence[Any]) -> list[Any]:
    return [context.returned(x) if isinstance(x, Weight) else x for x in outputs]


def is_same(a: Any, b: Any) -> bool:
    """Returns whether a weight is another, whatever has become of its random keys."""
    if not isinstance(a, Weight) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    parts = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=False)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x is y for x, y in parts if not is_key(x)
    )
