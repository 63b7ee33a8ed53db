"""Rotary embeddings as Hugging Face's configs ask for them, by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rope(NamedTuple):
    """The angles of a step of one position, for each plane of a head."""

    frequencies: tuple[float, ...]


def layer_types(found: Mapping[str, Any]) -> list[str]:
    """Returns ``full_attention`` or ``sliding_attention`` for each layer.

    Args:
      found: a ``config.json``.
    """
    layers = found["num_hidden_layers"]
    if found.get("layer_types"):
        return list(found["layer_types"])
    kind, full, sliding = found["model_type"], "full_attention", "sliding_attention"
    if kind == "gemma2":
        return [full if i % 2 else sliding for i in range(layers)]
    if kind == "gemma3_text":
        each = found.get("sliding_window_pattern") or 6
        return [sliding if (i + 1) % each else full for i in range(layers)]
    if kind == "mistral":
        return [sliding] * layers
    if kind in ("qwen2", "qwen3") and found.get("use_sliding_window"):
        first = found.get("max_window_layers") or 0
        return [sliding if i >= first else full for i in range(layers)]
    return [full] * layers


def ropes(found: Mapping[str, Any], head_dim: int) -> tuple[Rope | None, ...]:
    """Returns the rotary embedding of each layer, or None for one that has none.

    Raises:
      ValueError: it is of a kind that is not known here.
    """
    types = layer_types(found)
    given = found.get("rope_parameters") or {}  # transformers 5; by type of layer, for Gemma 3
    if not any(isinstance(value, Mapping) for value in given.values()):
        theta = given.get("rope_theta") or found.get("rope_theta") or _theta(found["model_type"])
        scaling = given or found.get("rope_scaling") or {}
        whole = {"rope_theta": theta, **scaling}
        local = found.get("rope_local_base_freq")
        sliding = {"rope_theta": local} if local else whole
        if found["model_type"] == "gemma3_text" and not local:
            sliding = {"rope_theta": 10_000.0}
        given = {"full_attention": whole, "sliding_attention": sliding}
    known = {kind: Rope(_frequencies(given[kind], head_dim)) for kind in set(types)}
    used = found.get("no_rope_layers") or [1] * len(types)
    if found["model_type"] == "smollm3" and not found.get("no_rope_layers"):
        each = found.get("no_rope_layer_interval") or 4
        used = [(i + 1) % each for i in range(len(types))]
    return tuple(known[kind] if use else None for kind, use in zip(types, used, strict=True))


def _theta(kind: str) -> float:
    return {"gemma3_text": 1_000_000.0, "smollm3": 2_000_000.0}.get(kind, 10_000.0)


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
