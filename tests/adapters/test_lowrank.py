"""The closest product of a rank: no array larger than the matrix, a sketch of a large one."""

from __future__ import annotations

import functools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_tied_lora import LoraConfig, arithmetic
from flax_tied_lora._adapters import lowrank

TABLE = "embed_tokens/embedding"
close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)


def config(*targets, **options):
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": list(targets), **options})


def test_a_long_table_takes_no_square_of_its_length():
    rng = np.random.default_rng(0)
    factors = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((50_000, 4), (4, 64))]
    base = {"embed_tokens": {"embedding": jnp.zeros((50_000, 64))}}
    tuned = {"embed_tokens": {"embedding": factors[0] @ factors[1]}}
    start = time.perf_counter()
    found, errors = arithmetic.extract(base, tuned, config("embed_tokens", r=4))
    assert time.perf_counter() - start < 60
    assert errors[TABLE] < 1e-5
    shape = jax.ShapeDtypeStruct((1, 50_000, 64), jnp.float32)
    assert largest(lowrank.nearest, shape, rank=4, rng=jax.random.key(0)) <= 50_000 * 64
    assert not sketched(shape)
    combined = arithmetic.combine([found, found], [1.0, 1.0], "svd")
    pair = combined.adapters["lora"][TABLE]
    close(pair["lora_a"] @ pair["lora_b"], 2 * tuned["embed_tokens"]["embedding"], atol=1e-3)
    a, b = (jax.ShapeDtypeStruct((1, *s), jnp.float32) for s in ((50_000, 8), (8, 64)))
    assert largest(lowrank.compressed, a, b, rank=4) <= 50_000 * 8


def largest(fn, *args, rank, **options):
    """The number of entries of the largest array that a function makes."""
    sizes = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            sizes.extend(v.aval.size for v in eqn.outvars)
            for value in eqn.params.values():
                if hasattr(value, "jaxpr"):
                    visit(value.jaxpr)

    visit(jax.make_jaxpr(functools.partial(fn, rank=rank))(*args, **options).jaxpr)
    return max(sizes)


def sketched(shape):
    """Whether the decomposition is a randomised one."""
    nearest = functools.partial(lowrank.nearest, rank=4)
    return "random_bits" in str(jax.make_jaxpr(nearest)(shape, rng=jax.random.key(0)))


def test_a_matrix_large_on_both_sides_is_decomposed_by_a_sketch():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 520)))[0] for n in (530, 520))
    s = 1 / (1 + np.arange(520)) ** 0.5  # falls off slowly, as a full fine-tune's does
    matrix = ((u * s) @ v.T).astype(np.float32)
    shape = jax.ShapeDtypeStruct((1, 530, 520), jnp.float32)
    assert sketched(shape)
    a, b, left, whole = lowrank.nearest(jnp.asarray(matrix)[None], 4, jax.random.key(0))
    best = np.sum(s[4:] ** 2)
    assert float(whole) == pytest.approx(np.sum(s**2), rel=1e-4)
    assert best * 0.999 < float(left) < best * 1.001
    assert np.linalg.norm(a[0] @ b[0] - (u[:, :4] * s[:4]) @ v[:, :4].T) < 0.02
