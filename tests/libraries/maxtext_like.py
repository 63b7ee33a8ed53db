"""MaxText's models as small functions: its leaf names, its shapes, and how it reads its weights."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora.names import names_of
from tests.libraries.held import Held, optax_step
from tests.libraries.reference import (
    HEAD,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    VOCABULARY,
    WIDTH,
)

ROWS = 128
_GEMMA_NORMS = ("pre_self_attention_norm", "post_self_attention_norm", "pre_ffw_norm",
                "post_ffw_norm")  # fmt: skip
_NORMS = ("pre_self_attention_layer_norm", "post_self_attention_layer_norm")
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3")


def config_of(family: str, scanned: bool) -> dict[str, Any]:
    """Returns the fields of MaxText's config that its names depend on."""
    layers = {"gemma3": 8}.get(family, 2)  # a layer of Gemma 2 is two
    width = HEADS * HEAD if family == "llama" else WIDTH
    return {
        "model_type": f"maxtext/{family}", "head_dim": HEAD, "emb_dim": width,
        "num_decoder_layers": layers, "vocab_size": ROWS, "scan_layers": scanned,
        "param_scan_axis": 1, "logits_via_embedding": True, "rope_type": "llama3.1",
    }  # fmt: skip


def _block(family: str, width: int, half: str = "") -> dict[str, Any]:
    """Returns the shapes of a layer."""
    attention = {
        "query": {"kernel": (width, HEADS, HEAD)},
        "key": {"kernel": (width, KEY_HEADS, HEAD)},
        "value": {"kernel": (width, KEY_HEADS, HEAD)},
        "out": {"kernel": (HEADS, HEAD, width)},
    }
    if family in ("qwen3", "gemma3"):
        attention |= {"query_norm": {"scale": (HEAD,)}, "key_norm": {"scale": (HEAD,)}}
    mlp = {"wi_0": (width, HIDDEN), "wi_1": (width, HIDDEN), "wo": (HIDDEN, width)}
    norms = _GEMMA_NORMS if "gemma" in family else _NORMS
    return {
        f"self_attention{half}": attention,
        f"mlp{half}": {name: {"kernel": shape} for name, shape in mlp.items()},
        **{f"{name}{half}": {"scale": (width,)} for name in norms},
    }


def shapes(config: dict[str, Any]) -> Any:
    """Returns the params' shapes."""
    family, width = config["model_type"].partition("/")[2], config["emb_dim"]
    block = _block(family, width)
    if family == "gemma2":
        block = _block(family, width, "_local") | _block(family, width, "_global")
    count = config["num_decoder_layers"]

    def stacked(tree: Any, length: int) -> Any:
        return jax.tree.map(lambda s: (s[0], length, *s[1:]), tree, is_leaf=_is_shape)

    if not config["scan_layers"]:
        layers = {f"layers_{i}": block for i in range(count)}
    elif family == "gemma3":
        whole = {f"layers_{i}": stacked(block, count // 6) for i in range(6)}
        rest = {f"layers_{i}": block for i in range(count % 6)}
        layers = {"layers": whole, "layers_remainder": rest}
    else:
        layers = {"layers": stacked(block, count)}
    tree = {
        "token_embedder": {"embedding": (ROWS, width)},
        "decoder": {**layers, "decoder_norm": {"scale": (width,)}},
    }
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=_is_shape)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def logits(config: dict[str, Any], params: Any, tokens: Any) -> Any:
    """Returns logits [batch, length, padded vocabulary]."""
    family = config["model_type"].partition("/")[2]
    table, decoder = params["token_embedder"]["embedding"], params["decoder"]
    x = table[tokens]
    if family == "gemma3" and config["scan_layers"]:
        x = _scanned(_period, decoder["layers"], x)
        for i, block in enumerate(decoder["layers_remainder"].values()):
            x = _layer(family, block, x, place=i)
    elif config["scan_layers"]:
        x = _scanned(functools.partial(_layers, family), decoder["layers"], x)
    else:
        for i in range(config["num_decoder_layers"]):
            x = _layers(family, decoder[f"layers_{i}"], x, i)
    y = _norm(decoder["decoder_norm"], x)
    # MaxText rounds the table where it makes logits of it.
    result = jnp.dot(y, jnp.asarray(table, jnp.bfloat16).T, preferred_element_type=jnp.float32)
    if "gemma" in family:
        result = result / math.sqrt(x.shape[-1])
    return jnp.tanh(result / 30) * 30 if family == "gemma2" else result


def _scanned(body: Any, stack: Any, x: Any) -> Any:
    first = jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), stack)
    return jax.lax.scan(lambda x, block: (body(block, x), None), x, first)[0]


def _period(block: Any, x: Any) -> Any:
    for i in range(6):
        x = _layer("gemma3", block[f"layers_{i}"], x, place=i)
    return x


def _layers(family: str, block: Any, x: Any, place: int = 0) -> Any:
    if family != "gemma2":
        return _layer(family, block, x, place=place)
    for i, half in enumerate(("_local", "_global")):
        of_half = {k.removesuffix(half): w for k, w in block.items() if k.endswith(half)}
        x = _layer(family, of_half, x, place=i)
    return x


def _layer(family: str, block: Any, x: Any, place: int) -> Any:
    gemma = "gemma" in family
    is_global = {"gemma2": place % 2 == 1, "gemma3": place % 6 == 5}.get(family, True)
    first, *others = _GEMMA_NORMS if gemma else _NORMS
    y = _attention(family, block["self_attention"], _norm(block[first], x), is_global)
    x = x + (_norm(block[others.pop(0)], y) if gemma else y)
    y, mlp = _norm(block[others.pop(0)], x), block["mlp"]
    active = functools.partial(jax.nn.gelu, approximate=True) if gemma else jax.nn.silu
    y = (active(y @ mlp["wi_0"]["kernel"]) * (y @ mlp["wi_1"]["kernel"])) @ mlp["wo"]["kernel"]
    return x + (_norm(block[others.pop(0)], y) if gemma else y)


def _norm(norm: Any, x: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * norm["scale"]


def _attention(family: str, weights: Any, x: Any, is_global: bool) -> Any:
    q, k, v = (
        jnp.einsum("btd,dhk->bthk", x, weights[name]["kernel"])
        for name in ("query", "key", "value")
    )
    if "query_norm" in weights:
        q, k = _norm(weights["query_norm"], q), _norm(weights["key_norm"], k)
        q = q / math.sqrt(HEAD)  # elsewhere queries are stored so
    theta = 1_000_000.0 if family == "gemma3" and is_global else 10_000.0
    q, k = (_turned(a, theta, neighbours=family == "llama") for a in (q, k))
    k, v = (jnp.repeat(a, HEADS // KEY_HEADS, axis=2) for a in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k)
    scores = jnp.tanh(scores / 50) * 50 if family == "gemma2" else scores
    apart = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])
    seen = (apart >= 0) & (is_global | (apart < 4))
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(seen, scores, -1e9)), v)
    return jnp.einsum("bthk,hkd->btd", mixed, weights["out"]["kernel"])


def _turned(x: Any, theta: float, neighbours: bool) -> Any:
    """Returns queries or keys turned by their positions, in planes of neighbours or of halves."""
    rates = theta ** -(jnp.arange(0, HEAD, 2) / HEAD)
    angles = (jnp.arange(x.shape[1])[:, None] * rates)[:, None, :]
    first, second = (x[..., ::2], x[..., 1::2]) if neighbours else jnp.split(x, 2, -1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.stack(turned, -1).reshape(x.shape) if neighbours else jnp.concatenate(turned, -1)


def build(family: str, scanned: bool) -> Held:
    """Returns an imitation, as `maxtext_models.build` returns the library's own."""
    config = config_of(family, scanned)
    call = functools.partial(logits, config)
    attention = ["query", "key", "value", "out"]
    if family == "gemma2":
        attention = [f"self_attention_{x}/{p}" for x in ("local", "global") for p in attention]
    targets = ["token_embedder", *attention, "wi_0", "wi_1", "wo"]

    return Held(
        library="MaxText",
        family=family,
        reference=family,
        call=call,
        like=shapes(config),
        names=names_of(config, vocab_size=VOCABULARY),
        table="token_embedder/embedding",
        targets=targets,
        step=functools.partial(optax_step, call, targets=targets),
        idiom="Optax",
        exact=False,
    )
