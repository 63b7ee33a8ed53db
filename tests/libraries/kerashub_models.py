"""Tiny models of KerasHub, taken apart as `keras.Model.stateless_call` does it."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras
    import keras_hub

import flax_tied_lora as tied_lora
from flax_tied_lora.names import names_of
from tests.libraries.comparing import loss_of
from tests.libraries.held import Held
from tests.libraries.reference import (
    HEAD,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    TOKENS,
    VOCABULARY,
    WIDTH,
)

models = keras_hub.models
_BODY = {
    "vocabulary_size": VOCABULARY, "num_layers": 2, "num_query_heads": HEADS,
    "num_key_value_heads": KEY_HEADS, "hidden_dim": WIDTH, "head_dim": HEAD,
    "intermediate_dim": HIDDEN,
}  # fmt: skip
_LLAMA = {k: v for k, v in _BODY.items() if k != "head_dim"} | {"tie_word_embeddings": True}
_GEMMA = {**_BODY, "intermediate_dim": 2 * HIDDEN}  # as KerasHub counts: gate and up together
_MORE_NORMS = {"use_post_ffw_norm": True, "use_post_attention_norm": True}
_WINDOW = {"use_sliding_window_attention": True, "sliding_window_size": 4}
# Family: backbone, its fields, the task, the reference.
FAMILIES: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "Llama 3": (
        models.Llama3Backbone,
        {**_LLAMA, "hidden_dim": HEADS * HEAD, "rope_max_wavelength": 10_000,
         "layer_norm_epsilon": 1e-6},
        models.Llama3CausalLM,
        "llama",
    ),
    "Qwen 3": (
        models.Qwen3Backbone,
        {**_BODY, "tie_word_embeddings": True, "rope_max_wavelength": 10_000,
         "layer_norm_epsilon": 1e-6},
        models.Qwen3CausalLM,
        "qwen3",
    ),
    "Gemma": (models.GemmaBackbone, _GEMMA, models.GemmaCausalLM, "gemma"),
    "Gemma 2": (
        models.GemmaBackbone,
        {**_GEMMA, **_MORE_NORMS, **_WINDOW, "num_layers": 4, "attention_logit_soft_cap": 50.0,
         "final_logit_soft_cap": 30.0},
        models.GemmaCausalLM,
        "gemma2",
    ),
    "Gemma 3": (
        models.Gemma3Backbone,
        {**_BODY, **_MORE_NORMS, **_WINDOW, "num_layers": 8, "use_query_key_norm": True,
         "vision_encoder": None, "image_size": 16},
        models.Gemma3CausalLM,
        "gemma3",
    ),
}  # fmt: skip
_ATTENTION = ["query", "key", "value", "attention_output"]


@functools.cache
def build(family: str) -> Held:
    backbone, fields, task, reference = FAMILIES[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras.config.disable_traceback_filtering()
        model = task(preprocessor=None, backbone=backbone(**fields, dtype="float32"))
    variables = model.trainable_variables
    frozen = [v.value for v in model.non_trainable_variables]
    mask = jnp.ones(TOKENS.shape, bool)

    def logits(params: Any, tokens: Any) -> Any:
        inputs = {"token_ids": tokens, "padding_mask": mask}
        return model.stateless_call([params[v.path] for v in variables], frozen, inputs)[0]

    def step(params: Any) -> tuple[float, float]:
        """Trains as Keras does: with a Keras optimizer, stateless."""
        adapted = wrap(params)
        leaves, tree = jax.tree.flatten(adapted.adapters)
        factors = [keras.Variable(x) for x in leaves]
        optimizer = keras.optimizers.AdamW(1e-3)
        optimizer.build(factors)

        def loss(values: list[Any]) -> Any:
            replaced = adapted.replace(adapters=jax.tree.unflatten(tree, values))
            return loss_of(tied_lora.adapt(logits)(replaced, TOKENS), TOKENS)

        before, grads = jax.value_and_grad(loss)([v.value for v in factors])
        state = [v.value for v in optimizer.variables]
        after, _ = optimizer.stateless_apply(state, grads, [v.value for v in factors])
        return float(before), float(loss(after))

    feedforward = ["ffw_gating", "ffw_gating_2", "ffw_linear"]
    if "transformer_layer_0/feedforward_gate_dense/kernel" in {v.path for v in variables}:
        feedforward = [f"feedforward_{x}_dense" for x in ("gate", "intermediate", "output")]
    targets = ["token_embedding", *_ATTENTION, *feedforward]

    def wrap(params: Any) -> tied_lora.Adapted:
        config = tied_lora.LoraConfig(r=2, target_modules=targets)
        return tied_lora.wrap(params, config, sites=tied_lora.trace(logits, params, TOKENS))

    return Held(
        library="KerasHub",
        family=family,
        reference=reference,
        call=logits,
        like={v.path: jax.ShapeDtypeStruct(v.shape, np.float32) for v in variables},
        names=names_of(model),
        table="token_embedding/embeddings",
        targets=targets,
        step=step,
        idiom="Keras optimizer, `stateless_apply`",
    )
