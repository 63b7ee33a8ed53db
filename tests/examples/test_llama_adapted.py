"""The examples' Llama family adapted: tied, all low rank, values and gradients as merged."""

from __future__ import annotations

import functools
from typing import Any

import jax
import llama
import numpy as np
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
from tests.libraries import comparing

pytestmark = pytest.mark.usefixtures("standard_promotion")
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
TIED = {"tie_word_embeddings": True}
FAMILIES = {
    "llama": TIED,
    "llama untied": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": TIED,
    "qwen3": TIED,
    "smollm3": {"no_rope_layers": [1, 0]},
    "gemma": {},
    "gemma2": MIXED,
    "gemma3_text": MIXED,
}
LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)


def config_of(name: str) -> llama.Config:
    return llama.Config.from_hf({"model_type": name, **SIZES, **FAMILIES[name]})


def model_of(name: str) -> llama.Llama:
    """Returns a model whose weights, biases and norms are all away from their beginnings."""
    model = llama.Llama(config_of(name), rngs=nnx.Rngs(0))
    numbers = np.random.default_rng(1)
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        leaf.set_value(leaf[...] + 0.2 * numbers.standard_normal(leaf.shape, np.float32))
    return model


@functools.cache
def targets(name: str) -> list[str]:
    return [*LINEAR, "embed_tokens" if config_of(name).tie_word_embeddings else "lm_head"]


@pytest.mark.parametrize("name", FAMILIES)
def test_values_and_gradients_are_those_of_the_merged_model(name):
    graph, params = nnx.split(model_of(name), nnx.Param)

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, copy=True)(tokens)

    adapted = comparing.wrapped(logits, params, targets(name), TOKENS)
    comparing.assert_merged(logits, adapted, TOKENS)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_site_is_low_rank_and_the_table_one(name):
    model = model_of(name)
    config = tied_lora.LoraConfig(r=2, target_modules=targets(name), init_lora_weights=False)
    adapted = tied_lora.nnx.wrap(model, config, sites=tied_lora.nnx.trace(model, TOKENS))
    explanation = tied_lora.nnx.explain(adapted, TOKENS)
    explanation.assert_tied()
    assert {read.served for read in explanation.reads} == {"low rank"}
    assert len(explanation.groups) == 2 * len(LINEAR) + 1
    found = jax.jit(lambda adapted: adapted(TOKENS))(adapted)
    merged = tied_lora.nnx.merge(adapted)
    assert comparing.far(found, merged(TOKENS)) < 1e-5
    tied = config_of(name).tie_word_embeddings
    roles = [read.site.role for read in explanation.reads if "_proj" not in read.site.leaf]
    assert sorted(roles) == (["lookup", "projection"] if tied else ["projection"])


@pytest.mark.parametrize("name", ["llama", "llama untied", "gemma2"])
def test_a_loss_without_logits(name):
    """`hidden` and `output_matrix` are what `linear_cross_entropy` takes, adapted or not."""
    graph, params = nnx.split(model_of(name), nnx.Param)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params, copy=True)
        return tied_lora.losses.linear_cross_entropy(
            model.hidden(tokens[:, :-1]), model.output_matrix(), tokens[:, 1:],
            logit_soft_cap=model.config.logit_cap,
        )  # fmt: skip

    def plain(params: Any, tokens: Any) -> Any:
        logits = nnx.merge(graph, params, copy=True)(tokens[:, :-1])
        chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, 1:, None], 2)
        return -chosen.mean()

    adapted = comparing.wrapped(loss, params, targets(name), TOKENS)
    found = jax.jit(tied_lora.adapt(loss, on_dense="error"))(adapted, TOKENS)
    np.testing.assert_allclose(found, plain(tied_lora.merge(adapted), TOKENS), rtol=1e-5)
