"""Logits and greedy continuations from a Flax causal language model of transformers.

The parameters are an argument everywhere, so that plain and adapted ones both do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel, PreTrainedTokenizerFast

ApplyFn = Callable[[Any, jax.Array], jax.Array]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Returns the token ids of a text, int32 [tokens], with no start or end token added."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def causal_lm(model: FlaxPreTrainedModel) -> ApplyFn:
    """Returns ``apply_fn(params, tokens)``, which is pure.

    It takes int32 tokens [batch, length] and gives float32 logits [batch, length, vocabulary].
    """

    def apply_fn(params: Any, tokens: jax.Array) -> jax.Array:
        length, limit = tokens.shape[1], model.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"{length} tokens in a row, but the model was loaded for {limit}")
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        mask = jnp.ones_like(tokens)
        variables = {"params": params}
        return model.module.apply(variables, tokens, mask, positions, return_dict=False)[0]

    return apply_fn


def window_length(tokens: int, new_tokens: int) -> int:
    """Returns how long a row `generate` has the model read, for a prompt of so many tokens."""
    return -(-(tokens + new_tokens) // 64) * 64


def generate(
    apply_fn: ApplyFn,
    params: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    max_new_tokens: int = 40,
) -> str:
    """Returns the greedy continuation of a prompt, up to an end token.

    Args:
      apply_fn: from ``causal_lm``, or the same adapted. With the same object and params of the same
        structure, the next call compiles nothing.
      params: what ``apply_fn`` takes: plain parameters or an ``Adapted``. An argument of the
        compiled step, never a constant in it.
      tokenizer: the model's tokenizer.
      prompt: the text to continue.
      max_new_tokens: the most tokens to add.
    """
    tokens = encode(tokenizer, prompt)
    start = len(tokens)
    if start == 0:
        raise ValueError("the prompt is empty: give at least one token to continue")
    # All steps share one window, so they are compiled once. Attention is causal: what is right of a
    # position is not seen from there.
    window = np.zeros((1, window_length(start, max_new_tokens)), np.int32)
    window[0, :start] = tokens
    end = start
    while end < start + max_new_tokens:
        token = int(_next_token(apply_fn, params, window, end - 1))
        if token in tokenizer.all_special_ids:
            break
        window[0, end] = token
        end += 1
    return tokenizer.decode(window[0, start:end])


@functools.partial(jax.jit, static_argnums=0)
def _next_token(apply_fn: ApplyFn, params: Any, tokens: jax.Array, position: int) -> jax.Array:
    return jnp.argmax(apply_fn(params, tokens)[0, position])
