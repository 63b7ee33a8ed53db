"""One chunk of tokens: its logits, its losses, and their slopes in closed form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.factor import accumulator
from flax_tied_lora._algebra.for_cpu import at_places
from flax_tied_lora._losses.loss import Loss
from flax_tied_lora._tree.sharding import split


@dataclasses.dataclass
class Logits:
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


def logits_of(loss: Loss, hidden: Array, labels: Array, rest: Sequence[Array]) -> Logits:
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
    return Logits(
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


def _picked(at: Logits) -> Array:
    """Returns the value at each token's label; where it is in no shard, 0."""
    if split(at.values) is not None:
        hot = _hot(at.values, at.places)
        return at.over(jnp.sum(jnp.where(hot, at.values, 0), axis=-1))
    return at.over(at_places(at.values, at.places))


def values_of(loss: Loss, at: Logits) -> Array:
    picked = _picked(at)
    if loss.label_smoothing:
        mean = at.over(jnp.sum(at.values, axis=-1)) / at.vocabulary
        picked = (1 - loss.label_smoothing) * picked + loss.label_smoothing * mean
    out = at.norm - picked
    if loss.z_loss:
        out += loss.z_loss * jnp.square(at.norm)
    return jnp.where(at.counted, jnp.where(at.known, out, jnp.nan), 0)


def slopes_of(loss: Loss, at: Logits, losses: Array, weights: Array) -> Array:
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
