"""A tied model whose params are stored quantised, and adapters of it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

import flax_tied_lora as tied_lora
from flax_tied_lora._tree.paths import flatten
from tests.helpers.oracle import numbers, perturbed

VOCABULARY, WIDTH = 96, 32
QTYPES = ("int8", "nf4", "int4")
TOKENS = numbers(2, 6, below=VOCABULARY)
each_qtype = pytest.mark.parametrize("qtype", QTYPES)


class Model(nn.Module):
    """A tied table, a kernel with head axes, one that sums over two axes, two plain ones."""

    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(VOCABULARY, WIDTH, dtype=self.dtype, name="embed_tokens")
        x = table(tokens)
        x += nn.DenseGeneral(WIDTH, axis=(-2, -1), dtype=self.dtype, name="o_proj")(
            nn.DenseGeneral((2, 16), dtype=self.dtype, name="q_proj")(x)
        )
        up = nn.tanh(nn.Dense(64, dtype=self.dtype, name="up")(x))
        return table.attend(x + nn.Dense(WIDTH, dtype=self.dtype, name="down")(up))


MODEL = Model()
PARAMS = MODEL.init(jax.random.key(0), TOKENS)["params"]
SITES = tied_lora.trace(MODEL.apply, {"params": PARAMS}, TOKENS)
MATRICES = {p for p, x in traverse_util.flatten_dict(PARAMS, sep="/").items()
            if x.ndim > 1 and not p.endswith("bias")}  # fmt: skip


def apply(params, tokens):
    return MODEL.apply({"params": params}, tokens)


def wrapped(params, **fields) -> tied_lora.Adapted:
    fields = {"r": 3, "target_modules": ["embed_tokens", "q_proj"], **fields}
    return perturbed(tied_lora.wrap(params, tied_lora.LoraConfig(**fields), sites=SITES), size=0.2)


def flat(tree):
    return flatten(tree)[0]
