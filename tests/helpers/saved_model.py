"""A tied model, its adapters and an optimizer with a schedule, to be saved."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_tied_lora as tied_lora

VOCAB, WIDTH = 32, 16


class Model(nn.Module):
    """An embedding that is its own head, with a layer between."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH, name="embed")
        return embed.attend(nn.tanh(nn.Dense(WIDTH, name="dense")(embed(tokens))))


MODEL = Model()
TOKENS = jax.random.randint(jax.random.key(9), (64, 8), 0, VOCAB)
CONFIG = tied_lora.LoraConfig(r=2, target_modules=["embed", "dense"], lora_dropout=0.1)
OPTIMIZER = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.05, 3, 20))


@functools.cache
def base_params():
    return MODEL.init(jax.random.key(0), TOKENS[:1])["params"]


def tied_params():
    """Params in which the table stands three times: twice as it is, once transposed."""
    table = base_params()["embed"]["embedding"]
    tied = {"second": {"embedding": table}, "head": {"kernel": table.T}}
    return {**base_params(), **tied}


TIES = [("embed/embedding", "head/kernel")]


def wrapped(params=None, seed=1, **kwargs):
    """An Adapted with factors that are all random, as if trained."""
    params = base_params() if params is None else params
    adapted = tied_lora.wrap(params, CONFIG, **kwargs)
    leaves, treedef = jax.tree.flatten(adapted.adapters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return adapted.replace(adapters=jax.tree.unflatten(treedef, noise))


def assert_same(found, expected):
    """The same structure, types and bits; typed random keys of the same implementation."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(x) is type(y)
        if hasattr(x, "dtype"):
            assert x.dtype == y.dtype
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
