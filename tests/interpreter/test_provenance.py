"""What is read off a jaxpr: which arrays are one-hot, and along which axes others may vary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from flax_tied_lora._interpreter.provenance import Provenance

IDS = jnp.arange(3)
X = jnp.ones((3, 4))


def asked(fn, *args, one_hot=frozenset()):
    """Returns the provenance of a function's program, and the variables that it returns."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    provenance = Provenance(one_hot)
    provenance.enter(jaxpr)
    return provenance, jaxpr.outvars


ONE_HOT = {
    "one_hot": lambda i: jax.nn.one_hot(i, 5),
    "of another dtype": lambda i: jax.nn.one_hot(i, 5, dtype=jnp.bfloat16),
    "transposed": lambda i: jax.nn.one_hot(i, 5).T,
    "reshaped": lambda i: jax.nn.one_hot(i, 6).reshape(3, 2, 3),
    "inside of jit": lambda i: jax.jit(lambda i: jax.nn.one_hot(i, 5))(i),
    "handed through jit": lambda i: jax.jit(jnp.transpose)(jax.nn.one_hot(i, 5)),
    "range on the left": lambda i: (jnp.arange(5)[None] == i[:, None]).astype(jnp.float32),
    "rows of it": lambda i: jax.nn.one_hot(i, 5)[jnp.array([2, 0])],
}


@pytest.mark.parametrize("form", ONE_HOT)
def test_one_hot(form):
    provenance, (out,) = asked(ONE_HOT[form], IDS)
    assert provenance.is_one_hot(out)


OTHERS = {
    "scaled": lambda i: 2.0 * jax.nn.one_hot(i, 5),
    "comparison with data": lambda i: (i[:, None] == i[None]).astype(jnp.float32),
    "not equal": lambda i: (jnp.arange(5)[None] != i[:, None]).astype(jnp.float32),
    "an operand": lambda i: i,
    "a sum": lambda i: jax.nn.one_hot(i, 5) + jax.nn.one_hot(i + 1, 5),
    "scaled inside of jit": lambda i: jax.jit(lambda x: 3.0 * x)(jax.nn.one_hot(i, 5)),
    "a literal": lambda i: jnp.float32(1),
}


@pytest.mark.parametrize("form", OTHERS)
def test_not_one_hot(form):
    provenance, (out,) = asked(OTHERS[form], IDS)
    assert not provenance.is_one_hot(out)


def test_an_operand_that_is_one_hot_outside():
    def fn(x, y):
        return x.T, y.T

    provenance, (first, second) = asked(fn, X, X, one_hot=frozenset({1}))
    assert not provenance.is_one_hot(first)
    assert provenance.is_one_hot(second)


def test_of_several_outputs_of_a_function_each_is_told_apart():
    provenance, (hot, scaled) = asked(
        jax.jit(lambda i: (jax.nn.one_hot(i, 5), 2.0 * jax.nn.one_hot(i, 5))), IDS
    )
    assert provenance.is_one_hot(hot)
    assert not provenance.is_one_hot(scaled)


VARYING = {
    "data": (lambda x: x * 2.0, (0, 1)),
    "a row for all": (lambda x: jnp.broadcast_to(x[0][None], (5, 4)) * 1.0, (0, 1)),
    "repeated along the first": (lambda x: jnp.broadcast_to(x[0], (5, 4)), (1,)),
    "repeated along the last": (lambda x: jnp.broadcast_to(x[:, :1], (3, 5)), (0,)),
    "repeated twice": (lambda x: jnp.broadcast_to(jnp.broadcast_to(x[0], (5, 4)), (2, 5, 4)), (2,)),
    "a constant": (lambda x: jnp.full((3, 4), x[0, 0]), ()),
    "cast": (lambda x: jnp.broadcast_to(x[0], (5, 4)).astype(jnp.bfloat16), (1,)),
    "an axis of one": (lambda x: x[:, None] * 2.0, (0, 2)),
}


@pytest.mark.parametrize("form", VARYING)
def test_axes_along_which_a_value_may_vary(form):
    fn, axes = VARYING[form]
    provenance, (out,) = asked(fn, X)
    assert provenance.varying_axes(out) == axes
