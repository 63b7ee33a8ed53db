"""Weights put together and taken apart: each delta is where its part is, and zero elsewhere."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from jax import lax

from tests.helpers.oracle import array, check, wrapped

PARAMS = {"q": {"kernel": array(6, 4, seed=1)}, "k": {"kernel": array(6, 4, seed=2)}}
BOTH = wrapped(PARAMS, ["q", "k"])
ONE = wrapped(PARAMS, ["k"])
ALONE = wrapped({"q": PARAMS["q"]}, ["q"])
X = array(3, 6, seed=3)


def fused(params):
    return jnp.concatenate([params["q"]["kernel"], params["k"]["kernel"]], axis=1)


@pytest.mark.parametrize("adapted", [BOTH, ONE], ids=["both", "one"])
def test_columns_of_two_leaves_are_one_product(adapted):
    explained = check(lambda p, x: x @ fused(p), adapted, X, on_dense="error")
    keys = {g.key for g in adapted.plan.adapted}
    assert {r.site.leaf for r in explained.reads} == keys
    assert all({*r.groups} == keys for r in explained.reads)


@pytest.mark.parametrize("adapted", [BOTH, ONE], ids=["both", "one"])
def test_taken_apart_again_each_is_its_own(adapted):
    def fn(params, x):
        q, k = jnp.split(fused(params), 2, axis=1)
        return x @ q, x @ k

    check(fn, adapted, X, on_dense="error")


PADDED = {
    "after": ((0, 1, 0), (0, 3, 0)),
    "before": ((0, 0, 0), (2, 0, 0)),
    "cut": ((-1, 0, 0), (0, -2, 0)),
    "between": ((0, 0, 1), (0, 0, 0)),
}


@pytest.mark.parametrize("form", PADDED)
def test_padded_with_a_value(form):
    def fn(params, x):
        w = lax.pad(params["q"]["kernel"], jnp.float32(0.5), PADDED[form])
        return jnp.resize(x, (3, w.shape[0])) @ w

    explained = check(fn, ALONE, X, on_dense="error")
    assert [r.served for r in explained.reads] == ["low rank"]


def test_a_delta_that_does_not_vary_along_the_padded_axis_is_added_up():
    def fn(params):
        w = jnp.broadcast_to(params["q"]["kernel"][None], (2, 6, 4))
        return jnp.einsum("ab,lbc->lac", X, jnp.pad(w, ((0, 1), (0, 0), (0, 0))))

    explained = check(fn, ALONE, on_dense="allow")
    assert "dense" in [r.served for r in explained.reads]


def test_sums_and_differences_of_weights():
    def fn(params, x):
        q, k = params["q"]["kernel"], params["k"]["kernel"]
        return x @ (q + k), x @ (q - 2.0 * k)

    explained = check(fn, BOTH, X, on_dense="error")
    assert {r.served for r in explained.reads} == {"low rank"}
    assert all(len(r.groups) == 2 for r in explained.reads)
