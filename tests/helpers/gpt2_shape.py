"""A GPT-2-shaped model in plain functions, with tied LoRA by hand beside it, for compiled costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import flax_tied_lora as tied_lora

RANK = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    vocabulary: int = 50257
    positions: int = 1024
    width: int = 768
    heads: int = 12
    layers: int = 4
    batch: int = 2
    length: int = 128


def abstract(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def params(s: Shape) -> dict[str, Any]:
    d = s.width
    norm = {"scale": abstract(d), "bias": abstract(d)}
    layer = {
        "ln_1": norm,
        "c_attn": {"kernel": abstract(d, 3 * d), "bias": abstract(3 * d)},
        "c_proj": {"kernel": abstract(d, d), "bias": abstract(d)},
        "ln_2": norm,
        "c_fc": {"kernel": abstract(d, 4 * d), "bias": abstract(4 * d)},
        "c_out": {"kernel": abstract(4 * d, d), "bias": abstract(d)},
    }
    return {
        "wte": {"embedding": abstract(s.vocabulary, d)},
        "wpe": {"embedding": abstract(s.positions, d)},
        "h": {str(i): layer for i in range(s.layers)},
        "ln_f": norm,
    }


def norm(p: Any, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(p: Any, x: jax.Array, delta: Any = None) -> jax.Array:
    y = x @ p["kernel"]
    if delta is not None:
        y = y + ((x @ delta["lora_a"]) * 2.0) @ delta["lora_b"]
    return y + p["bias"]


@jax.numpy_rank_promotion("allow")
def hidden_states(p: Any, tokens: jax.Array, s: Shape, deltas: Any = None) -> jax.Array:
    """What the output projection is given; with ``deltas``, tied LoRA as one writes it by hand."""
    deltas = deltas or {}
    table, delta = p["wte"]["embedding"], deltas.get("wte/embedding")
    x = table[tokens]
    if delta is not None:
        x = x + (delta["lora_a"][tokens] * 2.0) @ delta["lora_b"]
    x = x + p["wpe"]["embedding"][: s.length]
    mask = jnp.tril(jnp.ones((s.length, s.length), bool))
    for i in range(s.layers):
        layer = p["h"][str(i)]
        qkv = dense(layer["c_attn"], norm(layer["ln_1"], x), deltas.get(f"h/{i}/c_attn/kernel"))
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * s.heads, -1), 3, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (s.width // s.heads) ** 0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + dense(layer["c_proj"], mixed)
        x = x + dense(layer["c_out"], jax.nn.gelu(dense(layer["c_fc"], norm(layer["ln_2"], x))))
    return norm(p["ln_f"], x)


def forward(p: Any, tokens: jax.Array, s: Shape, deltas: Any = None) -> jax.Array:
    """Logits; with ``deltas``, tied LoRA as one would write it by hand."""
    x, table = hidden_states(p, tokens, s, deltas), p["wte"]["embedding"]
    delta = (deltas or {}).get("wte/embedding")
    logits = x @ table.T
    if delta is not None:
        logits = logits + ((x @ delta["lora_b"].T) * 2.0) @ delta["lora_a"].T
    return logits


def loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def adapted(s: Shape, targets: list[str]) -> tied_lora.Adapted:
    config = tied_lora.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
    return tied_lora.wrap(params(s), config)


def training_step(of_adapters: Any, optimizer: Any) -> Any:
    """A training step over the adapters; the frozen params are an argument."""

    @jax.numpy_dtype_promotion("standard")  # Optax's AdamW needs it
    def run(frozen: Any, adapters: Any, state: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(of_adapters)(adapters, frozen, tokens)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    return run


def step(of_adapters: Any) -> Any:
    """The lowering of a training step with AdamW."""
    optimizer = optax.adamw(1e-3)
    run = training_step(of_adapters, optimizer)

    def lowered(frozen: Any, adapters: Any, tokens: Any) -> Any:
        state = jax.eval_shape(optimizer.init, adapters)
        return jax.jit(run).lower(frozen, adapters, state, tokens)

    return lowered


def ours(s: Shape, targets: list[str], **options: Any) -> Any:
    whole = adapted(s, targets)
    apply = tied_lora.adapt(lambda p, tokens: forward(p, tokens, s), **options)

    def of_adapters(adapters: Any, frozen: Any, tokens: Any) -> Any:
        return loss(apply(frozen.replace(adapters=adapters), tokens), tokens)

    tokens = jax.ShapeDtypeStruct((s.batch, s.length), jnp.int32)
    return step(of_adapters)(whole, whole.adapters, tokens)


def without_logits(s: Shape, targets: list[str]) -> Any:
    """The same step, its loss `linear_cross_entropy`."""
    whole = adapted(s, targets)

    def of_params(p: Any, tokens: Any) -> Any:
        hidden = hidden_states(p, tokens[:, :-1], dataclasses.replace(s, length=s.length - 1))
        table = p["wte"]["embedding"]
        return tied_lora.losses.linear_cross_entropy(hidden, table, tokens[:, 1:])

    served = tied_lora.adapt(of_params, on_dense="error")

    def of_adapters(adapters: Any, frozen: Any, tokens: Any) -> Any:
        return served(frozen.replace(adapters=adapters), tokens)

    tokens = jax.ShapeDtypeStruct((s.batch, s.length), jnp.int32)
    return step(of_adapters)(whole, whole.adapters, tokens)


def by_hand(s: Shape, targets: list[str]) -> Any:
    deltas = adapted(s, targets).adapters["lora"]

    def of_adapters(deltas: Any, frozen: Any, tokens: Any) -> Any:
        return loss(forward(frozen, tokens, s, deltas), tokens)

    tokens = jax.ShapeDtypeStruct((s.batch, s.length), jnp.int32)
    return step(of_adapters)(params(s), deltas, tokens)


def densified(s: Shape, targets: list[str]) -> Any:
    whole = adapted(s, targets)

    def of_adapters(adapters: Any, frozen: Any, tokens: Any) -> Any:
        merged = tied_lora.merge(frozen.replace(adapters=adapters))
        return loss(forward(merged, tokens, s), tokens)

    tokens = jax.ShapeDtypeStruct((s.batch, s.length), jnp.int32)
    return step(of_adapters)(whole, whole.adapters, tokens)
