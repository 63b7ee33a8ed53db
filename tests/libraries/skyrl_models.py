"""Tiny models of SkyRL tx, on configs of transformers."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import LlamaConfig, Qwen3Config
    from tx.models import configs, llama3, qwen3

from flax_tied_lora.names import names_of
from tests.libraries.held import Held, optax_step
from tests.libraries.reference import reference

# Reference: the class, the config's wrapper, transformers' config.
FAMILIES: dict[str, tuple[Any, Any, Any, str]] = {
    "llama": (llama3.Llama3ForCausalLM, configs.Llama3Config, LlamaConfig, "Llama"),
    "qwen3": (qwen3.Qwen3ForCausalLM, configs.Qwen3Config, Qwen3Config, "Qwen 3"),
}
TARGETS = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
           "down_proj"]  # fmt: skip


@functools.cache
def build(name: str) -> Held:
    kind, wrapper, transformers_config, title = FAMILIES[name]
    config = wrapper(
        transformers_config(**reference(name).config),
        max_lora_adapters=0,
        max_lora_rank=0,
        shard_attention_heads=True,
    )
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = kind(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def call(params: Any, tokens: Any) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        # Its tied head is a closure over the table that the first model was made with.
        model.lm_head = model.model.embed_tokens.T
        hidden = model(tokens, attention_mask=jnp.ones_like(tokens)).last_hidden_state
        return model.compute_logits(hidden)

    return Held(
        library="SkyRL tx",
        family=title,
        reference=name,
        call=call,
        like=like,
        names=names_of(config),
        table="model/embed_tokens/embedding",
        targets=TARGETS,
        step=functools.partial(optax_step, call, targets=TARGETS),
        idiom="Optax",
    )
