"""Operations that pass a weight on: to its own precision, or what a checkpoint saved."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import flax_tied_lora as tied_lora
from tests.helpers.oracle import array, check, wrapped

X = array(3, 6, seed=2)
BITS = {jnp.float32: (8, 23), jnp.bfloat16: (8, 7), jnp.float16: (5, 10)}


def table_of(dtype):
    table = array(8, 6, seed=1, dtype=dtype)
    return wrapped({"embed": {"embedding": table}}, ["embed"])


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("dtype", BITS)
def test_precision_that_a_weight_has(dtype, more):
    exponent, mantissa = BITS[dtype]
    bits = (exponent, mantissa) if dtype == jnp.float32 else (exponent + more, mantissa + more)

    def fn(params, x):
        w = lax.reduce_precision(params["embed"]["embedding"], *bits)
        return x.astype(w.dtype) @ w.T, w[jnp.array([1, 5])]

    explained = check(fn, table_of(dtype), X)
    assert [r.served for r in explained.reads] == ["low rank", "low rank"]


@pytest.mark.parametrize("fewer", [(1, 0), (0, 1)])
@pytest.mark.parametrize("dtype", BITS)
def test_precision_that_it_has_not_adds_it_up(dtype, fewer):
    exponent, mantissa = (n - k for n, k in zip(BITS[dtype], fewer, strict=True))

    def fn(params):
        w = lax.reduce_precision(params["embed"]["embedding"], exponent, mantissa)
        return w[jnp.array([1, 5])]

    found = tied_lora.explain(fn, table_of(dtype))
    assert [r.site.operation for r in found.reads if r.served == "dense"] == ["reduce_precision"]


POLICIES = (
    jax.checkpoint_policies.everything_saveable,
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.save_only_these_names("table"),
    None,
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_weight_that_a_checkpoint_saves_in_a_differentiated_function(policy, dtype):
    def loss(params, x):
        w = checkpoint_name(params["embed"]["embedding"], "table")
        return jnp.sum(jnp.sin(x.astype(w.dtype) @ w.T).astype(jnp.float32))

    def gradient(params, x):
        return jax.grad(jax.checkpoint(loss, policy=policy), argnums=1)(params, x)

    explained = check(gradient, table_of(dtype), X)
    assert {r.served for r in explained.reads} == {"low rank"}
