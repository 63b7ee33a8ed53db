"""Functions that were differentiated before they were adapted, up to a whole training step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

import flax_tied_lora as tied_lora
from tests.helpers.oracle import check
from tests.helpers.tied_table import IDS, TABLE, X, served, table


def loss(params, x):
    h = jnp.tanh(table(params)[IDS] + x)
    logits = h @ table(params).T
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[:, 2])


def test_gradient_of_data():
    explained = check(jax.grad(loss, argnums=1), TABLE, X)
    assert {s for _, s in served(explained)} == {"low rank"}


def test_gradient_of_params():
    """The gradient with respect to the whole table, at the adapted point."""
    check(jax.grad(loss), TABLE, X)
    check(jax.value_and_grad(loss), TABLE, X)


def test_forward_mode_and_second_order():
    check(lambda p, x: jax.jvp(lambda x: loss(p, x), (x,), (x,)), TABLE, X)
    check(lambda p, x: jax.jvp(jax.grad(lambda x: loss(p, x)), (x,), (x,))[1], TABLE, X)


def test_a_whole_training_step():
    """A step on other parameters, written for plain params: loss, gradients, update."""
    optimizer = optax.sgd(0.1, momentum=0.9)

    def of_bias(bias, params, x):
        return loss(params, x * bias[None])

    @jax.jit
    def step(params, bias, state, x):
        value, grads = jax.value_and_grad(of_bias)(bias, params, x)
        updates, state = optimizer.update(grads, state)
        return value, optax.apply_updates(bias, updates), state

    bias = jnp.ones(6)
    explained = check(step, TABLE, bias, optimizer.init(bias), X)
    explained.assert_tied()


def test_a_step_of_gradient_descent_on_the_params_themselves():
    def step(params, x):
        grads = jax.grad(loss)(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    explained = check(step, TABLE, X, on_dense="allow")
    # The new table is a table, made of the merged one: that, and nothing else, is added up.
    assert [o for o, s in served(explained) if s == "dense"] == ["sub"]


def test_differentiated_checkpoint_keeps_its_barriers():
    def loss(params, x):
        for _ in range(3):
            x = jax.checkpoint(lambda w, x: jnp.sin(x @ w.T) @ w)(table(params), x)
        return jnp.sum(x)

    def barriers(fn, params):
        return jax.jit(fn).lower(params, X).as_text().count("optimization_barrier")

    grad = jax.grad(loss, argnums=1)
    plain = barriers(grad, tied_lora.base(TABLE))
    assert plain > 0
    assert barriers(tied_lora.adapt(grad), TABLE) == plain
    # In float64: entries are above 10,000, and XLA's releases round the sums differently.
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (TABLE, X))
        check(grad, *wide)
