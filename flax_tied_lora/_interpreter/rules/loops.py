"""Loops with a weight inside.

A weight that a loop only carries along stays symbolic: it is taken out of the carry and read from
outside. One that the body changes is materialised before the loop. A scan over stacked weights
gives each step its slice, factor by factor; slices that it hands on as they are make the stack
again. A loop is all that its public function takes, so it is called again through that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.factor import Factor, NotServedError
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.inner import (
    evaluate_inner,
    handed_back,
    is_same,
    one_hot_operands,
)
from flax_tied_lora._interpreter.jaxprs import body as body_of
from flax_tied_lora._interpreter.jaxprs import parameters_of
from flax_tied_lora._interpreter.provenance import Provenance
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._tree.keys import is_key
from flax_tied_lora._tree.open_sizes import is_open


@rule("scan")
def scan(context, eqn, *operands):
    p, inner = parameters_of(eqn), parameters_of(eqn)["jaxpr"]
    walks = p.get("extensives", [])
    if p["length"] == 0 or walks != sorted(walks):
        raise NotServedError  # no step has a slice, or tangents follow what is walked over
    consts, init, xs = _scan_parts(eqn, operands)
    first, last = len(consts), len(consts) + len(init)
    hot = one_hot_operands(context, eqn, walked=last)
    hot = frozenset(pair for pair in hot if not first <= pair[0] < last)  # a carry may change
    stacks = [_Stack.of(x, p["length"]) if isinstance(x, Weight) else x for x in xs]
    walked = [s.walked if isinstance(s, _Stack) else s for s in stacks]
    reads: list[Any] = []
    stacked: dict[int, Any] = {}

    def loop(init: list[Any]) -> tuple[list[Any], list[Any], list[int]]:
        free, changed = _free(init), []
        counter = jnp.arange(p["length"]) if _keyed([*consts, *init]) else None

        def body(carry: list[Any], step: Any) -> tuple[list[Any], list[Any]]:
            reads.clear()
            index, slices = step
            state = _state(init, free, carry, index)
            each = [
                s.join(x) if isinstance(s, _Stack) else x
                for s, x in zip(stacks, slices, strict=True)
            ]
            within = context.inside(reads, Provenance())
            outs = evaluate_inner(within, inner, hot, [*_at_step(consts, index), *state, *each])
            changed[:] = _changed(init, state, outs)
            ys = outs[len(init) :]
            stacked.clear()
            stacked.update(
                (i, whole) for i, y in enumerate(ys) if isinstance(y, Weight)
                for whole, x in zip(xs, each, strict=True) if is_same(y, x)
            )  # fmt: skip
            return (
                handed_back(within, [outs[i] for i in free]),
                handed_back(within, [y for i, y in enumerate(ys) if i not in stacked]),
            )

        # JAX takes an open length from what is walked over only.
        length = None if is_open(p["length"]) else p["length"]
        carry, ys = lax.scan(
            body, [init[i] for i in free], (counter, walked), length,
            reverse=p["reverse"], unroll=p["unroll"],
        )  # fmt: skip
        for i in sorted(stacked):
            ys.insert(i, stacked[i])
        return carry, ys, changed

    carry, ys = _fixed_point(context, eqn, init, loop)
    context.met(reads)
    return [*carry, *ys]


@rule("while")
def while_(context, eqn, *operands):
    p, hot = eqn.params, one_hot_operands(context, eqn)
    first, last = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    test_consts, consts, init = operands[:first], operands[first:last], list(operands[last:])
    reads: list[Any] = []
    test_reads: list[Any] = []

    def loop(init: list[Any]) -> tuple[list[Any], list[Any], list[int]]:
        free, changed = _free(init), []
        counter = jnp.zeros((), jnp.int32) if _keyed([*test_consts, *consts, *init]) else None

        def run(jaxpr: Any, constants: Any, warm: Any, met: list[Any], carry: Any) -> Any:
            met.clear()
            index, values = carry
            state = _state(init, free, values, index)
            within = context.inside(met, Provenance())
            outs = evaluate_inner(within, jaxpr, warm, [*_at_step(constants, index), *state])
            return within, state, outs

        def test(carry: Any) -> Any:
            warm = frozenset((i, axis) for i, axis in hot if i < first)
            within, _, outs = run(p["cond_jaxpr"], test_consts, warm, test_reads, carry)
            return handed_back(within, outs)[0]

        def body(carry: Any) -> Any:
            warm = frozenset((i - first, axis) for i, axis in hot if first <= i < last)
            within, state, outs = run(p["body_jaxpr"], consts, warm, reads, carry)
            changed[:] = _changed(init, state, outs)
            index = None if carry[0] is None else carry[0] + 1
            return index, handed_back(within, [outs[i] for i in free])

        _, values = lax.while_loop(test, body, (counter, [init[i] for i in free]))
        return values, [], changed

    carry, _ = _fixed_point(context, eqn, init, loop)
    context.met(test_reads + reads)
    return carry


def _fixed_point(
    context: Any, eqn: Any, init: list[Any],
    loop: Callable[[list[Any]], tuple[list[Any], list[Any], list[int]]],
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """Runs a loop whose carried weights are all unchanged; materialises those that are not.

    Args:
      loop: runs the loop; returns the carry without its weights, the other outputs, and the
        positions of the weights that the body changed.
    """
    # Found out on shapes alone: nothing of a pass that is thrown away is run.
    while any(isinstance(x, Weight) for x in init):
        changed: list[int] = []
        jax.eval_shape(lambda init=init, changed=changed: changed.extend(loop(init)[2]))
        if not changed:
            break
        init = [context.dense(eqn, x) if i in changed else x for i, x in enumerate(init)]
    values, others, _ = loop(init)
    carried = iter(values)
    return [x if isinstance(x, Weight) else next(carried) for x in init], others


def _scan_parts(eqn: Any, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns a scan's constants, carry and what it walks over.

    JAX's releases differ in how they say so; an axis more than in the body tells as well.
    """
    inner = body_of(parameters_of(eqn)["jaxpr"])

    def walks(outer: Any, within: Any) -> bool:
        return len(outer.aval.shape) > len(within.aval.shape)

    steps = sum(map(walks, eqn.invars, inner.invars))
    carried = sum(not walks(o, i) for o, i in zip(eqn.outvars, inner.outvars, strict=True))
    last = len(operands) - steps
    values = list(operands)
    return values[: last - carried], values[last - carried : last], values[last:]


def _free(init: Sequence[Any]) -> list[int]:
    return [i for i, x in enumerate(init) if not isinstance(x, Weight)]


def _at_step(operands: Sequence[Any], index: Any) -> list[Any]:
    """Returns operands with the random keys of weights folded for a step of the loop."""
    if index is None:
        return list(operands)
    return [x.fold(index) if isinstance(x, Weight) else x for x in operands]


def _state(init: Sequence[Any], free: Sequence[int], carry: Sequence[Any], index: Any) -> list[Any]:
    """Returns the whole carry: its weights from outside, the rest from the loop."""
    values = dict(zip(free, carry, strict=True))
    return [values.get(i, x) for i, x in enumerate(_at_step(init, index))]


def _changed(init: Sequence[Any], state: Sequence[Any], outs: Sequence[Any]) -> list[int]:
    return [
        i for i, x in enumerate(init) if isinstance(x, Weight) and not is_same(outs[i], state[i])
    ]


def _keyed(operands: Sequence[Any]) -> bool:
    return any(isinstance(x, Weight) and x.keyed for x in operands)


@dataclasses.dataclass
class _Stack:
    """A weight with a leading axis that a scan walks over.

    Attributes:
      parts: its arrays; what is walked over has that axis in front.
      walks: for each of them, whether it is walked over. The others are the same at each step.
      tree: structure of one step's weight.
    """

    parts: list[Array]
    walks: list[bool]
    tree: Any

    @property
    def walked(self) -> list[Array]:
        return [a for a, walks in zip(self.parts, self.walks, strict=True) if walks]

    def join(self, slices: Sequence[Array]) -> Weight:
        """Returns one step's weight from that step's slices."""
        each = iter(slices)
        parts = [next(each) if w else a for a, w in zip(self.parts, self.walks, strict=True)]
        return jax.tree.unflatten(self.tree, parts)

    @classmethod
    def of(cls, weight: Weight, length: int) -> _Stack:
        whole = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
        one = jax.ShapeDtypeStruct(weight.shape[1:], weight.dtype)
        same = [(i,) for i in range(len(weight.shape))]
        mark: Any = object()

        def front(factor: Factor) -> Factor:
            return factor.ordered((0, *(a for a in factor.axes if a != 0)))

        def step(factor: Factor) -> Factor:
            if 0 in factor.axes:
                factor = Factor(factor.array[0], factor.axes[1:])
            return factor.relabel(lambda axis: axis - 1)

        def first(weight: Weight) -> Weight:
            moved = weight.rearrange(one, step, same[1:])
            return jax.tree.map(lambda a: a[0] if is_key(a) else a, moved)

        keyed = weight.replace(terms=tuple(t.fold(jnp.arange(length)) for t in weight.terms))
        stacked = keyed.rearrange(whole, front, same)
        marked = stacked.rearrange(
            whole, lambda f: Factor(mark if 0 in f.axes else f.array, f.axes), same
        )
        return cls(
            jax.tree.leaves(stacked),
            [leaf is mark or is_key(leaf) for leaf in jax.tree.leaves(marked)],
            jax.tree.structure(jax.eval_shape(first, stacked)),
        )
