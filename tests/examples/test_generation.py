"""Continuations by a cache: greedy, drawn, ended; one compiled loop."""

from __future__ import annotations

import generation
import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
from tests.helpers import small_llama

pytestmark = pytest.mark.usefixtures("standard_promotion")
PROMPT = np.asarray([[5, 9, 30], [7, 8, 2]])


def make(seed: int) -> llama.Llama:
    config = llama.Config.from_hf(small_llama.CONFIG)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = llama.Llama(config, rngs=nnx.Rngs(seed))
    table = model.model.embed_tokens.embedding
    table.set_value(table[...] * 50)  # far from uniform
    return model


@pytest.fixture(scope="module")
def model() -> llama.Llama:
    return make(0)


def greedy(model, tokens, length: int) -> np.ndarray:
    tokens = np.asarray(tokens)
    for _ in range(length):
        following = np.argmax(model(tokens)[:, -1], -1)
        tokens = np.concatenate([tokens, following[:, None]], 1)
    return tokens[:, -length:]


def test_greedy_is_what_whole_calls_say(model):
    found = generation.generate(model, PROMPT, 10)
    np.testing.assert_array_equal(found, greedy(model, PROMPT, 10))
    assert found.dtype == np.int32
    assert generation.generate(model, PROMPT, 0).shape == (2, 0)


def test_an_adapted_model(model):
    config = tied_lora.LoraConfig(
        r=2, target_modules=["embed_tokens", "v_proj"], init_lora_weights=False
    )
    adapted = tied_lora.nnx.wrap(model, config)
    adapted.on_dense = "error"
    found = generation.generate(adapted, PROMPT, 8)
    merged = tied_lora.nnx.merge(adapted)
    np.testing.assert_array_equal(found, greedy(merged, PROMPT, 8))
    assert not np.array_equal(found, generation.generate(model, PROMPT, 8))


def test_a_cache_of_the_models_dtype(model):
    """Factors are float32, and what the model computes is not."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model))
    half = nnx.merge(nnx.graphdef(model), half)
    config = tied_lora.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    for base in (half, tied_lora.nnx.quantize(half, "int8")):
        adapted = tied_lora.nnx.wrap(base, config)
        assert generation.generate(adapted, PROMPT, 4).shape == (2, 4)
    assert half.empty_cache(1, 8)[0][0].dtype == jnp.bfloat16


def test_stops_where_it_is_told(model):
    whole = generation.generate(model, PROMPT, 10)
    stop = int(whole[0, 4])
    found = generation.generate(model, PROMPT, 10, stop=[stop, 261])
    for row, expected in zip(found, whole, strict=True):
        ends = np.flatnonzero(np.isin(expected, [stop, 261]))
        last = ends[0] if len(ends) else len(expected) - 1
        np.testing.assert_array_equal(row[: last + 1], expected[: last + 1])
        assert (row[last:] == row[last]).all()


def test_drawn(model):
    rng = jax.random.key(0)
    one, again, other = (
        generation.generate(model, PROMPT, 20, temperature=20.0, rng=key)
        for key in (rng, rng, jax.random.key(1))
    )
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    # The likeliest alone is left, whatever the temperature.
    found = generation.generate(model, PROMPT, 10, temperature=1.0, top_p=1e-6, rng=rng)
    np.testing.assert_array_equal(found, greedy(model, PROMPT, 10))


def test_shares_of_what_is_drawn():
    logits = jnp.log(jnp.asarray([0.15, 0.5, 0.05, 0.3]))
    draw = jax.vmap(lambda key, p: generation._drawn(logits[None], p, key)[0], (0, None))
    keys = jax.random.split(jax.random.key(0), 4000)
    for top_p, kept in ((1.0, [1, 3, 0, 2]), (0.9, [1, 3, 0]), (0.6, [1, 3]), (0.5, [1])):
        found = np.bincount(draw(keys, top_p), minlength=4) / len(keys)
        expected = np.zeros(4)
        expected[kept] = np.exp(logits)[np.asarray(kept)]
        np.testing.assert_allclose(found, expected / expected.sum(), atol=0.04)


def test_other_weights_compile_nothing(model):
    generation.generate(model, PROMPT, 6)
    before = generation._generated._cache_size()
    generation.generate(make(1), PROMPT[::-1], 6, stop=[])
    assert generation._generated._cache_size() == before


def test_what_is_refused(model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        generation.generate(model, np.zeros((1, 0), np.int32), 4)
    with pytest.raises(ValueError, match=r"temperature is 0\.7: give rng"):
        generation.generate(model, PROMPT, 4, temperature=0.7)
