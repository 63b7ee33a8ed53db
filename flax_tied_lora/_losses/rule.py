"""The rule of this library's loss: its table goes into it in parts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from flax_tied_lora._algebra.factor import NotServedError
from flax_tied_lora._algebra.site_filter import PROJECTION
from flax_tied_lora._algebra.term import Dense
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.costs import Cost, cost, cost_of
from flax_tied_lora._interpreter.jaxprs import body
from flax_tied_lora._interpreter.provenance import Provenance
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._losses.loss import Loss
from flax_tied_lora._losses.primitive import NAME, bind, computed, linear_cross_entropy_p
from flax_tied_lora._tree.open_sizes import supposed


@rule(NAME)
def linear_cross_entropy(context, eqn, *operands):
    """Cross-entropy of a projection, whose gradients are formed for each part of the table."""
    loss, mapped = eqn.params["loss"], eqn.params["mapped"]
    *others, table = operands
    if loss.table.num_leaves != 1:
        raise NotServedError  # it has been given in parts already
    if isinstance(others[0], Weight):
        raise NotServedError
    others = [context.dense(eqn, x) if isinstance(x, Weight) else x for x in others]
    if not isinstance(table, Weight):
        return [linear_cross_entropy_p.bind(*others, table, **eqn.params)]
    if any(level[-1] for level in mapped):
        # A table for each example: in plain JAX, which computes logits again for its gradients.
        plain = functools.partial(computed, loss=loss, mapped=mapped)
        return [context.evaluate(plain, *others, table)]
    if _has_to_be_dense(context, loss, others[0], table):
        raise NotServedError
    width = 1 - loss.vocab_axis
    terms = context.read(NAME, table, PROJECTION, rows=[width], cols=[loss.vocab_axis])
    # Within the loss there is one call site, which all terms that are left are for.
    table = table.replace(terms=tuple(dataclasses.replace(t, sites=None) for t in terms))
    if _is_array(table):
        (term,) = table.terms
        return [bind(loss, [*others, term.dense(table.shape, table.dtype)], mapped)]
    leaves, parts = jax.tree.flatten(table)
    flags = tuple((*level[:-1], *[False] * len(leaves)) for level in mapped)
    return [bind(dataclasses.replace(loss, table=parts), [*others, *leaves], flags)]


def _is_array(table: Weight) -> bool:
    return len(table.terms) == 1 and isinstance(table.terms[0], Dense) and table.scale is None


def _has_to_be_dense(context: Any, loss: Loss, hidden: Any, table: Weight) -> bool:
    """Returns whether a part of the table has to be materialised."""
    inner = context.inside([], Provenance(), on_dense="allow", counts=False)
    leaves, parts = jax.tree.flatten(table)
    loss = dataclasses.replace(loss, table=parts)
    jax.eval_shape(functools.partial(loss.project, context=inner), _chunk(loss, hidden), leaves)
    return any(r.served == "dense" for r in inner.reads)


def _chunk(loss: Loss, hidden: Any) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of a chunk of hidden states."""
    tokens, width = hidden.shape[-2:]
    size = min(loss.lanes * loss.chunk, supposed(tokens))
    return jax.ShapeDtypeStruct((size, width), hidden.dtype)


@cost_of(NAME)
def _cost(eqn: Any) -> Cost:
    """Returns the FLOPs of the products of all tokens, and the bytes of those of a chunk."""
    loss, (hidden, *rest) = eqn.params["loss"], [v.aval for v in eqn.invars]
    chunk = _chunk(loss, hidden)
    flops, size = cost(body(jax.make_jaxpr(loss.project)(chunk, rest[loss.first - 1 :])))
    return Cost(flops * (hidden.size // chunk.shape[1]) // max(chunk.shape[0], 1), size)
