"""Ties that a config of transformers knows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from flax_tied_lora import find_ties

RNG = np.random.default_rng(0)
E = jnp.asarray(RNG.normal(size=(12, 8)), jnp.float32)
SQUARE = jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32)


def model(embedding=E, head=None, name="lm_head"):
    params = {"model": {"embed_tokens": {"embedding": embedding}, "up": {"kernel": SQUARE}}}
    return params if head is None else {**params, name: {"kernel": head}}


def test_config_of_transformers():
    import transformers

    config = transformers.LlamaConfig(vocab_size=12, tie_word_embeddings=True)
    assert find_ties(model(head=E.T + 1), config)[0].found == ("model config",)
    config = transformers.LlamaConfig(vocab_size=12, tie_word_embeddings=False)
    assert find_ties(model(head=E.T + 1), config) == []
