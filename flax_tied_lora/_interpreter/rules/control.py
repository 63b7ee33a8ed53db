"""Operations that carry a program inside: the program is evaluated with symbolic weights.

The equation itself is kept: its operands and its inner jaxpr are replaced, nothing is called
again through its public function, so that a differentiated `checkpoint` keeps its barriers and a
layer that is called six times stays one function.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from flax_tied_lora._algebra.term import Dense
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.inner import (
    Rebuilt,
    avals_of,
    evaluate_inner,
    handed_back,
    hidden_names,
    met,
    one_hot_operands,
    parts_of,
    rebuild,
    run_with,
    shown,
    shown_by,
)
from flax_tied_lora._interpreter.jaxprs import (
    Jaxpr,
    Var,
    applied,
    body,
    jaxpr_as_fun,
    opened,
    parameters_of,
)
from flax_tied_lora._interpreter.provenance import Provenance
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._interpreter.sites import Read


@functools.cache
def _unspecified() -> Any:
    """Returns JAX's mark for a sharding that `jax.jit` was not told."""
    eqn = jax.make_jaxpr(jax.jit(lambda x: x))(0.0).eqns[0]
    return eqn.params["in_shardings"][0]


@rule("jit", "pjit")
def jit(context, eqn, *operands):
    inner, (hidden, names) = eqn.params["jaxpr"], hidden_names(operands)
    hot = one_hot_operands(context, eqn)
    built = rebuild(
        context, ("jit", inner, hot), lambda c, *xs: (evaluate_inner(c, inner, hot, xs), None),
        hidden, avals_of(hidden, body(inner).invars), names,
    )  # fmt: skip
    met(context, built.reads, names)
    flat, _ = parts_of(hidden)
    unspecified = _unspecified()

    def repeated(values: Sequence[Any], xs: Sequence[Any], other: Any) -> tuple[Any, ...]:
        """A parameter for each part: the dense part keeps the weight's, the factors have none."""
        return tuple(
            value if not isinstance(x, Weight) or dense else other
            for value, x in zip(values, xs, strict=True)
            for dense in (_dense_parts(x) if isinstance(x, Weight) else [True])
        )

    outs = jax.tree.unflatten(built.outputs, built.jaxpr.out_avals)
    changes = {}
    for name, xs, other in (
        ("in_shardings", hidden, unspecified), ("in_layouts", hidden, None),
        ("out_shardings", outs, unspecified), ("out_layouts", outs, None),
    ):  # fmt: skip
        if name in eqn.params:
            changes[name] = repeated(eqn.params[name], xs, other)
    # Parts of a weight are shared with other call sites: never donated.
    changes["donated_invars"] = tuple(
        given and not isinstance(x, Weight)
        for given, x in zip(eqn.params["donated_invars"], hidden, strict=True)
        for _ in (jax.tree.leaves(x) if isinstance(x, Weight) else [x])
    )
    results = run_with(
        context, eqn, flat, built.jaxpr.out_avals, jaxpr=built.jaxpr,
        effects=built.jaxpr.effects, **changes,
    )  # fmt: skip
    results = _forwarded(body(built.jaxpr), flat, results, outs)
    return shown(jax.tree.unflatten(built.outputs, results), names)


def _forwarded(
    jaxpr: Jaxpr, operands: Sequence[Any], results: Sequence[Any], outputs: Sequence[Any]
) -> list[Any]:
    """Returns results, what was merely handed through of a weight being what went in."""
    positions = {v: i for i, v in enumerate(jaxpr.invars)}
    of_weight = [isinstance(x, Weight) for x in outputs for _ in jax.tree.leaves(x)]
    return [
        operands[positions[v]] if part and isinstance(v, Var) and v in positions else x
        for v, x, part in zip(jaxpr.outvars, results, of_weight, strict=True)
    ]


def _dense_parts(weight: Weight) -> list[bool]:
    flags = [
        isinstance(term, Dense) and term.factor.in_order()
        for term in weight.terms for _ in jax.tree.leaves(term)
    ]  # fmt: skip
    return flags + [False] * len(jax.tree.leaves(weight.scale))


@rule("checkpoint", "remat", "remat2")
def checkpoint(context, eqn, *operands):
    p, (hidden, names) = parameters_of(eqn), hidden_names(operands)
    inner, keeps = p["jaxpr"], p["prevent_cse"]
    hot = one_hot_operands(context, eqn)
    built = rebuild(
        context, ("checkpoint", inner, hot),
        lambda c, *xs: (evaluate_inner(c, inner, hot, xs), None),
        hidden, avals_of(hidden, body(inner).invars), names,
    )  # fmt: skip
    met(context, built.reads, names)
    flat, _ = parts_of(hidden)
    if isinstance(keeps, tuple):  # one for each operand
        pairs = zip(keeps, hidden, strict=True)
        keeps = tuple(kept for kept, x in pairs for _ in jax.tree.leaves(x))
    if applied(eqn) is not None:
        again = jax.checkpoint(jaxpr_as_fun(built.jaxpr), prevent_cse=keeps, policy=p["policy"])
        results = again(*flat)
    else:
        program, consts = opened(built.jaxpr)
        if isinstance(keeps, tuple):
            keeps = (*[False] * len(consts), *keeps)
        results = run_with(
            context, eqn, [*consts, *flat], built.jaxpr.out_avals,
            jaxpr=program, prevent_cse=keeps, effects=program.effects,
        )  # fmt: skip
    outs = jax.tree.unflatten(built.outputs, built.jaxpr.out_avals)
    results = _forwarded(body(built.jaxpr), flat, results, outs)
    return shown(jax.tree.unflatten(built.outputs, results), names)


@rule("cond")
def cond(context, eqn, index, *operands):
    branches, (hidden, names) = eqn.params["branches"], hidden_names(operands)
    hot = one_hot_operands(context, eqn, skip=1)
    avals = avals_of(hidden, body(branches[0]).invars)
    flat, _ = parts_of(hidden)

    def build(symbolic: tuple[bool, ...]) -> list[Rebuilt]:
        def serve(branch: Any, c: Any, *xs: Any) -> tuple[list[Any], Any]:
            outs = zip(evaluate_inner(c, branch, hot, xs), symbolic, strict=True)
            return [x if keep else handed_back(c, [x])[0] for x, keep in outs], None

        return [
            rebuild(
                context, ("cond", branch, hot, symbolic), functools.partial(serve, branch),
                hidden, avals, names,
            )
            for branch in branches
        ]  # fmt: skip

    # A result stays a weight where all branches make one of the same structure.
    probes = [
        jax.tree.unflatten(b.outputs, b.jaxpr.out_avals)
        for b in build((True,) * len(body(branches[0]).outvars))
    ]
    symbolic = tuple(_alike(outs) for outs in zip(*probes, strict=True))
    built = build(symbolic)
    for b in built:
        met(context, b.reads, names)
    results = run_with(
        context, eqn, [index, *flat], built[0].jaxpr.out_avals,
        branches=tuple(b.jaxpr for b in built),
        effects=frozenset().union(*(b.jaxpr.effects for b in built)),
    )  # fmt: skip
    return shown(jax.tree.unflatten(built[0].outputs, results), names)


def _alike(values: Sequence[Any]) -> bool:
    if not all(isinstance(v, Weight) for v in values):
        return not any(isinstance(v, Weight) for v in values)
    first, *others = (jax.tree.flatten(v) for v in values)
    return all(first == other for other in others)


@rule("shard_map")
def shard_map(context, eqn, *operands):
    p, (hidden, names) = eqn.params, hidden_names(operands)
    axes = "newly_manual_axes" if "newly_manual_axes" in p else "manual_axes"  # the older name
    reads: list[Read] = []
    inner = context.inside(
        reads, Provenance(),
        leaves={h: context.leaves[n] for n, h in names.stand_ins.items() if n in context.leaves},
        shown=shown_by(context, names),
    )  # fmt: skip
    hot = one_hot_operands(context, eqn)
    if not p["check_vma"] and any(isinstance(x, Weight) and x.keyed for x in operands):
        raise ValueError(
            "adapt: dropout is on inside a shard_map with check_vma=False, where it is not known "
            "which devices hold the same data and so need the same mask; use check_vma=True, or "
            "turn dropout off with adapted.eval()"
        )

    def local_body(*xs: Any) -> list[Any]:
        shapes = [tuple(v.aval.shape) for v in p["jaxpr"].invars]
        local = [
            x.replace(shape=s) if isinstance(x, Weight) else x
            for x, s in zip(xs, shapes, strict=True)
        ]
        reads.clear()
        return handed_back(inner, evaluate_inner(inner, p["jaxpr"], hot, local))

    specs = [
        _specs(x, spec) if isinstance(x, Weight) else spec
        for x, spec in zip(hidden, p["in_specs"], strict=True)
    ]
    outputs = jax.shard_map(
        local_body, mesh=p["mesh"], in_specs=tuple(specs), out_specs=list(p["out_specs"]),
        axis_names=set(p[axes]), check_vma=p["check_vma"],
    )(*hidden)  # fmt: skip
    met(context, reads, names)
    return outputs


def _specs(weight: Weight, spec: Any) -> Weight:
    """Returns a weight with specs in place of arrays: each factor axis as the weight's."""
    whole = (*spec, *[None] * (len(weight.shape) - len(spec)))
    marked = weight.rearrange(
        jax.ShapeDtypeStruct(weight.shape, weight.dtype),
        lambda factor: dataclasses.replace(
            factor, array=jax.P(*(whole[a] if isinstance(a, int) else None for a in factor.axes))
        ),
        [(i,) for i in range(len(weight.shape))],
    )
    return jax.tree.map(
        lambda x: x if isinstance(x, jax.P) else jax.P(),
        marked,
        is_leaf=lambda x: isinstance(x, jax.P),
    )
