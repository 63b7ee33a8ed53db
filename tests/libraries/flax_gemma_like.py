"""Gemma of Flax's own examples as small functions: its leaf names, its shapes, its reading.

The examples are in Flax's repository, and in no package.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora.names import names_of
from tests.libraries.held import Held, optax_step
from tests.libraries.reference import HEAD, HEADS, HIDDEN, KEY_HEADS, VOCABULARY, WIDTH

LAYERS, PERIOD, WINDOW = 8, 6, 4
NORMS = ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm")


def shapes() -> Any:
    """Returns the params' shapes."""
    block = {
        "attn": {
            "q_einsum": {"kernel": (HEADS, WIDTH, HEAD)},
            "kv_einsum": {"kernel": (2, KEY_HEADS, WIDTH, HEAD)},
            "attn_vec_einsum": {"kernel": (HEADS, HEAD, WIDTH)},
            "_query_norm": {"scale": (HEAD,)},
            "_key_norm": {"scale": (HEAD,)},
        },
        "mlp": {
            "gate_proj": {"kernel": (WIDTH, HIDDEN)},
            "up_proj": {"kernel": (WIDTH, HIDDEN)},
            "down_proj": {"kernel": (HIDDEN, WIDTH)},
        },
        **{norm: {"scale": (WIDTH,)} for norm in NORMS},
    }
    tree = {
        "embedder": {"embedding": (VOCABULARY, WIDTH)},
        "layers": {str(i): block for i in range(LAYERS)},
        "final_norm": {"scale": (WIDTH,)},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=is_shape)


def logits(params: Any, tokens: Any) -> Any:
    table = params["embedder"]["embedding"]
    x = table[tokens] * math.sqrt(WIDTH)
    for i in range(LAYERS):
        block = params["layers"][str(i)]
        y = _attention(block["attn"], _norm(block["pre_attention_norm"], x), i % PERIOD == 5)
        x = x + _norm(block["post_attention_norm"], y)
        y, mlp = _norm(block["pre_ffw_norm"], x), block["mlp"]
        gate = jax.nn.gelu(y @ mlp["gate_proj"]["kernel"], approximate=True)
        y = (gate * (y @ mlp["up_proj"]["kernel"])) @ mlp["down_proj"]["kernel"]
        x = x + _norm(block["post_ffw_norm"], y)
    return _norm(params["final_norm"], x) @ table.T


def _norm(norm: Any, x: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * (1 + norm["scale"])


def _attention(weights: Any, x: Any, is_global: bool) -> Any:
    q = jnp.einsum("btd,ndh->btnh", x, weights["q_einsum"]["kernel"])
    k, v = jnp.einsum("bsd,ckdh->cbskh", x, weights["kv_einsum"]["kernel"])
    q, k = _norm(weights["_query_norm"], q), _norm(weights["_key_norm"], k)
    q, k = (_turned(a, 1_000_000.0 if is_global else 10_000.0) for a in (q, k))
    k, v = (jnp.repeat(a, HEADS // KEY_HEADS, axis=2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q / math.sqrt(HEAD), k)
    apart = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])
    seen = (apart >= 0) & (is_global | (apart < WINDOW))
    mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, scores, -1e9)), v)
    return jnp.einsum("btnh,nhd->btd", mixed, weights["attn_vec_einsum"]["kernel"])


def _turned(x: Any, theta: float) -> Any:
    rates = theta ** -(jnp.arange(0, HEAD, 2) / HEAD)
    angles = (jnp.arange(x.shape[1])[:, None] * rates)[:, None, :]
    first, second = jnp.split(x, 2, -1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def build() -> Held:
    targets = ["embedder", "q_einsum", "kv_einsum", "attn_vec_einsum",
               "gate_proj", "up_proj", "down_proj"]  # fmt: skip
    return Held(
        library="Flax's examples (imitated)",
        family="Gemma 3",
        reference="gemma3",
        call=logits,
        like=shapes(),
        names=names_of("flax/gemma"),
        table="embedder/embedding",
        targets=targets,
        step=functools.partial(optax_step, logits, targets=targets),
        idiom="Optax",
    )
