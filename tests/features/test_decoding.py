"""Decoding with Flax's own cache: an adapted model gives the tokens that the merged one gives."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers import oracle
from tests.helpers.compiling import as_shipped
from tests.helpers.small_models import init, wrapped

VOCABULARY, WIDTH, LENGTH, BATCH, STEPS = 24, 16, 8, 8, 5
TARGETS = ["embed_tokens", "query", "out", "up"]
START = jnp.arange(1, BATCH + 1, dtype=jnp.int32)[:, None]
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Decoder(nn.Module):
    """One block with a cache, one token at a time, and the logits by the embedding again."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(VOCABULARY, WIDTH, name="embed_tokens")
        x = embed(tokens)
        x = x + nn.MultiHeadDotProductAttention(2, decode=True, name="attention")(x)
        x = x + nn.Dense(WIDTH, name="up")(jnp.tanh(x))
        return embed.attend(x)


MODEL = Decoder()
BLANK = jnp.zeros((BATCH, LENGTH), jnp.int32)
PARAMS = init(MODEL, BLANK)


def empty_cache(batch: int = BATCH) -> Any:
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), BLANK[:batch])
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["cache"])


@functools.cache
def adapters() -> tuple[tied_lora.Adapted, ...]:
    variables = {"params": PARAMS, "cache": empty_cache()}
    sites = tied_lora.trace(functools.partial(MODEL.apply, mutable=["cache"]), variables, START)
    return tuple(
        wrapped(PARAMS, TARGETS, seed=i, sites=sites, r=2 + i % 3, lora_alpha=4) for i in range(8)
    )


def next_tokens(params: Any, cache: Any, tokens: Any) -> Any:
    logits, new = MODEL.apply({"params": params, "cache": cache}, tokens, mutable=["cache"])
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), new["cache"]


def scanned(params: Any, cache: Any, tokens: Any) -> Any:
    def step(carry, _):
        tokens, cache = next_tokens(params, *reversed(carry))
        return (tokens, cache), tokens[:, 0]

    return lax.scan(step, (tokens, cache), length=STEPS)[1].T


def looped(params: Any, cache: Any, tokens: Any) -> Any:
    def step(state):
        number, tokens, cache, found = state
        tokens, cache = next_tokens(params, cache, tokens)
        return number + 1, tokens, cache, found.at[:, number].set(tokens[:, 0])

    found = jnp.zeros((tokens.shape[0], STEPS), jnp.int32)
    state = jnp.int32(0), tokens, cache, found
    return lax.while_loop(lambda state: state[0] < STEPS, step, state)[3]


@functools.cache
def expected(number: int | None) -> np.ndarray:
    """Returns what one merged adapter, or the base, gives for every row, one token at a time."""
    params = PARAMS if number is None else tied_lora.merge(adapters()[number])
    return np.asarray(_plain(params, empty_cache(), START))


_plain = compiled(scanned)


def test_the_adapters_give_tokens_of_their_own():
    found = {expected(i).tobytes() for i in (None, *range(8))}
    assert len(found) == 9


@pytest.mark.parametrize("loop", [scanned, looped])
def test_a_loop_inside_of_the_adapted_function(loop):
    run = compiled(tied_lora.adapt(loop, on_dense="error"))
    np.testing.assert_array_equal(run(adapters()[0], empty_cache(), START), expected(0))


@pytest.mark.parametrize("many", [False, True])
def test_step_by_step_with_a_donated_cache_traced_once(many):
    traces = []

    def counted(params, cache, tokens):
        traces.append(tokens.shape)
        return next_tokens(params, cache, tokens)

    step = tied_lora.adapt(counted, on_dense="error")
    step = compiled(tied_lora.per_example(step) if many else step, donate_argnums=1)
    stacked = tied_lora.stack(adapters())
    # The adapters change between the runs, and once within one.
    for slots in (np.arange(8), np.full(8, 3), np.array([0, -1, 7, 2, 2, -1, 5, 4])):
        chosen = slots if many else slots[3:4].item()
        tokens, cache, found = START, empty_cache(), []
        for _ in range(STEPS):
            before = jax.tree.leaves(cache)
            tokens, cache = step(tied_lora.select(stacked, chosen), cache, tokens)
            assert all(x.is_deleted() for x in before)
            found.append(tokens[:, 0])
        found = np.stack(found, axis=1)
        for row, slot in enumerate(np.broadcast_to(chosen, 8).tolist()):
            own = expected(None if slot < 0 else slot)
            np.testing.assert_array_equal(found[row], own[row])
    assert len(traces) == 1

    args = tied_lora.select(stacked, chosen), empty_cache(), START
    memory = step.lower(*args).compile().memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(args[1]))
    assert memory.alias_size_in_bytes >= held


def test_adapters_switched_between_steps():
    step = compiled(tied_lora.adapt(next_tokens))
    stacked = tied_lora.stack(adapters())
    plain = compiled(next_tokens)
    tokens, cache, own_tokens, own_cache = START, empty_cache(), START, empty_cache()
    for slot in (0, 4, 1, 4):
        tokens, cache = step(tied_lora.select(stacked, slot), cache, tokens)
        merged = tied_lora.merge(adapters()[slot])
        own_tokens, own_cache = plain(merged, own_cache, own_tokens)
        np.testing.assert_array_equal(tokens, own_tokens)
    for found, own in zip(jax.tree.leaves(cache), jax.tree.leaves(own_cache), strict=True):
        np.testing.assert_allclose(found, own, atol=1e-5)


def test_a_whole_loop_for_each_example():
    run = compiled(tied_lora.per_example(tied_lora.adapt(scanned, on_dense="error")))
    slots = [7, 6, 5, 4, 3, 2, 1, 0]
    found = run(tied_lora.select(tied_lora.stack(adapters()), slots), empty_cache(), START)
    for row, slot in enumerate(slots):
        np.testing.assert_array_equal(found[row], expected(slot)[row])


@pytest.mark.parametrize("vectors", [1, 4])
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "square"])
@pytest.mark.parametrize("stored", ["embed", "wte"])
@pytest.mark.parametrize("mode", [{"mode": "clip"}, {"mode": "fill", "fill_value": 0.5}], ids=str)
def test_a_loop_reads_a_transposed_tie_as_it_is_stored(vectors, wide, stored, mode):
    """XLA for the CPU would copy the transpose of a whole table before the loop."""
    rows, columns = (2048, 16) if wide else (256, 128)
    table = oracle.array(rows, columns) / 4
    params = {stored: table, "head": table.T}

    def model(params: Any, x: Any) -> Any:
        def step(x: Any, number: Any) -> Any:
            logits = x @ params["head"]
            tokens = jnp.arange(len(x)) + 300 * number  # some of them outside of the table
            x = jnp.tanh(x) + params[stored].at[tokens].get(**mode)
            return x, jnp.max(logits, axis=-1)

        return lax.scan(step, x, jnp.arange(STEPS))

    config = tied_lora.LoraConfig(r=2, target_modules=[stored])
    adapted = tied_lora.wrap(params, config, ties=[(stored, "head")])
    assert (adapted.plan.groups[0].key == stored) == (stored == "embed")
    adapted, x = oracle.perturbed(adapted), oracle.array(vectors, columns)
    oracle.check(model, adapted, x)
    program = jax.jit(tied_lora.adapt(model, on_dense="error")).lower(adapted, x)
    temporary = as_shipped(program).memory_analysis().temp_size_in_bytes
    assert temporary < 0.7 * table.nbytes
