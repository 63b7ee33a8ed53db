"""An array with more entries along an axis: kept where it was, drawn or given where it is new."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._tree.paths import describe, is_tracer
from flax_tied_lora._tree.sharding import automatic, shard_count

# How much of the old rows' covariance new rows have, as in transformers' `mean_resizing`.
_COVARIANCE = 1e-9
# So many rows are drawn at a time: each takes a random number for every old row.
_BLOCK = 64


def grown(
    leaf: Any, axis: int, keep: int, size: int, init: Any, rng: jax.Array, *, path: str
) -> Any:
    """Returns a leaf with other entries along an axis from some number on.

    Args:
      leaf: an array or a `jax.ShapeDtypeStruct`; its dtype, its sharding, and whether it is NumPy's
        stay as they are.
      axis: of the vocabulary.
      keep: how many entries stay.
      size: how many there are then.
      init: ``"mean"``; an initializer, ``init(key, shape, dtype)`` as `jax.nn.initializers` have
        it, called with the shape of the new rows; or the first of the new rows, [n, ...], the
        others being drawn by ``"mean"``.
      rng: key.
      path: of the leaf, for errors.

    Raises:
      ValueError: the axis is sharded and cannot be split so; rows or an initializer's result are
        of the wrong shape.
    """
    rows = (size - keep, *(n for i, n in enumerate(leaf.shape) if i != axis))
    given: Any = None if isinstance(init, str) or callable(init) else jnp.asarray(init)
    fits = given is None or (given.ndim == len(rows) and given.shape[1:] == rows[1:])
    if not fits or (given is not None and len(given) > rows[0]):
        raise ValueError(
            f"grow_vocabulary: init for {path!r} is {describe(given)}; expected a row for each new "
            f"token, {list(rows)} or fewer. The leaf is {describe(leaf)}"
        )
    if not rows[0]:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = tuple(rows[0] if i == axis else n for i, n in enumerate(leaf.shape))
        return extended(leaf, axis, keep, jax.ShapeDtypeStruct(shape, leaf.dtype), path=path)
    if callable(init):
        new = jnp.asarray(init(rng, rows, leaf.dtype))
        if new.shape != rows:
            raise ValueError(
                f"grow_vocabulary: the initializer gave {describe(new)} for {path!r}; expected "
                f"the shape that it was called with, {list(rows)}"
            )
    else:
        new = _run(_like_the_mean, (axis, keep, rows[0]), _replicated(leaf), leaf, rng)
        if given is not None:
            rest = jax.lax.slice_in_dim(new, len(given), rows[0])
            new = jnp.concatenate([given.astype(jnp.float32), rest])
    return extended(leaf, axis, keep, jnp.moveaxis(new, 0, axis), path=path)


def extended(array: Any, axis: int, keep: int, new: Any, *, path: str) -> Any:
    """Returns an array with given entries along an axis from some number on.

    Args:
      array: as in `grown`.
      new: the entries, with the array's axes.

    Raises:
      ValueError: the axis is sharded and cannot be split so.
    """
    size = keep + new.shape[axis]
    sharding = _sharding(array, axis, size, path)
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = tuple(size if i == axis else n for i, n in enumerate(array.shape))
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=array.sharding)
    result = _run(_joined, (axis, keep), sharding, array, new)
    return np.asarray(result) if isinstance(array, np.ndarray) else result


def _joined(axis: int, keep: int, array: jax.Array, new: jax.Array) -> jax.Array:
    old = jax.lax.slice_in_dim(array, 0, keep, axis=axis)
    return jnp.concatenate([old, new.astype(array.dtype)], axis)


def _run(fn: Any, static: tuple[int, ...], sharding: Any, array: Any, other: Any) -> Any:
    if is_tracer(array):
        return fn(*static, array, other)
    return _compiled(fn, static, sharding)(array, other)


@functools.lru_cache(maxsize=64)
def _compiled(fn: Any, static: tuple[int, ...], sharding: jax.NamedSharding | None) -> Any:
    """Returns a function compiled for a sharding that it knows nothing of."""
    make = functools.partial(fn, *static)
    if sharding is not None and jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
        make = automatic(make, sharding)
    return jax.jit(make, out_shardings=sharding)


def _replicated(leaf: Any) -> jax.NamedSharding | None:
    sharding = None if is_tracer(leaf) else getattr(leaf, "sharding", None)
    named = isinstance(sharding, jax.NamedSharding)
    return jax.NamedSharding(sharding.mesh, jax.P()) if named else None


def _sharding(leaf: Any, axis: int, size: int, path: str) -> jax.NamedSharding | None:
    """Returns where a leaf is, if it is sharded by name; refuses a size that cannot be split."""
    sharding = None if is_tracer(leaf) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding):
        return None
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    count = shard_count(sharding.mesh, names)
    if size % count:
        raise ValueError(
            f"grow_vocabulary: {path!r} {describe(leaf)} is split in {count} along axis {axis}, "
            f"and {size} rows cannot be; pass pad_to_multiple_of={count}"
        )
    return sharding


def _like_the_mean(
    axis: int, keep: int, number: int, array: jax.Array, key: jax.Array
) -> jax.Array:
    """Returns draws from a normal distribution with the old rows' mean and 1e-9 their covariance.

    A random combination of the centred rows has their covariance, so none is ever computed. How
    many rows there are does not change the first ones.

    Returns:
      float32 [number, ...].
    """
    old = jax.lax.slice_in_dim(jnp.moveaxis(array, axis, 0), 0, keep)
    table = old.reshape(keep, -1)
    mean = jnp.mean(table, axis=0, dtype=jnp.float32)

    def draw(row: jax.Array) -> jax.Array:
        weights = jax.random.normal(jax.random.fold_in(key, row), (keep,))
        mixed = jnp.matmul(weights.astype(table.dtype), table, preferred_element_type=jnp.float32)
        return mean + math.sqrt(_COVARIANCE / keep) * (mixed - jnp.sum(weights) * mean)

    rows = jax.lax.map(draw, jnp.arange(number), batch_size=_BLOCK)
    return rows.reshape(number, *old.shape[1:])
