"""Checksums of arrays, and the fingerprint of a base: which params adapters were trained on."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_tied_lora._planning.plan import Plan
from flax_tied_lora._tree.keys import is_key
from flax_tied_lora._tree.paths import flatten, is_marker
from flax_tied_lora._tree.quantized_array import array_of, is_quantized

# Entries of each leaf that the fingerprint reads. A full fine-tune changes nearly every entry of a
# leaf, and a merged adapter all of them: one of 256 suffices, and all leaves are read.
SAMPLE = 256
_GOLDEN = 0x9E3779B97F4A7C15


def fingerprint(params: Any, plan: Plan) -> dict[str, list[Any]]:
    """Returns ``{leaf path: [shape, dtype, checksum of a sample]}`` for a base, as JSON.

    Of what is stored quantised the dtype says how, and the checksum is that of integers and scales.

    Every leaf counts, adapted or not: the adapters were trained on top of all of them. Of a tie
    group only the canonical leaf does. The checksum is over the bits of `SAMPLE` entries spread
    over the leaf, at most; it does not depend on sharding, device, or on whether the array is
    JAX's or NumPy's. An abstract leaf has none.
    """
    members = {m.path for group in plan.groups for m in group.members[1:]}
    leaves = {
        path: leaf if is_quantized(leaf) else raw(leaf)
        for path, leaf in flatten(params)[0].items()
        if path not in members and not is_marker(leaf)
    }
    arrays = {p: [x.values, x.scales] if is_quantized(x) else [x] for p, x in leaves.items()}
    # Fetched in one go, so that the devices never wait for each other.
    sums = jax.device_get({p: [_sample_checksum(x) for x in parts] for p, parts in arrays.items()})
    return {path: [list(x.shape), _kind(x), _total(sums[path])] for path, x in leaves.items()}


def _kind(leaf: Any) -> str:
    if not is_quantized(leaf):
        return str(leaf.dtype)
    block = leaf.shape[leaf.axis] // leaf.scales.shape[leaf.axis]
    return f"{leaf.dtype} as {leaf.qtype}, blocks of {block}, "


def _total(sums: list[Any]) -> int | None:
    """Returns one checksum of several; None where there is none."""
    if None in sums:
        return None
    return functools.reduce(lambda total, x: (total * 31 + int(x)) % 2**32, sums, 0)


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Returns what tells two fingerprints apart, a line for each leaf."""
    lines = []
    for path in [*saved, *(p for p in given if p not in saved)]:
        if path not in given:
            lines.append(f"{path!r} is missing")
        elif path not in saved:
            lines.append(f"{path!r} is not in the saved base")
        else:
            (shape, dtype, total), (new_shape, new_dtype, new_total) = saved[path], given[path]
            if shape != new_shape or dtype != new_dtype:
                lines.append(f"{path!r} is {new_dtype}{new_shape}, saved with {dtype}{shape}")
            elif None not in (total, new_total) and total != new_total:
                lines.append(f"{path!r} has other values")
    return lines


def raw(leaf: Any) -> Any:
    """Returns a leaf as an array of numbers: typed random keys as their data."""
    leaf = array_of(leaf)
    if not hasattr(leaf, "dtype"):
        return np.asarray(leaf)
    if is_key(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.eval_shape(jax.random.key_data, leaf)
        return jax.random.key_data(leaf)
    return leaf


def checksum(array: Any) -> Any:
    """Returns a 32-bit checksum of an array's bits, in which any one changed entry shows.

    Each entry is mixed with its position and the results are summed modulo 2^32. Integer sums are
    exact in any order, so each device sums its own shard, and the result is the same everywhere.
    """
    if isinstance(array, jax.Array) and not jnp.issubdtype(array.dtype, jnp.complexfloating):
        return _on_device(array)
    return _of_words(*_host_words(np.asarray(array)))


def _sample_checksum(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return None
    if math.prod(leaf.shape) <= SAMPLE:
        return checksum(leaf)
    if isinstance(leaf, jax.Array):
        return checksum(_sampled(leaf))
    return checksum(np.asarray(leaf)[_sample_places(leaf.shape)])


def _sample_places(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    # Multiples of the golden ratio: spread evenly, and over all rows and columns.
    size = math.prod(shape)
    flat = np.array([(i * _GOLDEN % 2**64) * size >> 64 for i in range(SAMPLE)], np.int64)
    return np.unravel_index(flat, shape)


@jax.jit
def _sampled(leaf: jax.Array) -> jax.Array:
    index = tuple(place.astype(np.int32) for place in _sample_places(leaf.shape))
    # With Explicit mesh axes a sharded array must say how what is picked from it is laid out.
    replicated = jax.NamedSharding(jax.typeof(leaf).sharding.mesh, jax.P(None))
    return leaf.at[index].get(out_sharding=replicated)


@jax.jit
def _on_device(array: jax.Array) -> jax.Array:
    words = _as_words(array)
    strides = np.cumprod((1, *words.shape[:0:-1]), dtype=np.uint64)[::-1].astype(np.uint32)
    place = functools.reduce(
        jnp.add,
        [lax.broadcasted_iota(jnp.uint32, words.shape, d) * strides[d] for d in range(words.ndim)],
        np.uint32(0),
    )
    return _of_words(words, place)


def _as_words(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    array = _whole_bytes(array)
    bits = min(8 * array.dtype.itemsize, 32)
    return lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _host_words(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    array = _whole_bytes(array)
    bits = min(8 * array.dtype.itemsize, 32)
    words = np.ascontiguousarray(array).reshape(-1).view(f"uint{bits}").astype(np.uint32)
    return words, np.arange(words.size, dtype=np.uint32)


def _whole_bytes(array: Any) -> Any:
    """Returns an array of int4 and the like in a type of whole bytes, which loses nothing."""
    if jnp.issubdtype(array.dtype, jnp.integer) and jnp.iinfo(array.dtype).bits < 8:
        return array.astype(np.int8)
    if jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).bits < 8:
        return array.astype(np.float32)
    return array


def _of_words(words: Any, place: Any) -> Any:
    mixed = words ^ (place * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15))
    # The finalizer of MurmurHash3: a bijection in which every bit depends on every other.
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return (mixed ^ (mixed >> np.uint32(16))).sum(dtype=np.uint32)
