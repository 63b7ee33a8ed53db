"""What is read off a jaxpr: along which axes a value may vary, and what is known from outside."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._interpreter.provenance import Provenance

IDS = jnp.arange(3)
X = jnp.ones((3, 4))


def asked(fn, *args, one_hot=frozenset()):
    """Returns the provenance of a function's program, and the variables that it returns."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    provenance = Provenance(one_hot)
    provenance.enter(jaxpr)
    return provenance, jaxpr.outvars


def test_an_operand_that_is_one_hot_outside():
    def fn(x, y):
        return x.T, y.T, y, 2.0 * y

    provenance, outvars = asked(fn, X, X, one_hot=frozenset({(1, 1)}))
    assert [provenance.one_hot_axes(v) for v in outvars] == [set(), {0}, {1}, set()]


def test_of_several_outputs_of_a_function_each_is_told_apart():
    provenance, (hot, scaled) = asked(
        jax.jit(lambda i: (jax.nn.one_hot(i, 5), 2.0 * jax.nn.one_hot(i, 5))), IDS
    )
    assert provenance.one_hot_axes(hot) == {1}
    assert provenance.one_hot_axes(scaled) == set()


def test_a_literal_is_not_one_hot():
    provenance, (out,) = asked(lambda x: jnp.float32(1), X)
    assert provenance.one_hot_axes(out) == set()
    assert provenance.varying_axes(out) == ()


VARYING = {
    "data": (lambda x: x * 2.0, (0, 1)),
    "a row for all": (lambda x: jnp.broadcast_to(x[0], (5, 4)) * 2.0, (1,)),
    "a row for all and data": (lambda x: x + jnp.broadcast_to(x[0], (3, 4)), (0, 1)),
    "repeated along the first": (lambda x: jnp.broadcast_to(x[0], (5, 4)), (1,)),
    "repeated along the last": (lambda x: jnp.broadcast_to(x[:, :1], (3, 5)), (0,)),
    "repeated twice": (lambda x: jnp.broadcast_to(jnp.broadcast_to(x[0], (5, 4)), (2, 5, 4)), (2,)),
    "a constant": (lambda x: jnp.full((3, 4), x[0, 0]), ()),
    "cast": (lambda x: jnp.broadcast_to(x[0], (5, 4)).astype(jnp.bfloat16), (1,)),
    "an axis of one": (lambda x: x[:, None] * 2.0, (0, 2)),
    "a range": (lambda x: jax.lax.broadcasted_iota(jnp.int32, (3, 4), 1), (1,)),
    "what nobody knows": (lambda x: jnp.sort(jnp.broadcast_to(x[0], (5, 4)), 0), (0, 1)),
}


@pytest.mark.parametrize("form", VARYING)
def test_axes_along_which_a_value_may_vary(form):
    fn, axes = VARYING[form]
    provenance, (out,) = asked(fn, X)
    assert provenance.varying_axes(out) == axes


def test_a_mask_made_by_thousands_of_operations_is_followed_once():
    def masked(p, x, mask):
        mask = mask[:, None] + jnp.zeros((1, 4))
        for _ in range(2000):  # each reads the one before twice
            mask = mask * 2 + mask
        return x @ (p["d"]["kernel"] * mask)

    params = {"d": {"kernel": jnp.ones((4, 4))}}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(r=2, target_modules=["d"]))
    start = time.process_time()
    jax.make_jaxpr(tied_lora.adapt(masked))(adapted, jnp.ones((2, 4)), jnp.ones(4))
    assert time.process_time() - start < 20  # by paths it would be 2 to the power of 2000
