"""On a GPU: the oracle in the dtypes that are trained in, and a training step that compiles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.helpers import gpt2_shape

pytestmark = pytest.mark.gpu

SHAPE = gpt2_shape.Shape(512, 64, 128, 4, 2, 2, 32)
TARGETS = ["wte", "c_attn"]


def adapted(dtype: Any) -> tied_lora.Adapted:
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def draw(x: Any) -> jax.Array:
        return (jax.random.normal(next(keys), x.shape) / 8).astype(dtype)

    params = jax.tree.map(draw, gpt2_shape.params(SHAPE))
    whole = tied_lora.wrap(params, tied_lora.LoraConfig(r=8, target_modules=TARGETS))
    return whole.replace(
        adapters=jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) / 8, whole.adapters)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_adapted_equals_merged(dtype):
    assert jax.default_backend() == "gpu", "make test-gpu needs a GPU"
    tokens = jnp.arange(64).reshape(2, 32)

    def logits(params: Any) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("float32"):
            return gpt2_shape.forward(params, tokens, SHAPE).astype(jnp.float32)

    whole = adapted(dtype)
    wide = whole.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), whole.params))
    reference = logits(tied_lora.merge(wide))
    ours = jax.jit(tied_lora.adapt(logits, on_dense="error"))(whole)
    merged = logits(tied_lora.merge(whole))
    error, limit = (np.abs(x - reference).max() for x in (ours, merged))
    assert error <= 2 * limit + 1e-5 * np.abs(reference).max()


def test_the_training_step_makes_no_table():
    compiled = gpt2_shape.ours(SHAPE, TARGETS, on_dense="error").compile()
    by_hand = gpt2_shape.by_hand(SHAPE, TARGETS).compile()
    ours, hand = (c.memory_analysis().temp_size_in_bytes for c in (compiled, by_hand))
    assert ours <= 1.05 * hand
