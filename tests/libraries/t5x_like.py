"""T5X's T5 as small functions: its leaf names, its shapes, and how it reads its weights.

T5X is in no package index. `t5` has a bias for all layers, and kernels of two axes; `umt5`, its
scalable T5, a bias in each layer, and kernels with an axis of heads, scanned or not.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora.names import names_of
from tests.libraries.held import Held, optax_step
from tests.libraries.reference import HEAD, HEADS, HIDDEN, VOCABULARY, WIDTH

LAYERS, BUCKETS = 2, 32
ATTENTIONS = {"encoder": ("attention",), "decoder": ("self_attention", "encoder_decoder_attention")}
NORMS = {
    "attention": "pre_attention_layer_norm",
    "self_attention": "pre_self_attention_layer_norm",
    "encoder_decoder_attention": "pre_cross_attention_layer_norm",
}
BIAS = {"rel_embedding": (HEADS, BUCKETS)}


def shapes(example: str, scanned: bool) -> Any:
    """Returns the params' shapes."""
    to_heads, to_width = (WIDTH, HEADS, HEAD), (HEADS, HEAD, WIDTH)
    if example == "t5":
        to_heads, to_width = (WIDTH, HEADS * HEAD), (HEADS * HEAD, WIDTH)
    attention = {name: {"kernel": to_heads} for name in ("query", "key", "value")}
    attention["out"] = {"kernel": to_width}
    mlp = {"wi_0": (WIDTH, HIDDEN), "wi_1": (WIDTH, HIDDEN), "wo": (HIDDEN, WIDTH)}
    tree: dict[str, Any] = {"token_embedder": {"embedding": (VOCABULARY, WIDTH)}}
    for stack, attentions in ATTENTIONS.items():
        block = dict.fromkeys(attentions, attention)
        block |= {NORMS[name]: {"scale": (WIDTH,)} for name in attentions}
        block["mlp"] = {name: {"kernel": shape} for name, shape in mlp.items()}
        block["pre_mlp_layer_norm"] = {"scale": (WIDTH,)}
        block |= {} if example == "t5" else {"relpos_bias": BIAS}
        layers = {f"layers_{i}": block for i in range(LAYERS)}
        if scanned:
            stacked = lambda s: (s[0], LAYERS, *s[1:])  # noqa: E731
            layers = {stack: jax.tree.map(stacked, block, is_leaf=_is_shape)}
        layers |= {"relpos_bias": BIAS} if example == "t5" else {}
        tree[stack] = {**layers, f"{stack}_norm": {"scale": (WIDTH,)}}
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=_is_shape)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def logits(scanned: bool, params: Any, tokens: Any) -> Any:
    """Returns logits of a decoder that is given the encoder's tokens, too."""
    table = params["token_embedder"]["embedding"]
    embedded = jax.nn.one_hot(tokens, VOCABULARY) @ table  # as T5X looks up
    encoded = _stack("encoder", scanned, params["encoder"], embedded, None)
    y = _stack("decoder", scanned, params["decoder"], embedded, encoded)
    return y @ table.T / math.sqrt(WIDTH)


def _stack(name: str, scanned: bool, params: Any, x: Any, encoded: Any) -> Any:
    layer = functools.partial(_layer, name, params.get("relpos_bias"), encoded)
    if scanned:
        first = jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), params[name])
        x, _ = jax.lax.scan(lambda x, block: (layer(block, x), None), x, first)
    else:
        for i in range(LAYERS):
            x = layer(params[f"layers_{i}"], x)
    return _norm(params[f"{name}_norm"], x)


def _layer(stack: str, shared_bias: Any, encoded: Any, block: Any, x: Any) -> Any:
    bias = block.get("relpos_bias", shared_bias)["rel_embedding"]
    scores = bias[:, _buckets(x.shape[1], both_ways=stack == "encoder")][None]
    if stack == "decoder":
        scores = jnp.where(jnp.tril(jnp.ones((x.shape[1],) * 2, bool)), scores, -1e9)
    for name in ATTENTIONS[stack]:
        y = _norm(block[NORMS[name]], x)
        memory, added = (encoded, 0.0) if name.startswith("encoder_") else (y, scores)
        x = x + _attention(block[name], y, memory, added)
    y, mlp = _norm(block["pre_mlp_layer_norm"], x), block["mlp"]
    gate = jax.nn.gelu(y @ mlp["wi_0"]["kernel"], approximate=True)
    return x + (gate * (y @ mlp["wi_1"]["kernel"])) @ mlp["wo"]["kernel"]


def _attention(weights: Any, x: Any, memory: Any, added: Any) -> Any:
    def projected(name: str, inputs: Any) -> Any:
        kernel = weights[name]["kernel"].reshape(WIDTH, HEADS, HEAD)
        return jnp.einsum("btd,dhk->bthk", inputs, kernel)

    q, k, v = projected("query", x), projected("key", memory), projected("value", memory)
    scores = jnp.einsum("bthk,bshk->bhts", q, k) + added
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
    return jnp.einsum("bthk,hkd->btd", mixed, weights["out"]["kernel"].reshape(HEADS, HEAD, WIDTH))


def _norm(norm: Any, x: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * norm["scale"]


def _buckets(length: int, both_ways: bool) -> np.ndarray:
    """Returns the bucket of each distance: exact ones below half of them, then by logarithms."""
    apart = np.arange(length)[:, None] - np.arange(length)
    count, start = (BUCKETS // 2, BUCKETS // 2 * (apart < 0)) if both_ways else (BUCKETS, 0)
    apart = np.abs(apart) if both_ways else np.maximum(apart, 0)
    exact = count // 2
    far = np.log(np.maximum(apart, 1) / exact) / math.log(128 / exact) * (count - exact)
    far = np.minimum(exact + far.astype(int), count - 1)
    return start + np.where(apart < exact, apart, far)


def build(example: str, scanned: bool) -> Held:
    call = functools.partial(logits, scanned)
    targets = ["token_embedder", "query", "key", "value", "out", "wi_0", "wi_1", "wo"]
    config = {"model_type": f"t5x/{example}", "logits_via_embedding": True, "scan_layers": scanned}
    name = "T5" if example == "t5" else f"scalable T5{', scanned' if scanned else ''}"
    return Held(
        library="T5X (imitated)",
        family=name,
        reference=example,
        call=call,
        like=shapes(example, scanned),
        names=names_of(config),
        table="token_embedder/embedding",
        targets=targets,
        step=functools.partial(optax_step, call, targets=targets),
        idiom="Optax",
    )
