"""`blockwise_cross_entropy_rule`: how losses of other libraries that go over a table are served."""

from __future__ import annotations

from types import NotImplementedType
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.protocols import RuleContext
from flax_tied_lora._verbs.linear_cross_entropy import linear_cross_entropy


def blockwise_cross_entropy_rule(
    context: RuleContext, equation: Any, /, *args: Any, **kwargs: Any
) -> list[Any] | NotImplementedType:
    """The rule of a cross-entropy that goes over a table of the vocabulary block by block.

    For functions such as Levanter's, with a derivative of their own, which return the loss of each
    token, or that and the log of the softmax's normaliser. They are served by
    `linear_cross_entropy`, whose chunks are of tokens: the table stays in its parts, and a label
    that is no row of it has no logit of its own, as where targets are one-hot. Of a call of another
    form, the table is materialised.

    The arrays among the arguments are hidden states, [..., width], a table, [vocabulary, width] or
    [width, vocabulary], and integer labels, [...]; all else, sizes of blocks and such, is left to
    `linear_cross_entropy`. Named arrays, as Haliax has them, may have their axes in any order.

    Example::

      from levanter.models import loss

      tied_lora.register_rule(
          loss._blockwise_cross_entropy_loss, tied_lora.losses.blockwise_cross_entropy_rule
      )
    """
    found = _operands((args, kwargs))
    results = [v.aval for v in equation.outvars]
    if found is None or not 1 <= len(results) <= 2:
        return NotImplemented
    hidden, table, labels, vocab_axis = found
    shape = labels.shape
    if any(r.shape != shape or not jnp.issubdtype(r.dtype, jnp.floating) for r in results):
        return NotImplemented

    def computed(hidden: Any, table: Any, labels: Any) -> list[Any]:
        rows = table.T if vocab_axis else table
        known = (labels >= 0) & (labels < rows.shape[0])
        labels = jnp.where(known, labels, 0)
        losses = linear_cross_entropy(
            hidden, table, labels, vocab_axis=vocab_axis, reduction="none"
        )
        own = jnp.einsum(
            "...d,...d->...", hidden, rows[labels], preferred_element_type=losses.dtype
        )
        normaliser = losses + own
        both = jnp.where(known, losses, normaliser), normaliser
        return [x.astype(r.dtype) for x, r in zip(both, results, strict=False)]

    return context.evaluate(computed, hidden, table, labels)


def _operands(call: Any) -> tuple[Any, Weight, Any, int] | None:
    """Returns hidden states, width last, the table, the labels and the table's vocabulary axis."""
    nodes = jax.tree.leaves(call, is_leaf=lambda x: isinstance(x, Weight) or _names(x) is not None)
    arrays = [x for x in nodes if isinstance(_array(x), jax.Array | Weight)]
    tables = [x for x in arrays if isinstance(_array(x), Weight)]
    others = [x for x in arrays if not isinstance(_array(x), Weight)]
    labels = [x for x in others if jnp.issubdtype(_array(x).dtype, jnp.integer)]
    hidden = [x for x in others if jnp.issubdtype(_array(x).dtype, jnp.floating)]
    if (len(tables), len(labels), len(hidden), len(others)) != (1, 1, 1, 2):
        return None
    (table,), (ids,), (states,) = tables, labels, hidden
    order = _order(states, ids)
    if order is None or len(_array(table).shape) != 2:
        return None
    x: Any = jnp.transpose(_array(states), order)
    columns, names = _names(table), _names(states)
    if columns and names:
        width = [a for a, name in enumerate(columns) if name == names[order[-1]]]
    else:
        width = [a for a, size in enumerate(_array(table).shape) if size == x.shape[-1]][-1:]
    if x.shape[:-1] != _array(ids).shape or not width:
        return None
    return x, _array(table), _array(ids), 1 - width[0]


def _order(states: Any, ids: Any) -> list[int] | None:
    """Returns the axes of hidden states as those of the labels are, and then the width."""
    ndim = len(_array(states).shape)
    if ndim != len(_array(ids).shape) + 1:
        return None
    names, of_ids = _names(states), _names(ids)
    if not names or not of_ids:
        return list(range(ndim))
    order = [names.index(name) for name in of_ids if name in names]
    return [*order, *(a for a in range(ndim) if a not in order)] if len(order) == ndim - 1 else None


def _array(node: Any) -> Any:
    return node if _names(node) is None else node.array


def _names(node: Any) -> tuple[Any, ...] | None:
    """Returns the names of a named array's axes; None of any other object."""
    axes = getattr(node, "axes", None)
    if not isinstance(axes, tuple) or not hasattr(node, "array"):
        return None
    return tuple(getattr(a, "name", a) for a in axes)
