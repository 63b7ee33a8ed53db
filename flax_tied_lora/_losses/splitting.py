"""Tokens taken a chunk at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def by_chunks(
    loss: Any, step: Callable[..., Any], *data: Array, start: list[Array] | None = None
) -> Any:
    """Returns a function's results on chunks of tokens, joined.

    A chunk takes every n-th token: where tokens are sharded, each device has a part of each chunk.

    Args:
      loss: says how many tokens a chunk has, and which label padding gets.
      step: called with the number of the chunk and its data; with a carry before them, which it
        returns before its result, if there is a start.
    """
    tokens = data[0].shape[0]
    count = max(1, math.ceil(tokens / loss.chunk))
    size = math.ceil(tokens / count)
    missing = size * count - tokens
    if count == 1:
        if start is None:
            return step(0, *data)
        ends, out = step(start, 0, *data)
        return out, ends

    def split(x: Array, fill: Any) -> Array:
        x = lax.pad(x, jnp.array(fill, x.dtype), [(0, missing, 0), *[(0, 0, 0)] * (x.ndim - 1)])
        return jnp.swapaxes(x.reshape(size, count, *x.shape[1:]), 0, 1)

    def join(x: Array) -> Array:
        return jnp.swapaxes(x, 0, 1).reshape(size * count, *x.shape[2:])[:tokens]

    fills = (0, loss.ignore_index, 0)
    split_data = [split(x, fill) for x, fill in zip(data, fills, strict=False)]

    def body(carry: Any, each: Any) -> Any:
        number, chunk = each
        return (None, step(number, *chunk)) if start is None else step(carry, number, *chunk)

    ends, out = lax.scan(body, start, (jnp.arange(count), split_data))
    joined = jax.tree.map(join, out)
    return joined if start is None else (joined, ends)
