"""Cross-entropy of a projection, a chunk of tokens at a time: plain JAX, and its gradients.

No array of [tokens, vocabulary] is made, only one of [chunk, vocabulary]. The table is an array, or
a symbolic weight, which stays one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.factor import accumulator
from flax_tied_lora._losses.chunk import logits_of, slopes_of, values_of
from flax_tied_lora._losses.loss import Loss
from flax_tied_lora._losses.splitting import by_chunks
from flax_tied_lora._tree.sharding import share_names, vary, varying


def per_token(loss: Loss, *operands: Any) -> Array:
    """Returns each token's loss, unweighted, [tokens] in float32 or wider.

    Differentiated, a chunk's logits are computed again.
    """
    hidden, labels, _, *rest = operands

    @jax.checkpoint
    def step(number: Any, hidden: Array, labels: Array) -> Array:
        operands = _folded(loss, number, rest)
        return values_of(loss, logits_of(loss, hidden, labels, operands))

    return by_chunks(loss, step, hidden, labels)


def total(loss: Loss, *operands: Any) -> Array:
    """Returns the weighted sum of the tokens' losses. No gradient is formed."""
    return jnp.sum(operands[2] * per_token(loss, *operands))


def total_and_gradients(
    loss: Loss, wrt: Sequence[int], *operands: Any
) -> tuple[Array, list[Array]]:
    """Returns the weighted sum of the tokens' losses, and its gradients, formed chunk by chunk.

    Args:
      wrt: the places of the operands that it is differentiated by.
    """
    hidden, labels, weights, *rest = _varying_alike(loss, operands)
    wide = accumulator(hidden.dtype)
    parts = [i for i in wrt if i >= loss.first]
    sums = [i for i in wrt if i >= 3]  # of bias and table: over all tokens
    if parts and isinstance(jax.tree.unflatten(loss.table, rest[loss.first - 3 :]), jax.Array):
        loss = loss.in_one_lane()  # of a whole table there is one gradient, not one for each lane
    if any(share_names(hidden, rest[i - 3]) for i in sums):
        # A lane's gradient cannot be split over what lanes are split over.
        loss = loss.in_one_lane()

    def step(sofar: list[Array], number: Any, hidden: Array, labels: Array, weights: Array) -> Any:
        others = _folded(loss, number, rest)
        at = logits_of(loss, hidden, labels, others)
        losses = values_of(loss, at)
        slopes = slopes_of(loss, at, losses, weights)

        def product(hidden: Array, *chosen: Array) -> Array:
            leaves = list(others[loss.first - 3 :])
            for i, value in zip(parts, chosen, strict=True):
                leaves[i - loss.first] = value
            return loss.project(hidden, leaves)

        # In the operands' dtype, as in a plain model: the products of a backward pass are no
        # float32 ones. Nobody reads the value, so it is not computed.
        like, pull = jax.vjp(product, hidden, *(others[i - 3] for i in parts))
        by_hidden, *by_parts = pull(lax.convert_element_type(slopes, like.dtype))
        gradients = dict(zip(parts, by_parts, strict=True))
        if loss.bias and 3 in wrt:
            gradients[3] = jnp.sum(slopes, axis=0)
        added = [
            total + lax.convert_element_type(gradients[i], total.dtype)
            for total, i in zip(sofar, sums, strict=True)
        ]
        return added, (losses, by_hidden if 0 in wrt else None)

    start = [_zeros(rest[i - 3]) for i in sums]
    (losses, by_hidden), ends = by_chunks(loss, step, hidden, labels, weights, start=start)
    gradients = dict(zip(sums, ends, strict=True)) | {0: by_hidden, 2: losses}
    out = [lax.convert_element_type(gradients[i], operands[i].dtype) for i in wrt]
    return jnp.sum(lax.convert_element_type(weights, wide) * losses), out


def _folded(loss: Loss, number: Any, rest: Sequence[Any]) -> Sequence[Any]:
    """Returns the operands after the weights, random keys folded for a chunk."""
    if loss.table.num_leaves == 1:
        return rest
    at = 1 if loss.bias else 0
    table = jax.tree.unflatten(loss.table, rest[at:])
    return [*rest[:at], *jax.tree.leaves(table.fold(number))]


def _varying_alike(loss: Loss, operands: Sequence[Any]) -> list[Any]:
    """Returns operands that vary over the devices of a `shard_map` as soon as one of them does.

    Else a gradient would be summed over devices before it is multiplied with a device's tangent.
    Over the axis of the vocabulary it is: there the loss is one for all devices.
    """
    axes = frozenset().union(*map(varying, operands)) - {loss.axis_name}
    return [vary(x, axes) for x in operands]


def _zeros(operand: Any) -> Array:
    """Returns zeros to add gradients to, varying over the same mesh axes as the operand."""
    zeros = jnp.zeros_like(operand, dtype=accumulator(operand.dtype))
    return vary(zeros, varying(operand))
