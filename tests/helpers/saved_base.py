"""Params with a transposed tie, their adapters, and params that differ from them in one leaf."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import flax_tied_lora as tied_lora

CONFIG = tied_lora.LoraConfig(r=2, target_modules=["embed", "dense"])
TIES = [("embed/embedding", "head/kernel")]


@functools.cache
def base_params():
    keys = iter(jax.random.split(jax.random.key(0), 3))
    table = jax.random.normal(next(keys), (64, 16))
    return {
        "embed": {"embedding": table},
        "dense": {"kernel": jax.random.normal(next(keys), (16, 16)), "bias": jnp.zeros(16)},
        "head": {"kernel": table.T},
    }


@functools.cache
def wrapped():
    adapted = tied_lora.wrap(base_params(), CONFIG, ties=TIES)
    return adapted.replace(adapters=jax.tree.map(noise, adapted.adapters))


def noise(x):
    """Random bits, which no compression makes smaller."""
    return jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)


def changed(path, value):
    module, name = path.split("/")
    params = base_params()
    return {**params, module: {**params[module], name: value}}


def without(module):
    return {name: value for name, value in base_params().items() if name != module}
