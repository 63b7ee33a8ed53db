"""transformers' cache: prompt at once, then one token at a time, adapted beside merged."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers.small_models import wrapped
from tests.models.families import TOKENS, build

pytestmark = pytest.mark.models
PROMPT, STEPS = TOKENS[[0, 1, 0]], 4
BATCH, LENGTH = PROMPT.shape
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def adapters() -> tuple[tied_lora.Adapted, ...]:
    case = build("gpt2")
    sites = tied_lora.trace(case.call, case.params, TOKENS)
    options = {"sites": sites, "lora_alpha": 3}
    return tuple(
        wrapped(case.params, case.family.targets, seed=i, r=2 + i, **options) for i in (0, 1)
    )


def cache(batch: int = BATCH) -> Any:
    # It starts as zeros; run as it stands, it would initialise the whole model.
    shapes = jax.eval_shape(lambda: build("gpt2").model.init_cache(batch, LENGTH + STEPS))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def step(params: Any, cache: Any, tokens: Any, position: Any) -> Any:
    """Returns the next tokens after a prompt or a token, and the cache."""
    positions = jnp.broadcast_to(position + jnp.arange(tokens.shape[1]), tokens.shape)
    mask = jnp.ones((tokens.shape[0], LENGTH + STEPS), jnp.int32)
    out = build("gpt2").model(
        tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, params=params
    )
    return jnp.argmax(out.logits[:, -1:], axis=-1).astype(jnp.int32), out.past_key_values


def generated(params: Any, cache: Any, prompt: Any) -> Any:
    """Returns the greedy continuation, the loop over tokens being compiled."""

    def body(carry: Any, position: Any) -> Any:
        tokens, cache = step(params, carry[1], carry[0], position)
        return (tokens, cache), carry[0][:, 0]

    first = step(params, cache, prompt, 0)
    return lax.scan(body, first, LENGTH + jnp.arange(STEPS))[1].T


@functools.cache
def expected(number: int) -> np.ndarray:
    return np.asarray(_plain(tied_lora.merge(adapters()[number]), cache(), PROMPT))


_plain = compiled(generated)


def test_prompt_and_tokens_step_by_step_for_each_example():
    traces = []

    def counted(params, cache, tokens, position):
        traces.append(tokens.shape)
        return step(params, cache, tokens, position)

    run = tied_lora.per_example(tied_lora.adapt(counted, on_dense="error"))
    run = compiled(run, donate_argnums=1)
    assert not np.array_equal(expected(0), expected(1))
    stacked = tied_lora.stack(adapters(), capacity=3)
    for slots in ([0, 1, 1], [1, 0, 0]):
        selected, held = tied_lora.select(stacked, slots), cache()
        tokens, found = PROMPT, []
        position = 0
        for _ in range(STEPS):
            before, width = jax.tree.leaves(held), tokens.shape[1]
            tokens, held = run(selected, held, tokens, jnp.int32(position))
            assert all(x.is_deleted() for x in before)
            position += width
            found.append(tokens[:, 0])
        for row, slot in enumerate(slots):
            np.testing.assert_array_equal(np.stack(found, 1)[row], expected(slot)[row])
    assert traces == [(1, LENGTH), (1, 1)]


@pytest.mark.slow
def test_a_compiled_loop():
    run = compiled(tied_lora.adapt(generated, on_dense="error"))
    np.testing.assert_array_equal(run(adapters()[0], cache(), PROMPT), expected(0))


@pytest.mark.slow
def test_generate_for_each_example():
    def generate(params, tokens):
        model = build("gpt2").model
        return model.generate(
            tokens, params=params, max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        ).sequences[:, LENGTH:]  # fmt: skip

    run = compiled(tied_lora.per_example(tied_lora.adapt(generate)))
    found = run(tied_lora.select(tied_lora.stack(adapters()), [0, 1, 0]), PROMPT)
    for row, slot in enumerate([0, 1, 0]):
        np.testing.assert_array_equal(found[row], expected(slot)[row])
