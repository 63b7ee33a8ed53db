"""Tokens taken a chunk at a time, in lanes where a mesh may split them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from flax_tied_lora._algebra.for_cpu import ROWS
from flax_tied_lora._tree.open_sizes import is_open, supposed
from flax_tied_lora._tree.sharding import automatic_shard_count, explicit, shard_count

# Tokens of a chunk: a sixteenth of all, within these bounds in each lane. Fewer than 128 leave
# products too thin to be worth reading the table for; more than 1,024 gain nothing.
SHARE, LEAST, MOST = 16, 128, 1024

# Of so few chunks a chunk's gradient is to have the memory of its logits: of more, a chunk's memory
# is little beside all that the logits would take.
FEW_CHUNKS = 4


def lanes_of(hidden: Array) -> int:
    """Returns in how many lanes tokens are taken: runs of them that devices may split among them.

    On Explicit mesh axes as many as tokens are split into. On Auto ones that is not known: as many
    as there are devices, or as the first axis can be split into of them; one, if its size is open.

    Args:
      hidden: [..., width].
    """
    aval = jax.typeof(hidden)
    if hidden.ndim < 2 or 0 in hidden.shape:
        return 1
    if (sharding := explicit(aval)) is not None:
        return shard_count(sharding.mesh, sharding.spec[0])
    first = hidden.shape[0]
    return 1 if is_open(first) else math.gcd(automatic_shard_count(hidden), first)


def chunk_of(tokens: Any, lanes: int) -> int:
    """Returns how many tokens of each lane have logits at a time. Their number may be open."""
    return min(max(-(-supposed(tokens) // (SHARE * lanes)), LEAST), MOST)


def by_chunks(
    loss: Any, step: Callable[..., Any], *data: Array, start: list[Array] | None = None
) -> Any:
    """Returns a function's results on chunks of tokens, joined.

    A chunk is every n-th token of each lane. What is summed over tokens is summed in each lane,
    and over lanes once, after the last chunk.

    Args:
      loss: says how many lanes there are, how many tokens of each a chunk has, and which label
        padding gets.
      step: of one lane, called with the number of the chunk and its data; with a carry before
        them, which it returns before its result, if there is a start.
      start: of the carry.
    """
    tokens, lanes = data[0].shape[0], loss.lanes
    length = tokens // lanes
    count, size = _even(length, loss.chunk)
    if lanes == 1 and count == 1:
        if start is None:
            return step(0, *data)
        ends, out = step(start, 0, *data)
        return out, ends
    lead = () if lanes == 1 else (lanes,)
    at = len(lead)  # the axis of a lane's tokens

    def chunks_of(x: Array, fill: Any) -> Array:
        rest = x.shape[1:]
        x = _on_lanes(x.reshape(*lead, length, *rest), data[0]) if lead else x
        padding = [(0, size * count - length if i == at else 0, 0) for i in range(x.ndim)]
        x = lax.pad(x, jnp.array(fill, x.dtype), padding)
        return jnp.moveaxis(x.reshape(*lead, size, count, *rest), at + 1, 0)

    def join(x: Array) -> Array:
        rest = x.shape[at + 2 :]
        x = jnp.moveaxis(x, 0, at + 1).reshape(*lead, size * count, *rest)
        return lax.slice_in_dim(x, 0, length, axis=at).reshape(tokens, *rest)

    fills = (0, loss.ignore_index, 0)
    chunks = [chunks_of(x, fill) for x, fill in zip(data, fills, strict=False)]
    numbers = jnp.arange(count * lanes).reshape(count, *lead)

    def body(carry: Any, each: Any) -> Any:
        number, chunk = each
        number = _on_lanes(number, data[0]) if lead else number
        args = (number, *chunk) if carry is None else (carry, number, *chunk)
        out = jax.vmap(step)(*args) if lead else step(*args)
        return (None, out) if carry is None else out

    if start is not None and lead:
        start = [_on_lanes(jnp.broadcast_to(x, (*lead, *x.shape)), data[0]) for x in start]
    ends: Any
    ends, out = lax.scan(body, start, (numbers, chunks))
    joined = jax.tree.map(join, out)
    if start is None:
        return joined
    return joined, [jnp.sum(x, axis=0) for x in ends] if lead else ends


def _even(length: Any, most: int) -> tuple[Any, int]:
    """Returns how many chunks of one size, and which, have so many tokens or a few more."""
    if is_open(length):
        return -(-length // most), most
    count = max(1, -(-length // most))
    size = -(-length // count)
    if size % ROWS and (whole := size + ROWS - size % ROWS) <= most:
        size = whole  # a number that can be split further
    return count, size


def _on_lanes(x: Array, tokens: Array) -> Array:
    """Returns an array [lanes, ...], on Explicit mesh axes split into lanes as the tokens are."""
    of_tokens, of_x = explicit(jax.typeof(tokens)), explicit(jax.typeof(x))
    if of_tokens is None:
        return x
    rest = [None] * (x.ndim - 1) if of_x is None else of_x.spec[1:]
    spec = jax.P(of_tokens.spec[0], *rest)
    return jax.sharding.reshard(x, jax.NamedSharding(of_tokens.mesh, spec))
