"""Cross-entropy of a projection, a chunk of tokens at a time: plain JAX, and its gradients.

No array of [tokens, vocabulary] is made, only one of [chunk, vocabulary]. The table is an array, or
a symbolic weight, which stays one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from flax_tied_lora._algebra.factor import accumulator
from flax_tied_lora._algebra.for_cpu import at_places, by_rows
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.context import Context
from flax_tied_lora._losses.splitting import by_chunks
from flax_tied_lora._tree.sharding import share_names, split, vary, varying


@dataclasses.dataclass(frozen=True)
class Loss:
    """What the loss is beside its operands; hashable.

    Attributes:
      vocab_axis: axis of the table that the vocabulary lies along.
      lanes: in how many runs tokens are taken, each of which a device may have of its own.
      chunk: tokens of each lane that have logits at the same time.
      sparing: whether a chunk is so large a part of all tokens that its gradient is to have the
        memory of its logits, at the price of time.
      table: structure of the table's operands: an array's, or a symbolic weight's.
      bias: whether there is one, as the operand before the table's.
      axis_name: mesh axis that the vocabulary is split over, inside a `jax.shard_map`; or None.
    """

    vocab_axis: int
    lanes: int
    chunk: int
    sparing: bool
    table: Any
    bias: bool
    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_soft_cap: float | None
    logit_scale: float
    axis_name: str | None
    precision: Any

    @property
    def first(self) -> int:
        """The place of the table's first operand, after hidden, labels, weights and bias."""
        return 4 if self.bias else 3

    def by_rows(self, function: Callable[..., Array], logits: Array, *beside: Array) -> Array:
        """Returns a function of the rows of logits, in their memory where that is to be spared.

        A plain table's logits are no loop's, so that XLA sees to it by itself.
        """
        if not self.sparing or self.table.num_leaves == 1:
            return function(logits, *beside)
        return by_rows(function, logits, *beside)

    def in_one_lane(self) -> Loss:
        """Returns the loss with chunks as large as those of all lanes."""
        return dataclasses.replace(self, lanes=1, chunk=self.lanes * self.chunk)

    def project(
        self, hidden: Array, leaves: Sequence[Any], dtype: Any = None, context: Any = None
    ) -> Array:
        """Returns the products of hidden states with the table, [chunk, vocabulary].

        Args:
          leaves: the table's operands.
          dtype: of the result; by default that of the operands.
          context: for a symbolic weight, one that is to hear of its call site.
        """
        table = jax.tree.unflatten(self.table, leaves)

        def product(hidden: Array, table: Array) -> Array:
            # Not by promotion rules: strict ones refuse bfloat16 beside float32.
            wide = np.promote_types(hidden.dtype, table.dtype)
            return lax.dot_general(
                lax.convert_element_type(hidden, wide), lax.convert_element_type(table, wide),
                (((1,), (1 - self.vocab_axis,)), ((), ())), self.precision, dtype or wide,
            )  # fmt: skip

        if not isinstance(table, Weight):
            return product(hidden, table)
        if context is None:
            context = Context(on_dense="allow")
        return context.evaluate(product, hidden, table)


@dataclasses.dataclass
class _Logits:
    """The logits of a chunk, and what is known of them.

    Attributes:
      values: after scale and cap, [chunk, vocabulary].
      largest: of each token's, [chunk].
      norm: log of the sum of their exponentials, [chunk].
      places: of the tokens' labels in this shard of the vocabulary, or outside of it.
      counted: which tokens count: not those whose label is ignored.
      known: which have a label of the vocabulary.
      vocabulary: its size, over all shards.
      over: sums what each shard of the vocabulary has.
    """

    values: Array
    largest: Array
    norm: Array
    places: Array
    counted: Array
    known: Array
    vocabulary: int
    over: Callable[[Array], Array]


def _logits(loss: Loss, hidden: Array, labels: Array, rest: Sequence[Array]) -> _Logits:
    wide = accumulator(hidden.dtype)
    values = loss.project(hidden, rest[1:] if loss.bias else rest, wide)
    if loss.bias:
        values += lax.convert_element_type(rest[0], wide)[None]
    if loss.logit_scale != 1.0:
        values *= loss.logit_scale
    if loss.logit_soft_cap is not None:
        values = _capped(loss, values)
    name = loss.axis_name
    over = (lambda x: x) if name is None else functools.partial(lax.psum, axis_name=name)
    largest = jnp.max(lax.stop_gradient(values), axis=-1)
    here, size, start = values.shape[-1], values.shape[-1], 0
    if name is not None:
        largest = lax.pmax(largest, name)
        size, start = here * lax.axis_size(name), here * lax.axis_index(name)
    norm = jnp.log(over(jnp.sum(_exponentials(values, largest), axis=-1))) + largest
    places = labels - start
    return _Logits(
        values, largest, norm,
        places=places,
        counted=labels != loss.ignore_index,
        known=(labels >= 0) & (labels < size),
        vocabulary=size, over=over,
    )  # fmt: skip


def _exponentials(values: Array, shift: Array) -> Array:
    """Returns them, each row's shifted: the same of the same rows is computed once."""
    return jnp.exp(values - shift[:, None])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _capped(loss: Loss, values: Array) -> Array:
    """Returns soft-capped logits, in the memory of the others."""
    assert loss.logit_soft_cap is not None
    cap = loss.logit_soft_cap
    return loss.by_rows(lambda x: cap * jnp.tanh(x / cap), values)


@_capped.defjvp
def _capped_jvp(loss: Loss, primals: Any, tangents: Any) -> Any:
    out = _capped(loss, *primals)
    return out, _slope_of_cap(loss, out) * tangents[0]


def _slope_of_cap(loss: Loss, capped: Array) -> Array:
    assert loss.logit_soft_cap is not None
    return 1 - jnp.square(capped / loss.logit_soft_cap)


def _hot(values: Array, places: Array) -> Array:
    """Returns where in its row of the logits a token's label is."""
    hot = lax.broadcasted_iota(places.dtype, (1, values.shape[-1]), 1) == places[:, None]
    return hot if (sharding := split(values)) is None else jax.sharding.reshard(hot, sharding)


def _picked(at: _Logits) -> Array:
    """Returns the value at each token's label; where it is in no shard, 0."""
    if split(at.values) is not None:
        hot = _hot(at.values, at.places)
        return at.over(jnp.sum(jnp.where(hot, at.values, 0), axis=-1))
    return at.over(at_places(at.values, at.places))


def _values(loss: Loss, at: _Logits) -> Array:
    picked = _picked(at)
    if loss.label_smoothing:
        mean = at.over(jnp.sum(at.values, axis=-1)) / at.vocabulary
        picked = (1 - loss.label_smoothing) * picked + loss.label_smoothing * mean
    out = at.norm - picked
    if loss.z_loss:
        out += loss.z_loss * jnp.square(at.norm)
    return jnp.where(at.counted, jnp.where(at.known, out, jnp.nan), 0)


def _slopes(loss: Loss, at: _Logits, losses: Array, weights: Array) -> Array:
    """Returns the gradient of the weighted sum of losses by the products, in closed form.

    It takes the place of the logits, so it is computed after all else that reads them.
    """
    norm = jnp.where(jnp.isnan(losses), jnp.nan, at.norm)  # of no other value, but later
    weights = jnp.where(at.counted, jnp.where(at.known, weights, jnp.nan), 0)
    # Those of the sum, computed once for both, unless that takes memory which is to be spared.
    again = loss.sparing or loss.logit_soft_cap is not None
    return loss.by_rows(
        functools.partial(_slopes_of_rows, loss, at.vocabulary),
        at.values, norm if again else at.largest, norm, at.places, weights,
    )  # fmt: skip


def _slopes_of_rows(
    loss: Loss, vocabulary: int, values: Array, shift: Array, norm: Array, places: Array,
    weights: Array,
) -> Array:  # fmt: skip
    scale = jnp.exp(shift - norm)
    if loss.z_loss:
        scale *= 1 + 2 * loss.z_loss * norm
    out = _exponentials(values, shift) * scale[:, None]
    out = jnp.where(_hot(values, places), out - (1 - loss.label_smoothing), out)
    if loss.label_smoothing:
        out -= loss.label_smoothing / vocabulary
    if loss.logit_soft_cap is not None:
        out *= _slope_of_cap(loss, values)
    return out * (loss.logit_scale * weights)[:, None]


def per_token(loss: Loss, *operands: Any) -> Array:
    """Returns each token's loss, unweighted, [tokens] in float32 or wider.

    Differentiated, a chunk's logits are computed again.
    """
    hidden, labels, _, *rest = operands

    @jax.checkpoint
    def step(number: Any, hidden: Array, labels: Array) -> Array:
        own = _folded(loss, number, rest)
        return _values(loss, _logits(loss, hidden, labels, own))

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
    hidden, labels, weights, *rest = _own(loss, operands)
    wide = accumulator(hidden.dtype)
    parts = [i for i in wrt if i >= loss.first]
    sums = [i for i in wrt if i >= 3]  # of bias and table: over all tokens
    if parts and isinstance(jax.tree.unflatten(loss.table, rest[loss.first - 3 :]), jax.Array):
        loss = loss.in_one_lane()  # of a whole table there is one gradient, not one for each lane
    if any(share_names(hidden, rest[i - 3]) for i in sums):
        loss = (
            loss.in_one_lane()
        )  # a lane's gradient cannot be split over what lanes are split over

    def step(sofar: list[Array], number: Any, hidden: Array, labels: Array, weights: Array) -> Any:
        own = _folded(loss, number, rest)
        at = _logits(loss, hidden, labels, own)
        losses = _values(loss, at)
        slopes = _slopes(loss, at, losses, weights)

        def product(hidden: Array, *chosen: Array) -> Array:
            leaves = list(own[loss.first - 3 :])
            for i, value in zip(parts, chosen, strict=True):
                leaves[i - loss.first] = value
            return loss.project(hidden, leaves)

        # In the operands' own dtype, as in a plain model: the products of a backward pass are no
        # float32 ones. Nobody reads the value, so it is not computed.
        like, pull = jax.vjp(product, hidden, *(own[i - 3] for i in parts))
        turned, *found = pull(lax.convert_element_type(slopes, like.dtype))
        found = dict(zip(parts, found, strict=True))
        if loss.bias and 3 in wrt:
            found[3] = jnp.sum(slopes, axis=0)
        added = [
            total + lax.convert_element_type(found[i], total.dtype)
            for total, i in zip(sofar, sums, strict=True)
        ]
        return added, (losses, turned if 0 in wrt else None)

    start = [_zeros(rest[i - 3]) for i in sums]
    (losses, turned), ends = by_chunks(loss, step, hidden, labels, weights, start=start)
    gradients = dict(zip(sums, ends, strict=True)) | {0: turned, 2: losses}
    out = [lax.convert_element_type(gradients[i], operands[i].dtype) for i in wrt]
    return jnp.sum(lax.convert_element_type(weights, wide) * losses), out


def _folded(loss: Loss, number: Any, rest: Sequence[Any]) -> Sequence[Any]:
    """Returns the operands after the weights, random keys folded for a chunk."""
    if loss.table.num_leaves == 1:
        return rest
    at = 1 if loss.bias else 0
    table = jax.tree.unflatten(loss.table, rest[at:])
    return [*rest[:at], *jax.tree.leaves(table.fold(number))]


def _own(loss: Loss, operands: Sequence[Any]) -> list[Any]:
    """Returns operands of each device's own, where there is data of its own inside a `shard_map`.

    Else a gradient would be summed over devices before it is multiplied with a device's tangent.
    Over the axis of the vocabulary it is: there the loss is one for all devices.
    """
    axes = frozenset().union(*map(varying, operands)) - {loss.axis_name}
    return [vary(x, axes) for x in operands]


def _zeros(operand: Any) -> Array:
    """Returns zeros to add gradients to, varying over the same mesh axes as the operand."""
    zeros = jnp.zeros_like(operand, dtype=accumulator(operand.dtype))
    return vary(zeros, varying(operand))
