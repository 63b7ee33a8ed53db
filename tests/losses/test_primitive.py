"""The loss under JAX's transformations: vmap of all operands, scan, checkpoint, jvp of grad."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora.losses import linear_cross_entropy
from tests.helpers.full_logits import assert_same, compiled, cross_entropy, value_and_gradients
from tests.helpers.oracle import array, numbers

V, D, TOKENS = 17, 6, (3, 9)
HIDDEN, TABLE, BIAS = array(*TOKENS, D, seed=2), array(V, D, seed=1), array(V, seed=3)
LABELS = numbers(*TOKENS, below=V).at[0, 2:5].set(-100)


def test_transformations_of_jax():
    def each(loss: Any, hidden: Any, table: Any) -> Any:
        return jax.vmap(loss, (0, None, 0))(hidden, table, LABELS)

    def scanned(loss: Any, hidden: Any, table: Any) -> Any:
        def step(total: Any, x: Any) -> Any:
            return total + jax.checkpoint(loss)(x[0], table, x[1]), None

        return jax.lax.scan(step, jnp.float32(0), (hidden, LABELS))[0]

    def tables(loss: Any, hidden: Any, table: Any) -> Any:
        stack = jnp.stack([table, 2 * table, table - 1])
        return jax.vmap(jax.vmap(loss, (None, 0, None)), (0, None, 0))(hidden, stack, LABELS)

    def curvature(loss: Any, hidden: Any, table: Any) -> Any:
        gradient = jax.grad(lambda x: loss(x, table, LABELS))
        return jax.jvp(gradient, (hidden,), (jnp.sin(hidden),))[1]

    fused = functools.partial(linear_cross_entropy, chunk_size=4)

    def both(program: Any) -> Any:
        return [value_and_gradients(functools.partial(program, x)) for x in (fused, cross_entropy)]

    for program in (each, scanned, tables, curvature):
        ours, theirs = (compiled(run, HIDDEN, TABLE) for run in both(program))
        assert_same(ours, theirs, 5e-5)
