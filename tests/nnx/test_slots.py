"""Modules with several adapters: in slots, one for each example; and one that grows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from tests.helpers.nnx_models import TOKENS, VOCAB, SharedVariable
from tests.helpers.nnx_models import wrapped as wrapped_module


@functools.cache
def module():
    return SharedVariable(nnx.Rngs(0))


@functools.cache
def two_modules():
    one = wrapped_module(module(), ["lm_head", "up"], seed=1)
    cut = {"up": (-1, {"a": 5, "b": 3})}
    return one, wrapped_module(module(), ["up:b"], seed=2, parts=cut)


def test_a_module_is_served_by_a_slot_and_switched_without_tracing_again():
    stacked = tied_lora.stack([tied_lora.nnx.adapted(m) for m in two_modules()])
    served = tied_lora.nnx.from_adapted(module(), tied_lora.select(stacked, 0))
    traces = []

    @nnx.jit
    def forward(served, tokens):
        traces.append(1)
        return served(tokens)

    for slot, expected in (*enumerate(two_modules()), (-1, module())):
        served.lora_slot.set_value(jnp.asarray(slot, jnp.int32))
        np.testing.assert_allclose(forward(served, TOKENS), expected(TOKENS), atol=1e-4)
    assert len(traces) == 1
    merged = tied_lora.nnx.merge(served)  # of no slot
    np.testing.assert_array_equal(merged.up.kernel[...], module().up.kernel[...])
    tied_lora.nnx.explain(served, TOKENS).assert_tied()


def test_a_module_with_an_adapter_for_each_example():
    stacked = tied_lora.stack([tied_lora.nnx.adapted(m) for m in two_modules()])

    @jax.jit
    @tied_lora.per_example
    def forward(adapted, tokens):
        return tied_lora.nnx.from_adapted(module(), adapted)(tokens)

    found = forward(tied_lora.select(stacked, [1, 0]), TOKENS)
    one, other = two_modules()
    np.testing.assert_allclose(found[:1], other(TOKENS[:1]), atol=1e-4)
    np.testing.assert_allclose(found[1:], one(TOKENS[1:]), atol=1e-4)


def test_an_adapted_module_grows():
    one, _ = two_modules()
    grown, vocabulary = tied_lora.grow_vocabulary(tied_lora.nnx.adapted(one), 15)
    assert dict(vocabulary.axes) == {"embed_tokens/embedding": 0, "lm_head/embedding": 0}
    larger = SharedVariable(nnx.Rngs(0))
    for each in (larger.embed_tokens, larger.lm_head):
        each.embedding.set_value(jnp.zeros((15, 8)))
    larger = tied_lora.nnx.from_adapted(larger, grown)
    np.testing.assert_allclose(larger(TOKENS)[..., :VOCAB], one(TOKENS), atol=1e-5)
