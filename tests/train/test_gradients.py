"""Training: value_and_grad, the sum over call sites, TrainState, Optax's wrappers, LoRA+."""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import flax_tied_lora as tied_lora
from flax_tied_lora.train import labels_by, lora_plus
from tests.helpers.small_models import TOKENS, TiedLM, init, wrapped

# Optax relies on JAX's usual promotion itself.
pytestmark = pytest.mark.usefixtures("standard_promotion")

MODEL = TiedLM()
PARAMS = init(MODEL)
TABLE = "embed_tokens/embedding"
ADAPTED = wrapped(PARAMS, ["embed_tokens", "up"])
APPLY = tied_lora.adapt(MODEL.apply, on_dense="error")


def loss_fn(adapted, tokens):
    logits = APPLY({"params": adapted}, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def fresh():
    config = tied_lora.LoraConfig(r=2, target_modules=["embed_tokens", "up"])
    return tied_lora.wrap(PARAMS, config)


def fit(optimizer, steps=3, adapted=None):
    """Returns the adapted model and the optimizer's state after some steps."""
    adapted = fresh() if adapted is None else adapted
    state = optimizer.init(adapted.adapters)

    @jax.jit
    def step(adapted, state):
        loss, grads = tied_lora.value_and_grad(loss_fn)(adapted, TOKENS)
        updates, state = optimizer.update(grads, state, adapted.adapters)
        adapters = optax.apply_updates(adapted.adapters, updates)
        return adapted.replace(adapters=adapters), state, loss

    losses = []
    for _ in range(steps):
        adapted, state, loss = step(adapted, state)
        losses.append(float(loss))
    return adapted, state, losses


# Gradients


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


# Optax


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


# LoRA+


def plain(rate, weight_decay=0.0):
    """Gradient descent: with a gradient of 1 its update is the learning rate."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate))


def rates(optimizer, steps=1, gradient=1.0):
    """Returns minus the update of each factor, which has one for all its entries."""
    adapters = jax.tree.map(jnp.ones_like, ADAPTED.adapters)
    grads = jax.tree.map(lambda x: jnp.full_like(x, gradient), adapters)
    state = optimizer.init(adapters)
    for _ in range(steps):
        updates, state = jax.jit(optimizer.update)(grads, state, adapters)
    assert all(len(np.unique(x)) == 1 for x in jax.tree.leaves(updates))
    return {
        f"{key}/{name}": pytest.approx(-float(x[0, 0]), rel=1e-5)
        for key, pair in updates["lora"].items()
        for name, x in pair.items()
    }


def expected(a, b, table):
    return {
        f"{TABLE}/lora_a": table, f"{TABLE}/lora_b": table,
        "up/kernel/lora_a": a, "up/kernel/lora_b": b,
    }  # fmt: skip


def test_rates_of_lora_plus():
    assert rates(lora_plus(ADAPTED, 0.1, optimizer=plain)) == expected(0.1, 1.6, 1e-6)
    found = rates(lora_plus(ADAPTED.plan, 0.1, 4, embedding_learning_rate=0.2, optimizer=plain))
    assert found == expected(0.1, 0.4, 0.2)


def test_weight_decay_of_lora_plus():
    found = rates(lora_plus(ADAPTED, 0.1, 4, weight_decay=0.5, optimizer=plain), gradient=0.0)
    assert found == expected(0.05, 0.2, 5e-7)
    # Optax's AdamW would decay by itself; PEFT's default, and this one's, is none.
    assert rates(lora_plus(ADAPTED, 0.1), gradient=0.0) == expected(0, 0, 0)
    assert rates(lora_plus(ADAPTED, 0.1, weight_decay=0.5), gradient=0.0)["up/kernel/lora_b"] == 0.8


def test_schedules_of_lora_plus():
    def rising(count):
        return 0.1 * (count + 1)

    for steps in (1, 3):
        found = rates(lora_plus(ADAPTED, rising, 4, optimizer=plain), steps)
        assert found == expected(0.1 * steps, 0.4 * steps, 1e-6)
    found = rates(lora_plus(ADAPTED, 0.1, 4, embedding_learning_rate=rising, optimizer=plain), 3)
    assert found == expected(0.1, 0.4, 0.3)


def test_optimizers_of_lora_plus():
    # The first step of Adam is the sign of the gradient.
    assert rates(lora_plus(ADAPTED, 0.1, 4)) == expected(0.1, 0.4, 1e-6)
    assert rates(lora_plus(ADAPTED, 0.1, 4, optimizer=optax.adam)) == expected(0.1, 0.4, 1e-6)
    lion = functools.partial(optax.lion, b1=0.5)
    assert rates(lora_plus(ADAPTED, 0.1, 4, optimizer=lion)) == expected(0.1, 0.4, 1e-6)

    def flexible(rate, **options):
        assert options == {"weight_decay": 0.5}
        return plain(rate, **options)

    optimizer = lora_plus(ADAPTED, 0.1, 4, weight_decay=0.5, optimizer=flexible)
    assert rates(optimizer, gradient=0.0) == expected(0.05, 0.2, 5e-7)


def test_training_with_lora_plus_and_slower_layers():
    slower = labels_by(ADAPTED, {"up": 0.5}, default=1.0)
    scales = optax.partition({s: optax.scale(s) for s in (0.5, 1.0)}, slower)
    optimizer = optax.chain(lora_plus(ADAPTED, 0.1, 4, optimizer=plain), scales)
    assert rates(optimizer) == expected(0.05, 0.2, 1e-6)
    after, _, losses = fit(optax.chain(lora_plus(ADAPTED, 1e-3), scales), 5, fresh())
    assert losses[-1] < losses[0]
    assert jax.tree.structure(after.adapters) == jax.tree.structure(ADAPTED.adapters)


def test_one_state_for_each_array():
    state = lora_plus(ADAPTED, 0.1).init(ADAPTED.adapters)
    moments = [x.shape for x in jax.tree.leaves(state) if x.ndim]
    shapes = [x.shape for x in jax.tree.leaves(ADAPTED.adapters)]
    assert sorted(moments) == sorted(2 * shapes)


@pytest.mark.parametrize("ratio", [0, -1, math.inf, math.nan, True, "16", None])
def test_ratios_that_are_refused(ratio):
    with pytest.raises(ValueError, match=r"lora_plus: ratio=.*; expected a finite number above 0"):
        lora_plus(ADAPTED, 0.1, ratio)


@pytest.mark.parametrize("decay", [-0.1, math.inf, math.nan, False, None])
def test_decays_that_are_refused(decay):
    with pytest.raises(ValueError, match=r"lora_plus: weight_decay=.*; expected a finite number f"):
        lora_plus(ADAPTED, 0.1, weight_decay=decay)


def test_optimizers_that_are_refused():
    with pytest.raises(ValueError, match=r"weight_decay=0.5, but the optimizer has no argument"):
        lora_plus(ADAPTED, 0.1, weight_decay=0.5, optimizer=optax.sgd)
    bound = functools.partial(optax.adamw, weight_decay=0.1)
    with pytest.raises(ValueError, match="bound to a weight_decay of its own; give it to lora_pl"):
        lora_plus(ADAPTED, 0.1, optimizer=bound)
    with pytest.raises(TypeError, match="lora_plus: found a dict; expected an Adapted"):
        lora_plus(ADAPTED.adapters, 0.1)
