"""LoRA+: the rate of each factor, decay, schedules, and what is refused."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_tied_lora.train import labels_by, lora_plus
from tests.helpers.small_training import ADAPTED, TABLE, fit, fresh

# Optax relies on JAX's usual promotion itself.
pytestmark = pytest.mark.usefixtures("standard_promotion")


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
