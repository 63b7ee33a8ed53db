"""Tiny models of tunix's families, on the models' own configs."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.libraries.comparing import (
    BATCH,
    HEAD,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    TABLE,
    VOCABULARY,
    WIDTH,
)

with warnings.catch_warnings():
    # tunix and what it imports use what newer releases of their own dependencies deprecate.
    warnings.simplefilter("ignore")
    sharding_of_variables = flax.config.flax_always_shard_variable
    from tunix.generate import sampler as sampler
    from tunix.models.gemma import model as gemma
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import rl_cluster as rl_cluster
    from tunix.rl.grpo import grpo_learner as grpo_learner
    from tunix.rl.rollout import base_rollout as base_rollout
    from tunix.sft import peft_trainer as peft_trainer
    from tunix.sft.dpo import dpo_trainer as dpo_trainer

    # Importing tunix turns a setting of Flax off for everybody; the other tests run with it on.
    flax.config.update("flax_always_shard_variable", sharding_of_variables)

LAYERS = 2

_BODY = {
    "num_layers": LAYERS,
    "embed_dim": WIDTH,
    "hidden_dim": HIDDEN,
    "num_heads": HEADS,
    "num_kv_heads": KEY_HEADS,
    "head_dim": HEAD,
}
_LLAMA_LIKE = {**_BODY, "vocab_size": VOCABULARY, "rope_theta": 10_000, "norm_eps": 1e-6}
_GEMMA = {
    **_BODY,
    "num_embed": VOCABULARY,
    "final_logit_softcap": None,
    "use_post_attn_norm": False,
    "use_post_ffw_norm": False,
    "attention_types": (gemma.AttentionType.GLOBAL,) * LAYERS,
}
_GEMMA2 = {
    **_GEMMA,
    "final_logit_softcap": 30.0,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "attention_types": (gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL),
    "attn_logits_soft_cap": 50.0,
    "sliding_window_size": 4,
}
_PROJECTIONS = ("attn/q_proj/w", "attn/k_proj/w", "attn/v_proj/w", "attn/o_proj/w")
_EINSUMS = ("attn/q_einsum/w", "attn/kv_einsum/w", "attn/attn_vec_einsum/w")
_MLP = tuple(f"mlp/{p}_proj/kernel" for p in ("gate", "up", "down"))


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of tunix.

    Attributes:
      module: its module in ``tunix.models``.
      model: the class.
      fields: of its ``ModelConfig``.
      leaves: the adapted leaves of a layer, each read once.
      reads: of a layer, where a leaf is read more often.
    """

    module: Any
    model: str
    fields: dict[str, Any]
    leaves: tuple[str, ...]
    reads: int | None = None

    @property
    def targets(self) -> list[str]:
        return [TABLE, *self.leaves]


FAMILIES = {
    "qwen2": Family(
        qwen2, "Qwen2", {**_LLAMA_LIKE, "use_tied_embedding": True}, _PROJECTIONS + _MLP
    ),
    "qwen3": Family(
        qwen3, "Qwen3", {**_LLAMA_LIKE, "use_tied_embedding": True}, _PROJECTIONS + _MLP
    ),
    "qwen3 with experts": Family(
        qwen3,
        "Qwen3",
        {
            **_LLAMA_LIKE,
            "use_tied_embedding": True,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "num_layers": 1,
        },
        (*_PROJECTIONS, *(f"mlp/{p}_proj" for p in ("gate", "up", "down"))),
        reads=4 + 3 * 2,
    ),
    "llama3": Family(llama3, "Llama3", {**_LLAMA_LIKE, "weight_tying": True}, _PROJECTIONS + _MLP),
    "gemma": Family(gemma, "Gemma", _GEMMA, _EINSUMS + _MLP),
    "gemma2": Family(gemma, "Gemma", _GEMMA2, _EINSUMS + _MLP),
    "gemma2 fused": Family(
        gemma,
        "Gemma",
        {**_GEMMA2, "num_kv_heads": HEADS},
        ("attn/qkv_einsum/w", "attn/attn_vec_einsum/w", *_MLP),
    ),
    "gemma3": Family(
        gemma3,
        "Gemma3",
        {
            **_BODY,
            "num_embed": VOCABULARY,
            "sliding_window_size": 4,
            "param_dtype": jnp.float32,
        },
        _EINSUMS + _MLP,
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, taken apart as NNX does it: the graph, and the state that a function is given."""

    family: Family
    model: nnx.Module
    graph: Any
    state: Any

    def call(self, state: Any, tokens: Any, cache: Any = None, start: Any = 0) -> tuple[Any, Any]:
        """Returns logits and the cache, of tokens that begin at a position.

        Without a cache the mask is causal; with one, tokens see all that is in the cache.
        """
        batch, length = tokens.shape
        places = start + jnp.arange(length)
        seen = jnp.arange(length if cache is None else cache["layer_0"]["k"].shape[1])
        mask = jnp.broadcast_to(seen <= places[:, None], (batch, length, len(seen)))
        positions = jnp.broadcast_to(places, (batch, length))
        return nnx.merge(self.graph, state)(tokens, positions, cache, mask)

    def logits(self, state: Any, tokens: Any) -> Any:
        return self.call(state, tokens)[0]

    def new_cache(self, length: int, dtype: Any = jnp.float32) -> Any:
        """Returns an empty cache, as tunix's sampler makes it."""
        fields = self.family.fields
        shape = (BATCH, length, fields["num_kv_heads"], fields["head_dim"])
        return {
            f"layer_{i}": {
                "k": jnp.zeros(shape, dtype),
                "v": jnp.zeros(shape, dtype),
                "end_index": jnp.zeros((BATCH,), jnp.int32),
            }
            for i in range(fields["num_layers"])
        }


@functools.cache
def build(name: str, remat: str = "NONE") -> Case:
    """Returns a model with random params: tunix's own are zero in every MLP."""
    family = FAMILIES[name]
    fields = {**family.fields, "remat_config": family.module.RematConfig[remat]}
    config = family.module.ModelConfig(**fields)
    make = getattr(family.module, family.model)
    with flax.config.temp_flip_flag("always_shard_variable", False):
        graph, state = nnx.split(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))))
    numbers = np.random.default_rng(1)
    state = jax.tree.map(
        lambda x: jnp.asarray(0.4 * numbers.standard_normal(x.shape), x.dtype), state
    )
    return Case(family, nnx.merge(graph, state), graph, state)
