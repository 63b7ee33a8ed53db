"""A model of one kernel, of any dtype, and its comparison with the merged kernel's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import flax_tied_lora as tied_lora

X = jax.random.normal(jax.random.key(1), (3, 8))


def wrapped(dtype: Any = jnp.float32, **options: Any) -> tied_lora.Adapted:
    kernel = jax.random.normal(jax.random.key(0), (8, 4)).astype(dtype)
    config = tied_lora.LoraConfig(r=2, lora_alpha=4, target_modules=["dense"], **options)
    adapted = tied_lora.wrap({"dense": {"kernel": kernel}}, config)
    keys = iter(jax.random.split(jax.random.key(2), 2))
    return adapted.replace(
        adapters=jax.tree.map(
            lambda f: f + jax.random.normal(next(keys), f.shape), adapted.adapters
        )
    )


def check(use: Any, adapted: Any = None, **options: Any) -> None:
    """Compares values and gradients with those of the merged weight."""
    adapted = wrapped() if adapted is None else adapted

    def ours(adapters: Any) -> Any:
        found = tied_lora.adapt(lambda p: use(p["dense"]["kernel"]), **options)
        return found(adapted.replace(adapters=adapters))

    def merged(adapters: Any) -> Any:
        return use(tied_lora.merge(adapted.replace(adapters=adapters))["dense"]["kernel"])

    def gradient(f: Any) -> Any:
        return jax.grad(lambda adapters: jnp.sum(jnp.sin(f(adapters))))

    for function in (lambda f: f, gradient):
        left, right = (jax.tree.leaves(function(f)(adapted.adapters)) for f in (ours, merged))
        for a, b in zip(left, right, strict=True):
            assert jnp.abs(a - b).max() <= 2e-5 * jnp.abs(b).max()


def product(x: jax.Array) -> Any:
    def use(w: jax.Array) -> jax.Array:
        dims = (((1,), (0,)), ((), ()))
        return lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)

    return use
