"""The closest product of two factors of a rank, to a product or to a matrix. Pure functions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora._adapters.init_from_weight import exact_product, svd_lowrank
from flax_tied_lora._tree.paths import is_tracer

# Up to this many rows or columns, on the shorter side, a matrix is decomposed as it is: a table of
# any length is cheap then. Above, only as much of it as is asked for.
_EXACT = 512
# Columns more than asked for, and passes, of the randomised decomposition: where singular values
# fall off slowly, as a full fine-tune's do, few of either would cost accuracy.
_MORE, _PASSES = 16, 8


def whole(array: jax.Array, like: Any = None) -> jax.Array:
    """Returns an array replicated on its devices, as decompositions want it.

    Args:
      like: an array on whose devices it shall be; default itself.
    """
    sharding = getattr(array if like is None else like, "sharding", None)
    if sharding is None or is_tracer(array):
        return array
    if isinstance(sharding, jax.NamedSharding):
        sharding = jax.NamedSharding(sharding.mesh, jax.P())
    return jax.device_put(array, sharding) if array.sharding != sharding else array


@functools.partial(jax.jit, static_argnames="rank")
def compressed(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Returns the factors of a rank whose product is closest to ``a @ b``, which is never made.

    Args:
      a: [batch, rows, r], float32.
      b: [batch, r, cols].
      rank: what is more than the product has is filled with zeros.

    Returns:
      [batch, rows, rank], with orthonormal columns, and [batch, rank, cols], with the singular
      values, as PEFT's ``add_weighted_adapter`` leaves them.
    """

    def one(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        left, upper = jnp.linalg.qr(a)
        right, lower = jnp.linalg.qr(b.T)
        u, s, vh = jnp.linalg.svd(exact_product(upper, lower.T), full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        return exact_product(left, u), s[:, None] * exact_product(vh, right.T)

    left, right = jax.vmap(one)(a, b)
    missing = rank - left.shape[-1]
    return (
        jnp.pad(left, ((0, 0), (0, 0), (0, missing))),
        jnp.pad(right, ((0, 0), (0, missing), (0, 0))),
    )


@functools.partial(jax.jit, static_argnames="rank")
def nearest(
    matrix: jax.Array, rank: int, rng: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the factors of a rank whose product is closest to a matrix, and how close it is.

    By a decomposition into singular values; of a matrix that is large on both sides by a randomised
    one (Halko et al., arXiv:0909.4061). Nothing is larger than the matrix.

    Args:
      matrix: [batch, rows, cols], float32.
      rank: at most the lesser of rows and cols.
      rng: key.

    Returns:
      [batch, rows, rank] and [batch, rank, cols], the singular values shared out evenly; the
      squared norm of what is left of the matrix, and that of the matrix.
    """
    short = min(matrix.shape[1:])
    exact = short <= _EXACT or 2 * (rank + _MORE) > short

    def one(matrix: jax.Array, rng: jax.Array) -> tuple[jax.Array, ...]:
        if exact:
            u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
        else:
            u, s, vh = svd_lowrank(matrix, rank + _MORE, _PASSES, rng)
        root = jnp.sqrt(s[:rank])
        a, b = u[:, :rank] * root[None, :], root[:, None] * vh[:rank]
        return a, b, jnp.sum(jnp.square(matrix - exact_product(a, b))), jnp.sum(jnp.square(matrix))

    a, b, left, all_ = jax.vmap(one)(matrix, jax.random.split(rng, matrix.shape[0]))
    return a, b, jnp.sum(left), jnp.sum(all_)
