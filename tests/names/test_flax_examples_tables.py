"""The table of Gemma in Flax's own examples: there and back, and its fused form.

`tests/libraries/` compares a model under these names with PyTorch's.
"""

from __future__ import annotations

import jax
import numpy as np

from flax_tied_lora.names import from_state_dict, names_of, to_state_dict
from tests.libraries.flax_gemma_like import shapes


def test_there_and_back():
    numbers = np.random.default_rng(0)
    draw = lambda x: numbers.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    params = jax.tree.map(draw, shapes())
    names = names_of("flax/gemma")
    state = to_state_dict(params, names)
    assert len(state) == 8 * 13 + 2
    jax.tree.map(np.testing.assert_array_equal, from_state_dict(state, params, names), params)
    assert dict(names.tied) == {"embedder/embedding": ("lm_head",)}


def test_the_fused_form_needs_the_heads():
    names = names_of({"model_type": "flax/gemma", "num_heads": 4, "num_kv_heads": 4})
    weights = names.to_torch("layers/0/attn/qkv_einsum/kernel", (3, 4, 16, 8))
    assert [w.module.rpartition(".")[2] for w in weights] == ["q_proj", "k_proj", "v_proj"]
