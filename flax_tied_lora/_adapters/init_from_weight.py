"""Initial factors that read the weight (PiSSA, OLoRA), and orthogonal ones. Pure functions.

All matrices are kernels in Flax's layout, [inputs, outputs]; PyTorch's weight is the transpose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import Precision

from flax_tied_lora._adapters.spans import cut, pasted
from flax_tied_lora._config.checks import PISSA_NITER, reads_weight
from flax_tied_lora._planning.plan import LORA, AdapterPlan, GroupPlan, Plan
from flax_tied_lora._tree.boxes import in_place, unboxed
from flax_tied_lora._tree.keys import key_number
from flax_tied_lora._tree.quantized_array import is_quantized
from flax_tied_lora._tree.sharding import replicated

# As in PEFT: these factors are read off the values, which a quantised weight only stands for.
_DTYPES = ("float32", "float16", "bfloat16")


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
        iterations = PISSA_NITER.fullmatch(how)
        if iterations is None:
            u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
        else:
            u, s, vh = svd_lowrank(matrix, rank, int(iterations[1]), rng)
        root = jnp.sqrt(s[:rank] / scaling)
        a, b = u[:, :rank] * root[None, :], root[:, None] * vh[:rank]
    residual = matrix - scaling * exact_product(a, b)
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
    a = exact_product(jax.random.normal(left, (rows, rank // 2), jnp.float32), q[0::2])
    b = exact_product(q[1::2].T, jax.random.normal(right, (rank // 2, cols), jnp.float32))
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
    r = jnp.triu(exact_product(q.T, matrix.T))
    return r.T, q.T


def svd_lowrank(
    matrix: jax.Array, rank: int, iterations: int, rng: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns an approximate u, s, vh of a rank: algorithm 5.1 of Halko et al. (arXiv:0909.4061).

    Follows ``torch.svd_lowrank``, which works on the taller of PyTorch's weight and its transpose.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    tall = matrix.T if wide else matrix
    q = _basis(exact_product(tall, jax.random.normal(rng, (tall.shape[1], rank), jnp.float32)))
    for _ in range(iterations):
        q = _basis(exact_product(tall, _basis(exact_product(tall.T, q))))
    u, s, vh = jnp.linalg.svd(exact_product(q.T, tall), full_matrices=False)
    u = exact_product(q, u)
    return (vh.T, s, u.T) if wide else (u, s, vh)


def _basis(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.qr(matrix)[0]


def exact_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns a matrix product in float32: an accelerator's default rounds to bfloat16 or TF32."""
    return jnp.matmul(x, y, precision=Precision.HIGHEST)


def start_from_weights(
    plan: Plan, adapters: dict[str, Any], leaves: Mapping[str, Any],
    scalings: Mapping[str, float], rng: jax.Array,
) -> tuple[dict[str, Any], Mapping[str, Any]]:  # fmt: skip
    """Returns the adapters and the params after ``init_lora_weights`` that factors go by.

    Args:
      adapters: as `make_adapters` made them.
      leaves: the params, by path.
      scalings: of the factors, by key.
      rng: each adapter's key is folded into it.

    Raises:
      TypeError, ValueError: as `from_weight`; or the weight is stored quantised.
    """
    how = plan.config.init_lora_weights
    # Tables start as ever: PEFT's embeddings know no other initialisation.
    chosen = [
        (g, a) for g, a in plan.adapters(LORA)
        if (a.residual or (how == "orthogonal" and not g.is_table))
        and not isinstance(leaves[g.key], jax.ShapeDtypeStruct)
    ]  # fmt: skip
    if not chosen:
        return adapters, leaves
    for group, adapter in chosen:
        if adapter.residual and is_quantized(unboxed(leaves[group.key])):
            raise ValueError(
                f"wrap: init_lora_weights={how!r} takes the first values of the factors out of "
                f"{group.key!r}, which is stored quantised; wrap the floating-point params, then "
                "quantize(adapted)"
            )
    leaves, lora = dict(leaves), dict(adapters[LORA])
    for group, adapter in chosen:
        key = jax.random.fold_in(rng, key_number(f"{adapter.key}/start"))
        box, leaf = leaves[group.key], unboxed(leaves[group.key])
        a, b, residual = _start(str(how), group, adapter, leaf, scalings[adapter.key], key)
        zeros = lora[adapter.key]
        factors = {"lora_a": in_place(zeros["lora_a"], a), "lora_b": in_place(zeros["lora_b"], b)}
        lora[adapter.key] = {**zeros, **factors}
        if adapter.residual:
            leaves[group.key] = in_place(box, residual)
    return {**adapters, LORA: lora}, leaves


def _start(
    how: str, group: GroupPlan, adapter: AdapterPlan, leaf: Any, scaling: float, key: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    """Returns ``lora_a``, ``lora_b`` and the residual in the leaf's own layout."""
    shapes = group.shapes(adapter)
    order = (*group.batch, *group.rows, *group.cols)
    sides = group.batch, group.rows, group.cols
    shape = group.shape_of(adapter)
    size = [math.prod(shape[i] for i in axes) for axes in sides]
    keys = jax.random.split(key, size[0])
    if not adapter.residual:
        make = functools.partial(orthogonal, rows=size[1], cols=size[2], rank=adapter.rank)
        a, b = jax.vmap(make)(keys)
        return a.reshape(shapes["lora_a"]), b.reshape(shapes["lora_b"]), None
    whole = replicated(jnp.asarray(leaf))
    matrices = jnp.transpose(cut(whole, adapter.span), order).reshape(size)
    make = functools.partial(_one, how, adapter.rank, scaling, group.key)
    a, b, rest = jax.vmap(make)(matrices, keys)
    rest = rest.reshape([shape[i] for i in order])
    rest = jnp.transpose(rest, [order.index(i) for i in range(len(order))])
    rest = pasted(whole, rest.astype(whole.dtype), adapter.span)
    return a.reshape(shapes["lora_a"]), b.reshape(shapes["lora_b"]), rest


def _one(how: str, rank: int, scaling: float, leaf: str, matrix: Any, key: Any) -> Any:
    return from_weight(how, matrix, rank, scaling, key, leaf=f"{leaf!r}")
