"""Weights that are scaled: before what is cast, and by one of their own entries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.helpers import one_kernel


def test_a_scale_is_applied_before_the_cast_to_float16():
    adapted = one_kernel.wrapped(jnp.float16)
    big = {"dense": {"kernel": jnp.full((8, 4), 600, jnp.float16)}}
    adapted = adapted.replace(params=big)
    x = jnp.full((3, 8), 30, jnp.float16)
    use = tied_lora.adapt(lambda p: x @ (p["dense"]["kernel"] * jnp.float16(1e-3)))
    merged = tied_lora.merge(adapted)["dense"]["kernel"]
    expected = x.astype(jnp.float32) @ (merged.astype(jnp.float32) * 1e-3)
    found = use(adapted)
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=5e-3)


def test_a_small_divisor_does_not_overflow_in_float16():
    adapted = one_kernel.wrapped(jnp.float16)
    small = jax.tree.map(lambda x: x * jnp.asarray(1e-4, x.dtype), adapted.params)
    zero = jax.tree.map(jnp.zeros_like, adapted.adapters)
    use = tied_lora.adapt(
        lambda p: one_kernel.X.astype(jnp.float16) @ (p["dense"]["kernel"] / jnp.float16(1e-5))
    )
    assert jnp.all(jnp.isfinite(use(adapted.replace(params=small, adapters=zero))))


@pytest.mark.parametrize("operation", [jnp.multiply, lambda x, w: w / x])
def test_one_entry_of_a_weight_times_an_array(operation):
    """JAX's arithmetic takes a scalar beside an array of any shape, with no broadcast between."""
    one_kernel.check(lambda w: operation(2 + jnp.abs(one_kernel.X), w[0, 0]), on_dense="allow")
