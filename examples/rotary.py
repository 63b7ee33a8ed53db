"""Rotary embeddings as Hugging Face's configs ask for them, by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import families
import jax
import jax.numpy as jnp
import numpy as np


class Rope(NamedTuple):
    """The angles of a step of one position, for each plane of a head."""

    frequencies: tuple[float, ...]


def ropes(found: Mapping[str, Any], head_dim: int) -> tuple[Rope | None, ...]:
    """Returns the rotary embedding of each layer, or None for one that has none.

    Args:
      found: what `families.completed` returns.
      head_dim: the size of a head.

    Raises:
      ValueError: it is of a kind that is not known here.
    """
    given = found.get("rope_parameters") or {}  # transformers 5; by type of layer, for Gemma 3
    if not any(isinstance(value, Mapping) for value in given.values()):
        scaling = given or found.get("rope_scaling") or {}
        whole = {"rope_theta": found["rope_theta"], **scaling}
        local = found.get("rope_local_base_freq")
        sliding = {"rope_theta": local} if local else whole
        given = {"full_attention": whole, "sliding_attention": sliding}
    types = families.layer_types(found)
    known = {kind: Rope(_frequencies(given[kind], head_dim)) for kind in set(types)}
    return tuple(
        known[kind] if used else None
        for kind, used in zip(types, families.has_rope(found), strict=True)
    )


def _frequencies(given: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    kind = given.get("rope_type") or given.get("type") or "default"
    frequencies = given["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    if kind == "linear":
        frequencies /= given["factor"]
    elif kind == "llama3":
        # Waves that fit the first context often stay, those that do not are stretched, and between
        # the two it goes over from one to the other.
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        turns = given["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / given["factor"]
    elif kind != "default":
        raise ValueError(f"rope_type is {kind!r}: expected 'default', 'linear' or 'llama3'")
    return tuple(map(float, frequencies))


def rotated(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
    """Returns heads turned by their position: float [batch, length, heads, dim].

    The planes are spanned by an entry of the first half and one of the second.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(
        rope.frequencies, jnp.float32
    )
    sines, cosines = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate(turned, -1).astype(x.dtype)
