"""value_and_grad: by hand, by the merged model, and a tied factor's sum over its call sites."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.small_models import TOKENS
from tests.helpers.small_training import ADAPTED, MODEL, TABLE, fit, fresh, loss_fn

# Optax relies on JAX's usual promotion itself.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_value_and_grad_equals_grad_by_hand():
    loss, grads = tied_lora.value_and_grad(loss_fn)(ADAPTED, TOKENS)
    by_hand = jax.grad(lambda a: loss_fn(ADAPTED.replace(adapters=a), TOKENS))(ADAPTED.adapters)
    chex.assert_trees_all_equal(grads, by_hand)
    assert float(loss) == float(loss_fn(ADAPTED, TOKENS))
    assert jax.tree.structure(grads) == jax.tree.structure(ADAPTED.adapters)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_value_and_grad_equals_that_of_the_merged_model():
    def merged(adapted, tokens):
        logits = MODEL.apply({"params": tied_lora.merge(adapted)}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    got, expected = (tied_lora.value_and_grad(f)(ADAPTED, TOKENS) for f in (loss_fn, merged))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)


def test_auxiliary_values_and_keyword_arguments():
    def with_aux(adapted, tokens, *, scale):
        return scale * loss_fn(adapted, tokens), {"scale": scale}

    (loss, aux), grads = tied_lora.value_and_grad(with_aux, has_aux=True)(
        ADAPTED, TOKENS, scale=2.0
    )
    one, single = tied_lora.value_and_grad(loss_fn)(ADAPTED, TOKENS)
    assert aux == {"scale": 2.0}
    chex.assert_trees_all_close(loss, 2 * one, rtol=1e-6)
    chex.assert_trees_all_close(grads, jax.tree.map(lambda g: 2 * g, single), rtol=1e-6)


def test_gradient_of_a_tied_factor_is_the_sum_over_its_call_sites():
    def used(adapted, *, lookup, projection):
        """The model with each use of the table adapted, or stopped."""
        frozen = jax.tree.map(jax.lax.stop_gradient, adapted)

        def model(reads, looks, projects):
            x = looks["embed_tokens"]["embedding"][TOKENS]
            x = x + jnp.tanh(x @ reads["up"]["kernel"])
            return jnp.mean((x @ projects["embed_tokens"]["embedding"].T) ** 2)

        return tied_lora.adapt(model, on_dense="error")(
            adapted, adapted if lookup else frozen, adapted if projection else frozen
        )

    def grads(**uses):
        got = tied_lora.value_and_grad(lambda a: used(a, **uses))(ADAPTED)[1]
        return got["lora"][TABLE]

    with pytest.warns(tied_lora.UnreadTargetWarning):
        both = grads(lookup=True, projection=True)
    with pytest.warns(tied_lora.UnreadTargetWarning):
        lookup = grads(lookup=True, projection=False)
    with pytest.warns(tied_lora.UnreadTargetWarning):
        projection = grads(lookup=False, projection=True)
    assert all(float(jnp.abs(g).max()) > 1e-4 for g in jax.tree.leaves((lookup, projection)))
    total = jax.tree.map(jnp.add, lookup, projection)
    chex.assert_trees_all_close(both, total, rtol=1e-5, atol=1e-6)


def test_only_the_adapters_change():
    before = fresh()
    after, _, losses = fit(optax.adam(0.1), 5)
    chex.assert_trees_all_equal(after.params, before.params)
    chex.assert_trees_all_equal(after.scaling, before.scaling)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after.adapters, before.adapters)
    assert all(jax.tree.leaves(changed))
    assert losses[-1] < losses[0]
