"""A tied model with a fused kernel, and adapters of its parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from tests.helpers.oracle import array
from tests.helpers.small_models import wrapped

PARAMS = {
    "embed_tokens": {"embedding": array(32, 16, seed=1)},
    "qkv": {"kernel": array(16, 48, seed=2)},
}


QKV = {"qkv": (-1, {"q": 24, "k": 16, "v": 8})}
X = np.array([[1, 2, 3], [4, 5, 6]], np.int32)


def fn(params, tokens):
    table = params["embed_tokens"]["embedding"]
    x = table[tokens]
    q, k, v = jnp.split(x @ params["qkv"]["kernel"], [24, 40], axis=-1)
    return (x + jnp.tanh(q[..., :16]) * k + jnp.tile(v, 2)) @ table.T


run = jax.jit(tied_lora.adapt(fn, on_dense="error"))
plain = jax.jit(fn)


def parts(*targets, **fields):
    return wrapped(PARAMS, list(targets), **{"parts": QKV, **fields})
