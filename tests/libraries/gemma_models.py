"""Tiny models of DeepMind's ``gemma``, on its own Transformer and configs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.libraries.comparing import (
    BATCH,
    HEAD,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    TABLE,
    TOKENS,
    VOCABULARY,
    WIDTH,
)


@contextlib.contextmanager
def tensorflow_by_name() -> Iterator[None]:
    """Gives kauldron the one name of TensorFlow that it annotates with, for the import alone.

    ``kauldron.typing``, which gemma imports, imports TensorFlow (2 GB installed) for
    ``tf.Tensor``. No program here meets one.
    """
    if "tensorflow" in sys.modules:
        yield
        return
    stand_in = types.ModuleType("tensorflow")
    stand_in.Tensor = type("Tensor", (), {})  # type: ignore[attr-defined]
    sys.modules["tensorflow"] = stand_in
    try:
        yield
    finally:
        del sys.modules["tensorflow"]


@contextlib.contextmanager
def flax_as_it_was() -> Iterator[None]:
    """Puts ``nn.Module.param`` back, for which gemma, when imported, has one of its own.

    Its own passes a dtype to initialisers, for every model of the process; a test needs none.
    """
    param = nn.Module.param
    try:
        yield
    finally:
        nn.Module.param = param


with warnings.catch_warnings(), tensorflow_by_name(), flax_as_it_was():
    # What gemma imports uses what newer releases of their own dependencies deprecate.
    warnings.simplefilter("ignore")
    from gemma import gm

    TransformerConfig = gm.nn.config.TransformerConfig
    Transformer = gm.nn.Transformer
    LOCAL, GLOBAL = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL

_BODY = {
    "num_embed": VOCABULARY,
    "embed_dim": WIDTH,
    "hidden_dim": HIDDEN,
    "num_heads": HEADS,
    "head_dim": HEAD,
    "num_kv_heads": KEY_HEADS,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "attention_types": (LOCAL, GLOBAL),
    "sliding_window_size": 4,
}
_GEMMA2 = {**_BODY, "final_logit_softcap": 30.0, "attn_logits_soft_cap": 50.0}
_MLP = ("mlp/gating_einsum", "mlp/linear")
_EINSUMS = ("attn/q_einsum/w", "attn/kv_einsum/w", "attn/attn_vec_einsum/w", *_MLP)


@dataclasses.dataclass(frozen=True)
class Family:
    """Fields of a ``TransformerConfig``, and the adapted leaves of a layer."""

    fields: dict[str, Any]
    leaves: tuple[str, ...]

    @property
    def targets(self) -> list[str]:
        return [TABLE, *self.leaves]


FAMILIES = {
    "gemma2": Family(_GEMMA2, _EINSUMS),
    "gemma2 fused": Family(
        {**_GEMMA2, "num_kv_heads": HEADS, "transpose_gating_einsum": True},
        ("attn/qkv_einsum/w", "attn/attn_vec_einsum/w", *_MLP),
    ),
    "gemma3": Family(
        {
            **_BODY,
            "final_logit_softcap": None,
            "use_qk_norm": True,
            "transpose_gating_einsum": True,
        },
        _EINSUMS,
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its params."""

    family: Family
    model: Any
    params: Any

    def call(self, params: Any, tokens: Any, cache: Any, start: Any) -> tuple[Any, Any]:
        """Returns logits and the cache, of tokens that begin at a position."""
        batch, length = tokens.shape
        places = start + jnp.arange(length)
        seen = jnp.arange(cache["layer_0"]["k"].shape[1]) <= places[:, None]
        output = self.model.apply(
            {"params": params},
            tokens,
            positions=jnp.broadcast_to(places, (batch, length)),
            cache=cache,
            attention_mask=jnp.broadcast_to(seen, (batch, *seen.shape)),
        )
        return output.logits, output.cache

    def logits(self, params: Any, tokens: Any) -> Any:
        return self.model.apply({"params": params}, tokens).logits

    def new_cache(self, length: int) -> Any:
        return self.model.config.init_cache(BATCH, jnp.float32, cache_length=length)


@functools.cache
def build(name: str) -> Case:
    family = FAMILIES[name]
    model = Transformer(config=TransformerConfig(**family.fields), dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    numbers = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.4 * numbers.standard_normal(x.shape), x.dtype), shapes
    )
    return Case(family, model, params)
