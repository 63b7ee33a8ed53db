"""Adapted beside merged: what the tests of every library do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.oracle import perturbed

# The models are of one size, and tunix and gemma call their table the same.
VOCABULARY, WIDTH, HIDDEN, HEADS, KEY_HEADS, HEAD = 64, 16, 24, 4, 2, 8
TABLE = "embedder/input_embedding"
BATCH, LENGTH = 2, 6
TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)

# Quickly rather than well: each program runs once or twice.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def each_of(names: Collection[str], quick: Collection[str]) -> pytest.MarkDecorator:
    """Returns the parametrisation by families of which all but the quick ones are marked slow."""
    assert set(quick) <= set(names)
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "name", [n if n in quick else pytest.param(n, marks=slow) for n in names]
    )


def wrapped(call: Callable[..., Any], params: Any, targets: Any, tokens: Any) -> tied_lora.Adapted:
    """Returns params adapted at the targets, nothing declared, with deltas that are not zero."""
    config = tied_lora.LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    sites = tied_lora.trace(call, params, tokens)
    return perturbed(tied_lora.wrap(params, config, sites=sites), size=0.2)


def far(found: Any, expected: Any) -> float:
    """Returns the distance of two arrays, relative to the second one's norm."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def loss_of(logits: Any, tokens: Any) -> Any:
    labels = jnp.roll(tokens, -1, 1)
    logits = jnp.asarray(logits, jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def of_adapted(call: Callable[..., Any], adapted: tied_lora.Adapted, tokens: Any) -> Any:
    """Returns logits, and gradients of the factors."""
    apply = tied_lora.adapt(call, on_dense="error")

    def loss(adapted: Any) -> Any:
        logits = apply(adapted, tokens)
        return loss_of(logits, tokens), logits

    (_, logits), grads = compiled(tied_lora.value_and_grad(loss, has_aux=True))(adapted)
    return logits, grads


def of_merged(call: Callable[..., Any], adapted: tied_lora.Adapted, tokens: Any) -> Any:
    """Returns the same, of the merged model."""

    def loss(adapters: Any, adapted: Any) -> Any:
        logits = call(tied_lora.merge(adapted.replace(adapters=adapters)), tokens)
        return loss_of(logits, tokens), logits

    reference = compiled(jax.value_and_grad(loss, has_aux=True))
    (_, logits), grads = reference(adapted.adapters, adapted)
    return logits, grads


def assert_merged(call: Callable[..., Any], adapted: tied_lora.Adapted, tokens: Any) -> None:
    """Checks that logits and gradients are those of the merged model, and not the base's."""
    logits, grads = of_adapted(call, adapted, tokens)
    expected, expected_grads = of_merged(call, adapted, tokens)
    assert far(logits, expected) < 1e-5
    worst = jax.tree.map(far, grads, expected_grads)
    assert max(jax.tree.leaves(worst)) < 1e-5, worst
    assert far(compiled(call)(tied_lora.base(adapted), tokens), expected) > 1e-2


def assert_merged_in_bfloat16(
    call: Callable[..., Any], half: tied_lora.Adapted, exact: tied_lora.Adapted, tokens: Any
) -> None:
    """Checks the same of bfloat16 params; ``exact`` has them in float32.

    The gradients are sums of many rounded terms, in the merged model as well: both are judged by
    those of float32.
    """
    logits, grads = of_adapted(call, half, tokens)
    expected, expected_grads = of_merged(call, half, tokens)
    _, exact_grads = of_adapted(call, exact, tokens)
    assert logits.dtype == expected.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert 0 < far(logits, expected) < 2e-2
    found, merged = (
        jax.tree.leaves(jax.tree.map(far, x, exact_grads)) for x in (grads, expected_grads)
    )
    assert 0 < max(found) < max(2e-2, 2 * max(merged))


def decoded(
    call: Callable[..., Any], params: Any, prompt: np.ndarray, cache: Any, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens that follow a prompt, and logits everywhere, a token at a time under jit.

    Args:
      call: ``call(params, tokens, cache, place)`` returns logits and the cache.
      params: plain or adapted.
      prompt: tokens [batch, length].
      cache: an empty one; its buffers are donated from step to step.
      total: the length of all.
    """
    traced: list[Any] = []

    @functools.partial(compiled, donate_argnums=2)
    def step(params: Any, tokens: Any, cache: Any, place: Any) -> tuple[Any, Any, Any]:
        traced.append(place)
        logits, cache = call(params, tokens[:, None], cache, place)
        return jnp.argmax(logits[:, -1], -1), logits[:, -1], cache

    tokens, each = list(prompt.T), []
    for place in range(total):
        drawn, logits, cache = step(params, tokens[place], cache, place)
        each.append(logits)
        if place + 1 >= len(prompt.T):
            tokens.append(drawn)
    assert len(traced) == 1
    return np.stack(tokens[len(prompt.T) :], 1), np.stack(each, 1)


def assert_decodes_merged(case: Any, adapted: tied_lora.Adapted, tokens: Any, more: int) -> None:
    """Checks a model's cache, a token at a time, under jit with the cache donated.

    Args:
      case: with ``logits``, ``call`` and ``new_cache``.
      more: how many tokens to decode behind those given.
    """
    length = tokens.shape[1]
    total, merged = length + more, tied_lora.merge(adapted)
    call = tied_lora.adapt(case.call, on_dense="error")
    found, logits = decoded(call, adapted, tokens, case.new_cache(total), total)
    expected, reference = decoded(case.call, merged, tokens, case.new_cache(total), total)
    np.testing.assert_array_equal(found, expected)
    assert far(logits, reference) < 1e-5
    # The cache holds what the whole text gives at once.
    assert far(logits[:, :length], compiled(case.logits)(merged, tokens)) < 1e-5


def assert_merged_in_bfloat16_of(case: Any, params: Any, tokens: Any) -> None:
    """Does what `assert_merged_in_bfloat16` does with params cast to bfloat16, adapted."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    half = wrapped(case.logits, params, case.family.targets, tokens)
    exact = half.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), half.params))
    assert_merged_in_bfloat16(case.logits, half, exact, tokens)
