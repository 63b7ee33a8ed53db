"""How large adapted programs are beside plain ones, and how often a function is traced."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers import gpt2_shape
from tests.helpers.gpt2_shape import dense, norm

SHAPE = gpt2_shape.Shape(vocabulary=1024, positions=16, width=32, heads=4, batch=2, length=16)
KERNELS = ["c_attn", "c_proj", "c_fc", "c_out"]
TARGETS = ["wte", *KERNELS]
PROGRAM = 1.3  # operations of an adapted program for each of the plain one, at most


def stacked(layers: int = 30) -> dict[str, Any]:
    """GPT-2's params with its layers stacked along a first axis."""
    own = gpt2_shape.params(dataclasses.replace(SHAPE, layers=1))
    layer = jax.tree.map(lambda x: gpt2_shape.abstract(layers, *x.shape), own["h"]["0"])
    return {**own, "h": layer}


@jax.numpy_rank_promotion("allow")
def scanned(p: Any, tokens: jax.Array) -> jax.Array:
    """A decoder whose layers are the body of one loop, its table tied."""
    table, s = p["wte"]["embedding"], SHAPE
    mask = jnp.tril(jnp.ones((s.length, s.length), bool))

    def layer(x: jax.Array, p: Any) -> Any:
        qkv = dense(p["c_attn"], norm(p["ln_1"], x)).reshape(*x.shape[:2], 3 * s.heads, -1)
        q, k, v = jnp.split(qkv, 3, axis=2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (s.width // s.heads) ** 0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + dense(p["c_proj"], mixed)
        x = x + dense(p["c_out"], jax.nn.gelu(dense(p["c_fc"], norm(p["ln_2"], x))))
        return x, None

    x = table[tokens] + p["wpe"]["embedding"][: s.length]
    x, _ = lax.scan(layer, x, p["h"])
    return norm(p["ln_f"], x) @ table.T


TOKENS = jax.ShapeDtypeStruct((SHAPE.batch, SHAPE.length), jnp.int32)


def size(function: Any, *args: Any, platform: str = "cpu") -> int:
    """The number of operations of a lowered program; constants, calls and returns too."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return sum(" = " in line for line in text.splitlines())


def wrapped(targets: list[str]) -> tied_lora.Adapted:
    sites = tied_lora.trace(scanned, stacked(), TOKENS)
    config = tied_lora.LoraConfig(r=8, target_modules=targets)
    return tied_lora.wrap(stacked(), config, sites=sites)


def loss(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1).mean()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_scanned_model(platform):
    apply = tied_lora.adapt(scanned, on_dense="error")
    plain = size(scanned, stacked(), TOKENS, platform=platform)
    layers = size(apply, wrapped(KERNELS), TOKENS, platform=platform)
    assert plain < layers <= PROGRAM * plain
    # A lookup and a projection of the table: so many once, whatever the model is.
    assert size(apply, wrapped(TARGETS), TOKENS, platform=platform) - layers <= 80


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_its_training_step(platform):
    """Beside the plain model's, differentiated by the leaves that have factors here."""
    chosen = {"wte": stacked()["wte"], "h": {k: stacked()["h"][k] for k in KERNELS}}

    def of_leaves(chosen: Any, params: Any, tokens: Any) -> Any:
        params = {**params, "wte": chosen["wte"], "h": {**params["h"], **chosen["h"]}}
        return loss(scanned(params, tokens))

    apply = tied_lora.adapt(scanned, on_dense="error")
    step = tied_lora.value_and_grad(lambda adapted, tokens: loss(apply(adapted, tokens)))
    plain = size(jax.value_and_grad(of_leaves), chosen, stacked(), TOKENS, platform=platform)
    assert size(step, wrapped(TARGETS), TOKENS, platform=platform) <= PROGRAM * plain


def test_what_is_not_adapted_adds_nothing():
    """One adapted kernel: a few operations more, however large the rest is."""
    apply = tied_lora.adapt(scanned, on_dense="error")
    plain = size(scanned, stacked(), TOKENS)
    assert 0 < size(apply, wrapped(["c_proj"]), TOKENS) - plain <= 25


def test_layers_in_a_row_add_what_each_adds():
    """Thirty layers one after the other, thirty times the operations of one."""

    def added(layers: int) -> int:
        shape = dataclasses.replace(SHAPE, layers=layers)
        adapted = gpt2_shape.adapted(shape, ["c_attn"])

        def model(p: Any, tokens: Any) -> Any:
            return gpt2_shape.forward(p, tokens, shape)

        apply = tied_lora.adapt(model, on_dense="error")
        return size(apply, adapted, TOKENS) - size(model, gpt2_shape.params(shape), TOKENS)

    assert added(6) == 6 * added(1)


def test_an_unchanged_function_is_traced_once():
    traced = []

    def model(p: Any, x: jax.Array) -> jax.Array:
        traced.append(None)
        return x @ p["kernel"]

    params = {"kernel": jnp.ones((4, 4))}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(r=2, target_modules=["kernel"]))
    apply = jax.jit(tied_lora.adapt(model))
    apply(adapted, jnp.ones(4))
    first = len(traced)
    other = tied_lora.wrap(params, tied_lora.LoraConfig(r=2, target_modules=["kernel"]))
    grown = jax.tree.map(lambda x: x + 1, other.adapters)
    for again in (adapted, other, other.replace(adapters=grown)):
        apply(again, jnp.zeros(4))
    assert len(traced) == first <= 2
    apply(adapted, jnp.ones((2, 4)))  # another shape is another program
    assert len(traced) == 2 * first
