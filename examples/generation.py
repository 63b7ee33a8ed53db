"""Continuations of a prompt, greedy or drawn, by a cache in one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Returns the token ids of a text, int32 [tokens], with no start or end token added."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def generate(
    model: nnx.Module, tokens: Any, length: int, *, temperature: float = 0.0, top_p: float = 1.0,
    rng: jax.Array | None = None, stop: Sequence[int] = (),
) -> np.ndarray:  # fmt: skip
    """Returns the tokens that follow, int32 [batch, length].

    A row that has come to a token of ``stop`` is filled up with it. Prompts of another length are
    compiled anew; other weights of the same shapes are not.

    Args:
      model: a `llama.Llama`, or one that `flax_tied_lora.nnx.wrap` has adapted.
      tokens: the prompts, int32 [batch, tokens], all of one length and not empty.
      length: how many tokens to add.
      temperature: what logits are divided by; 0: the most likely token is taken.
      top_p: draw from the likeliest tokens that together have this share.
      rng: a key to draw with; needed if the temperature is not 0.
      stop: tokens that end a row.

    Raises:
      ValueError: the prompt is empty, or there is no key to draw with.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token to continue")
    if temperature and rng is None:
        raise ValueError(f"temperature is {temperature}: give rng, a key to draw with")
    if length == 0:
        return np.zeros((len(tokens), 0), np.int32)
    graph, state = nnx.split(model)
    choice = (temperature, top_p, jax.random.key(0) if rng is None else rng)
    ends = jnp.asarray(list(stop), jnp.int32)
    return np.asarray(_generated(graph, state, tokens, length, choice, ends, bool(temperature)))


@functools.partial(jax.jit, static_argnums=(0, 3, 6))
def _generated(
    graph: Any, state: Any, tokens: jax.Array, length: int, choice: Any, ends: jax.Array,
    drawn: bool,
) -> jax.Array:  # fmt: skip
    model: Any = nnx.merge(graph, state, copy=True)
    batch, start = tokens.shape
    cache = model.empty_cache(batch, start + length)

    def chosen(logits: jax.Array, number: jax.Array) -> jax.Array:
        if not drawn:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        temperature, top_p, rng = choice
        return _drawn(logits / temperature, top_p, jax.random.fold_in(rng, number))

    logits, cache = model(tokens, cache=cache)
    first = chosen(logits[:, -1], jnp.int32(0))
    made = jnp.zeros((batch, length), jnp.int32).at[:, 0].set(first)

    def ended(made: jax.Array, number: jax.Array) -> jax.Array:
        return jnp.isin(made[:, number - 1], ends)

    def goes_on(carry: Any) -> jax.Array:
        number, made, _ = carry
        return (number < length) & ~jnp.all(ended(made, number))

    def body(carry: Any) -> Any:
        number, made, cache = carry
        last = made[:, number - 1]
        positions = jnp.full((batch, 1), start - 1, jnp.int32) + number
        logits, cache = model(last[:, None], positions, cache=cache)
        following = jnp.where(ended(made, number), last, chosen(logits[:, -1], number))
        return number + 1, made.at[:, number].set(following), cache

    number, made, _ = jax.lax.while_loop(goes_on, body, (jnp.int32(1), made, cache))
    last = jax.lax.dynamic_index_in_dim(made, number - 1, 1)
    return jnp.where(jnp.arange(length) < number, made, last)


def _drawn(logits: jax.Array, top_p: jax.Array, rng: jax.Array) -> jax.Array:
    """Draws from the likeliest tokens whose shares together come to ``top_p``."""
    order = jnp.argsort(-logits, -1)
    shares = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), -1)
    before = jnp.cumsum(shares, -1) - shares  # of the likelier ones: the first is always kept
    kept = jnp.where(before < top_p, jnp.log(shares), -jnp.inf)
    number = jax.random.categorical(rng, kept, -1)
    return jnp.take_along_axis(order, number[:, None], -1)[:, 0].astype(jnp.int32)
