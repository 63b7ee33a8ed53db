"""Initial factors that read the weight (PiSSA, OLoRA), and orthogonal ones. Pure functions.

All matrices are kernels in Flax's layout, [inputs, outputs]; PyTorch's weight is the transpose.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import Precision

# As in PEFT: these factors are read off the values, which a quantised weight only stands for.
_DTYPES = ("float32", "float16", "bfloat16")
_NITER = re.compile(r"pissa_niter_(\d+)")


def reads_weight(how: Any) -> bool:
    """Returns whether `from_weight` makes the factors that ``init_lora_weights`` names."""
    return isinstance(how, str) and (
        how == "pissa" or how.lower() == "olora" or _NITER.fullmatch(how) is not None
    )


def from_weight(
    how: str, weight: Any, rank: int, scaling: Any, rng: Any, *, leaf: str = "the weight"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns factors that are a part of the weight, and the rest of it, to freeze in its place.

    ``scaling * lora_a @ lora_b + residual`` is the weight, up to rounding to its dtype. Follows
    ``pissa_init`` and ``olora_init`` of ``peft.tuners.lora.layer.LoraLayer``: PiSSA
    (arXiv:2404.02948) takes the largest singular values, half of each in either factor; OLoRA
    (arXiv:2406.01775) the first columns of the QR decomposition of PyTorch's weight, and leaves
    the scaling to the residual. For several matrices at once, `jax.vmap` it.

    Args:
      how: ``"pissa"``, ``"pissa_niter_<k>"`` (a randomised decomposition with k subspace
        iterations: faster, close to the same) or ``"olora"``.
      weight: [rows, cols], a kernel's inputs and outputs.
      rank: at most the lesser of rows and cols.
      scaling: of the adapter; above 0.
      rng: key; only ``"pissa_niter_<k>"`` draws from it.
      leaf: what errors call the weight.

    Returns:
      ``lora_a`` [rows, rank] and ``lora_b`` [rank, cols] in float32, and the residual
      [rows, cols] in the weight's dtype.

    Raises:
      ValueError: an unknown name, a weight that is no matrix, or a rank above what it can hold.
      TypeError: the weight is not float32, float16 or bfloat16.
    """
    if not reads_weight(how):
        raise ValueError(
            f"init_lora_weights={how!r}: expected 'pissa', 'pissa_niter_<number of iterations>' or "
            "'olora'"
        )
    weight = jnp.asarray(weight)
    _check(how, weight, rank, leaf)
    matrix = weight.astype(jnp.float32)
    if how.lower() == "olora":
        a, b = _olora(matrix, rank)
    else:
        iterations = _NITER.fullmatch(how)
        if iterations is None:
            u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
        else:
            u, s, vh = svd_lowrank(matrix, rank, int(iterations[1]), rng)
        root = jnp.sqrt(s[:rank] / scaling)
        a, b = u[:, :rank] * root[None, :], root[:, None] * vh[:rank]
    residual = matrix - scaling * _product(a, b)
    return a, b, residual.astype(weight.dtype)


def orthogonal(
    rng: Any, rows: int, cols: int, rank: int, *, leaf: str = "the weight"
) -> tuple[jax.Array, jax.Array]:
    """Returns factors whose product is zero though neither is: the weight stays as it is.

    Follows ``orthogonal_init`` of ``peft.tuners.lora.layer.LoraLayer``: the even and the odd rows
    of one random orthogonal matrix, each mixed at random.

    Args:
      rng: key.
      rows, cols: of the weight.
      rank: an even number.
      leaf: what errors call the weight.

    Returns:
      ``lora_a`` [rows, rank] and ``lora_b`` [rank, cols] in float32.

    Raises:
      ValueError: the rank is odd.
    """
    if rank % 2:
        raise ValueError(
            f"init_lora_weights='orthogonal': {leaf} has rank {rank}; expected an even one, half "
            "of which goes to either factor. Change r, or its entry in rank_pattern"
        )
    square, left, right = jax.random.split(rng, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(square, (rank, rank), jnp.float32))
    a = _product(jax.random.normal(left, (rows, rank // 2), jnp.float32), q[0::2])
    b = _product(q[1::2].T, jax.random.normal(right, (rank // 2, cols), jnp.float32))
    return a / 10, b / 10


def _check(how: str, weight: jax.Array, rank: int, leaf: str) -> None:
    what = f"init_lora_weights={how!r}: {leaf}"
    if weight.dtype.name not in _DTYPES:
        raise TypeError(
            f"{what} is {weight.dtype.name}; expected {', '.join(_DTYPES)}. Initialise with the "
            "unquantised weight, and quantise the residual afterwards"
        )
    if weight.ndim != 2:
        raise ValueError(f"{what} is {list(weight.shape)}; expected a matrix [rows, cols]")
    if not 0 < rank <= min(weight.shape):
        raise ValueError(
            f"{what} {list(weight.shape)} gives factors of rank 1 to {min(weight.shape)}; found "
            f"rank {rank}. Change r, or its entry in rank_pattern"
        )


def _olora(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    # Of the transpose's decomposition Q R the first columns of Q are those of its first columns
    # alone, and the first rows of R then follow: no need to decompose the whole.
    q, _ = jnp.linalg.qr(matrix[:rank].T)
    r = jnp.triu(_product(q.T, matrix.T))
    return r.T, q.T


def svd_lowrank(
    matrix: jax.Array, rank: int, iterations: int, rng: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns an approximate u, s, vh of a rank: algorithm 5.1 of Halko et al. (arXiv:0909.4061).

    Follows ``torch.svd_lowrank``, which works on the taller of PyTorch's weight and its transpose.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    tall = matrix.T if wide else matrix
    q = _basis(_product(tall, jax.random.normal(rng, (tall.shape[1], rank), jnp.float32)))
    for _ in range(iterations):
        q = _basis(_product(tall, _basis(_product(tall.T, q))))
    u, s, vh = jnp.linalg.svd(_product(q.T, tall), full_matrices=False)
    u = _product(q, u)
    return (vh.T, s, u.T) if wide else (u, s, vh)


def _basis(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.qr(matrix)[0]


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    # An accelerator's default rounds to bfloat16 or TF32, which the residual would keep for good.
    return jnp.matmul(x, y, precision=Precision.HIGHEST)
