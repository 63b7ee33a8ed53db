"""The library's own loss: its table goes into it in parts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from flax_tied_lora._algebra.factor import Cost
from flax_tied_lora._algebra.site_filter import PROJECTION
from flax_tied_lora._algebra.weight import Dense, Weight
from flax_tied_lora._interpreter.provenance import Provenance
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._losses.chunked import Loss
from flax_tied_lora._losses.primitive import NAME, bind, computed, linear_cross_entropy_p


@rule(NAME)
def linear_cross_entropy(context, eqn, *operands):
    """Cross-entropy of a projection, whose gradients are formed for each part of the table."""
    loss, mapped = eqn.params["loss"], eqn.params["mapped"]
    *others, table = operands
    if loss.table.num_leaves != 1:
        return NotImplemented  # it has been given in parts already
    if isinstance(others[0], Weight):
        return NotImplemented
    others = [context.dense(eqn, x) if isinstance(x, Weight) else x for x in others]
    if not isinstance(table, Weight):
        return [linear_cross_entropy_p.bind(*others, table, **eqn.params)]
    if any(level[-1] for level in mapped):
        # A table for each example: in plain JAX, which computes logits again for its gradients.
        plain = functools.partial(computed, loss=loss, mapped=mapped)
        return [context.evaluate(plain, *others, table)]
    cost = _cost(context, loss, others[0], table)
    if cost is None:
        return NotImplemented
    width = 1 - loss.vocab_axis
    terms, report = context.read(NAME, table, PROJECTION, rows=[width], cols=[loss.vocab_axis])
    own = table.replace(terms=tuple(dataclasses.replace(t, sites=None) for t in terms))
    if _is_array(own):
        (term,) = own.terms
        return [bind(loss, [*others, term.dense(own.shape, own.dtype)], mapped)]
    if len(terms) < len(table.terms):  # not all are for this call site
        cost = _cost(context, loss, others[0], own)
    report(cost)
    leaves, parts = jax.tree.flatten(own)
    flags = tuple((*level[:-1], *[False] * len(leaves)) for level in mapped)
    return [bind(dataclasses.replace(loss, table=parts), [*others, *leaves], flags)]


def _is_array(table: Weight) -> bool:
    return len(table.terms) == 1 and isinstance(table.terms[0], Dense) and table.scale is None


def _cost(context: Any, loss: Loss, hidden: Any, table: Weight) -> Cost | None:
    """Returns what the parts cost beyond the plain product; None where they have to be added up."""
    tokens, width = hidden.shape[-2:]
    chunk = min(loss.lanes * loss.chunk, tokens)
    inner = context.inside([], Provenance(), on_dense="allow")
    leaves, parts = jax.tree.flatten(table)
    loss = dataclasses.replace(loss, table=parts)

    def project(hidden: Any, *leaves: Any) -> Any:
        return loss.project(hidden, leaves, context=inner)

    jax.eval_shape(project, jax.ShapeDtypeStruct((chunk, width), hidden.dtype), *leaves)
    if any(r.served == "dense" for r in inner.reads):
        return None
    flops, size = sum(r.flops for r in inner.reads), sum(r.bytes for r in inner.reads)
    return Cost(flops * (hidden.size // width) // max(chunk, 1), size)
