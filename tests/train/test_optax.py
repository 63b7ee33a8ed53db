"""Adapters in Optax's hands: states, masks, labels, accumulation, and Flax's TrainState."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import flax_tied_lora as tied_lora
from tests.helpers.small_models import TOKENS
from tests.helpers.small_training import ADAPTED, APPLY, PARAMS, TABLE, fit, fresh, loss_fn

# Optax relies on JAX's usual promotion itself.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_one_optimizer_state_per_tie_group():
    w = PARAMS["embed_tokens"]["embedding"]
    params = {"embed_tokens": {"embedding": w}, "lm_head": {"kernel": w.T}, "wpe": w}
    config = tied_lora.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "wpe"])
    adapted = tied_lora.wrap(params, config, ties=[(TABLE, "lm_head/kernel")])
    moments = optax.adam(1e-3).init(adapted.adapters)[0]
    assert [x.shape for x in jax.tree.leaves(moments.mu)] == [(12, 2), (2, 8)]
    assert len(jax.tree.leaves(moments)) == 1 + 2 * 2
    assert len(jax.tree.leaves(adapted.params)) == 1


def test_flax_train_state():
    adapted = fresh()
    state = TrainState.create(apply_fn=APPLY, params=adapted.adapters, tx=optax.adam(0.1))

    @jax.jit
    def step(state, adapted):
        def loss(adapters):
            logits = state.apply_fn({"params": adapted.replace(adapters=adapters)}, TOKENS)
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(4):
        state, value = step(state, adapted)
        losses.append(float(value))
    expected, _, same = fit(optax.adam(0.1), 4)
    assert int(state.step) == 4
    assert losses == pytest.approx(same, rel=1e-5)
    chex.assert_trees_all_close(state.params, expected.adapters, rtol=1e-4, atol=1e-5)


def test_multi_transform_by_factor():
    def labels(adapters):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, adapters)

    rates = {"lora_a": optax.sgd(0.0), "lora_b": optax.sgd(0.1)}
    after, _, _ = fit(optax.multi_transform(rates, labels), adapted=ADAPTED)
    for key, pair in after.adapters["lora"].items():
        before = ADAPTED.adapters["lora"][key]
        chex.assert_trees_all_equal(pair["lora_a"], before["lora_a"])
        assert not np.array_equal(pair["lora_b"], before["lora_b"])


def test_masked_decay_of_one_group():
    def mask(adapters):
        return {
            "lora": {k: dict.fromkeys(pair, k == TABLE) for k, pair in adapters["lora"].items()}
        }

    decay = optax.masked(optax.add_decayed_weights(1.0), mask)
    zero = jax.tree.map(jnp.zeros_like, ADAPTED.adapters)
    updates, _ = decay.update(zero, decay.init(ADAPTED.adapters), ADAPTED.adapters)
    chex.assert_trees_all_equal(updates["lora"][TABLE], ADAPTED.adapters["lora"][TABLE])
    chex.assert_trees_all_equal(updates["lora"]["up/kernel"], zero["lora"]["up/kernel"])
    _, _, losses = fit(optax.chain(decay, optax.sgd(0.1)), adapted=ADAPTED)
    assert np.all(np.isfinite(losses))


def test_gradient_accumulation():
    single, _, _ = fit(optax.sgd(0.1), 2, ADAPTED)
    steps = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
    after, state, losses = fit(steps, 4, ADAPTED)
    assert int(state.gradient_step) == 2
    assert losses[0] == losses[1] != losses[2]
    chex.assert_trees_all_close(after.adapters, single.adapters, rtol=1e-5, atol=1e-6)


def test_frozen_params_are_arguments_of_the_compiled_step():
    step = jax.jit(lambda a, t: tied_lora.value_and_grad(loss_fn)(a, t))
    closed = step.trace(ADAPTED, TOKENS).jaxpr
    assert [
        c.shape for c in closed.consts if np.size(c) >= PARAMS["embed_tokens"]["embedding"].size
    ] == []
    assert len(closed.jaxpr.invars) == len(jax.tree.leaves((ADAPTED, TOKENS)))
