"""Equations run as they stand: some of a program's, with what they read handed in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._interpreter.equations import last_uses, run, variables


def program(x, y):
    a = x * y
    b = jnp.sin(a)
    return b + x, a


CLOSED = jax.make_jaxpr(program)(1.0, 2.0)
JAXPR = CLOSED.jaxpr
(X, Y), (PRODUCT, SINE, SUM) = JAXPR.invars, JAXPR.eqns
(A,), (B,), (C,) = PRODUCT.outvars, SINE.outvars, SUM.outvars


def test_some_equations_are_run_with_what_they_read():
    (found,) = run([SINE], {A: jnp.float32(0.5)}, [B])
    np.testing.assert_allclose(found, np.sin(0.5), rtol=1e-6)
    both = run([PRODUCT, SINE], {X: jnp.float32(2), Y: jnp.float32(3)}, [B, A])
    np.testing.assert_allclose(both, [np.sin(6), 6], rtol=1e-6)


def test_they_are_traced_like_any_function():
    gradient = jax.grad(lambda a: run([SINE], {A: a}, [B])[0])(0.5)
    np.testing.assert_allclose(gradient, np.cos(0.5), rtol=1e-6)
    traced = str(jax.make_jaxpr(lambda a: run([SINE], {A: a}, [B]))(0.5))
    assert " sin " in traced
    assert "pjit" not in traced


def test_callbacks_happen_once():
    seen = []

    def fn(x):
        jax.debug.callback(lambda v: seen.append(float(v)), x)
        return x + 1

    jaxpr = jax.make_jaxpr(fn)(1.0).jaxpr
    (found,) = run(jaxpr.eqns, {jaxpr.invars[0]: jnp.float32(4)}, jaxpr.outvars)
    jax.effects_barrier()
    assert found == 5
    assert seen == [4.0]


def test_variables_are_what_is_read_and_made():
    assert variables([SINE]) == [A, B]
    assert variables([PRODUCT, SUM]) == [X, Y, A, B, X, C]
    literal = jax.make_jaxpr(lambda x: x + 1.0)(1.0).jaxpr
    assert variables(literal.eqns) == [*literal.invars, *literal.outvars]


def test_what_is_returned_is_kept_to_the_end():
    assert last_uses(JAXPR) == {X: 2, Y: 0, A: 3, B: 2, C: 3}
