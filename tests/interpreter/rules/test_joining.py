"""Weights put together and taken apart: each delta is where its part is, and zero elsewhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flax_tied_lora as tied_lora
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


# Weights added to themselves


SUMS = {
    "flipped": lambda w: 0.5 * (w + jnp.flip(w, 0)),
    "columns flipped": lambda w: 0.5 * (w - jnp.flip(w, 1)),
    "rolled": lambda w: w + jnp.roll(w, 1, 0) / 4,
    "twice": lambda w: w + w,
    "put in its place": lambda w: w + jnp.concatenate([w[3:], w[:3]]) / 4,
}


@pytest.mark.parametrize("kind", ["lora", "dora", "copy"])
@pytest.mark.parametrize("form", SUMS)
def test_added_to_itself_a_delta_stays_one(form, kind):
    adapted = wrapped({"q": PARAMS["q"]}, ["q"], kind=kind)

    def added(count):
        def fn(params, x):
            w = params["q"]["kernel"]
            for _ in range(count):
                w = SUMS[form](w)
            return x @ w

        return fn

    check(added(3), adapted, X, on_dense="error")
    sizes = [len(jax.make_jaxpr(tied_lora.adapt(added(n)))(adapted, X).eqns) for n in (2, 4, 8)]
    assert sizes[2] - sizes[1] <= 3 * (sizes[1] - sizes[0])


def test_a_prefix_sum_grows_as_the_plain_one():
    def fn(params):
        return lax.associative_scan(jnp.add, params["embed"]["embedding"])[jnp.arange(3)]

    for rows in (16, 64):
        adapted = wrapped({"embed": {"embedding": array(rows, 4)}}, ["embed"])
        plain = len(jax.make_jaxpr(fn)(adapted.params).eqns)
        assert len(jax.make_jaxpr(tied_lora.adapt(fn))(adapted).eqns) < 12 * plain
        check(fn, adapted, on_dense="error")


def test_added_up_where_deltas_share_no_factor():
    """Rows and columns in turn: twice as many each time, up to a bound."""

    def fn(params, x):
        w = params["q"]["kernel"]
        for i in range(7):
            scales = jnp.arange(1.0, 5.0)[None], jnp.arange(4.0)[None] / (i + 1)
            w = w * scales[0] + jnp.flip(w, 0) * scales[1]
        return x @ w / 1e3

    explained = check(fn, ALONE, X, on_dense="allow")
    assert [r.site.operation for r in explained.reads if r.served == "dense"] == ["add", "add"]
