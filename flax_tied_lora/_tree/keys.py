"""Random keys: checked, named, and free to go wherever arrays are."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._tree.paths import describe, is_tracer


def typed_key(what: str, rng: Any) -> jax.Array:
    """Returns a random key in the form that `jax.random.key` makes.

    Raises:
      TypeError: it is no key.
    """
    dtype = getattr(rng, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return rng
    if dtype == jnp.uint32:
        return jax.random.wrap_key_data(rng)
    given = f"a {type(rng).__name__}" if dtype is None else describe(rng)
    raise TypeError(f"{what}: rng is {given}; expected a key, as jax.random.key(0) makes one")


def key_number(name: str) -> int:
    """Returns a number for a group key to fold into a random key: the same on every machine."""
    return zlib.crc32(name.encode())


def uncommitted(rng: jax.Array) -> jax.Array:
    """Returns a key that may go wherever the factors are."""
    if is_tracer(rng) or not rng.committed:
        return rng
    if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        data = jnp.asarray(np.asarray(jax.random.key_data(rng)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(rng))
    return jnp.asarray(np.asarray(rng))


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of typed random keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
