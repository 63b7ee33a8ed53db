"""A tiny Llama whose leaves are stored as MaxText stores them.

Queries are divided by the root of a head's size, what a rotary embedding turns together is side by
side, and the table has rows for a mesh's sake that no token has.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora.names import Interleaved, Padding, Scale, names_of

VOCABULARY, PADDED, WIDTH, HEADS, KEY_HEADS, HEAD_DIM, HIDDEN = 96, 128, 32, 4, 2, 8, 48
LAYERS = 2
EPSILON, THETA = 1e-6, 10_000.0
_BLOCK, _TORCH = "decoder/layers_{}", "model.layers.{}"
_HEADS = "in heads dim -> (heads dim) in"
NAMES = names_of(
    None,
    [
        ("token_embedder/embedding", "model.embed_tokens.weight", None, "embedding",
         {"row": Padding(leaf=PADDED, torch=VOCABULARY)}),
        (f"{_BLOCK}/self_attention/query/kernel", f"{_TORCH}.self_attn.q_proj.weight", _HEADS,
         "linear", {"dim": (Interleaved(), Scale(math.sqrt(HEAD_DIM)))}),
        (f"{_BLOCK}/self_attention/key/kernel", f"{_TORCH}.self_attn.k_proj.weight", _HEADS,
         "linear", {"dim": Interleaved()}),
        (f"{_BLOCK}/self_attention/value/kernel", f"{_TORCH}.self_attn.v_proj.weight", _HEADS,
         "linear"),
        (f"{_BLOCK}/self_attention/out/kernel", f"{_TORCH}.self_attn.o_proj.weight",
         "heads dim out -> out (heads dim)", "linear"),
        *((f"{_BLOCK}/mlp/{ours}/kernel", f"{_TORCH}.mlp.{theirs}_proj.weight", None, "linear")
          for ours, theirs in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))),
        (f"{_BLOCK}/pre_norm/scale", f"{_TORCH}.input_layernorm.weight"),
        (f"{_BLOCK}/post_norm/scale", f"{_TORCH}.post_attention_layernorm.weight"),
        ("decoder/norm/scale", "model.norm.weight"),
    ],
    tied={"token_embedder/embedding": ["lm_head"]},
)  # fmt: skip


def shapes() -> Any:
    """Returns the params' shapes."""

    def leaf(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    block = {
        "self_attention": {
            "query": {"kernel": leaf(WIDTH, HEADS, HEAD_DIM)},
            "key": {"kernel": leaf(WIDTH, KEY_HEADS, HEAD_DIM)},
            "value": {"kernel": leaf(WIDTH, KEY_HEADS, HEAD_DIM)},
            "out": {"kernel": leaf(HEADS, HEAD_DIM, WIDTH)},
        },
        "mlp": {
            "wi_0": {"kernel": leaf(WIDTH, HIDDEN)},
            "wi_1": {"kernel": leaf(WIDTH, HIDDEN)},
            "wo": {"kernel": leaf(HIDDEN, WIDTH)},
        },
        "pre_norm": {"scale": leaf(WIDTH)},
        "post_norm": {"scale": leaf(WIDTH)},
    }
    layers = {f"layers_{i}": block for i in range(LAYERS)}
    return {
        "token_embedder": {"embedding": leaf(PADDED, WIDTH)},
        "decoder": {**layers, "norm": {"scale": leaf(WIDTH)}},
    }


def logits(params: Any, tokens: Any) -> Any:
    """Returns the logits of the tokens that there are, [batch, length, vocabulary]."""
    table, decoder = params["token_embedder"]["embedding"], params["decoder"]
    x = table[tokens]
    for i in range(LAYERS):
        block = decoder[f"layers_{i}"]
        x = x + _attention(block["self_attention"], _norm(block["pre_norm"], x))
        y, mlp = _norm(block["post_norm"], x), block["mlp"]
        hidden = jax.nn.silu(y @ mlp["wi_0"]["kernel"]) * (y @ mlp["wi_1"]["kernel"])
        x = x + hidden @ mlp["wo"]["kernel"]
    return (_norm(decoder["norm"], x) @ table.T)[..., :VOCABULARY]


def _norm(norm: Any, x: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPSILON) * norm["scale"]


def _attention(weights: Any, x: Any) -> Any:
    q, k, v = (
        jnp.einsum("btd,dhk->bthk", x, weights[name]["kernel"])
        for name in ("query", "key", "value")
    )
    k, v = (jnp.repeat(a, HEADS // KEY_HEADS, axis=2) for a in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", _turned(q), _turned(k))  # queries are scaled already
    length = x.shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool))
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(seen, scores, -1e9)), v)
    return jnp.einsum("bthk,hkd->btd", mixed, weights["out"]["kernel"])


def _turned(x: Any) -> Any:
    """Returns queries or keys turned by their positions, each pair of neighbours in its plane."""
    rates = THETA ** -(jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = (jnp.arange(x.shape[1])[:, None] * rates)[:, None, :]
    first, second = x[..., ::2], x[..., 1::2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.stack([first * cos - second * sin, second * cos + first * sin], -1).reshape(x.shape)
