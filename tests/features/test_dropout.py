"""Dropout: on with a key only, its masks, its expectation and gradient, where it is refused."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.helpers import one_kernel
from tests.helpers.small_models import TOKENS, TiedLM, init, randomised, wrapped

MODEL = TiedLM()
PARAMS = init(MODEL)
W = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}
X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


def strict(fn):
    return tied_lora.adapt(fn, on_dense="error")


def loss(params, tokens):
    return jnp.mean(MODEL.apply({"params": params}, tokens) ** 2)


def projected(adapted, x=X):
    return strict(lambda p, x: x @ p["w"])(adapted, x)


DROPPED = wrapped(W, ["w"], lora_dropout=0.5)


def test_dropout_needs_a_key():
    key = jax.random.key(0)
    chex.assert_trees_all_equal(projected(DROPPED), projected(wrapped(W, ["w"])))
    assert not jnp.array_equal(projected(DROPPED.train(key)), projected(DROPPED))
    chex.assert_trees_all_equal(projected(DROPPED.train(key).eval()), projected(DROPPED))
    none = wrapped(W, ["w"]).train(key)
    chex.assert_trees_all_equal(projected(none), projected(DROPPED))


def test_same_key_same_result():
    one, two = (projected(DROPPED.train(jax.random.key(s))) for s in (0, 1))
    chex.assert_trees_all_equal(one, projected(DROPPED.train(jax.random.key(0))))
    chex.assert_trees_all_equal(one, projected(DROPPED.train(jax.random.PRNGKey(0))))
    close(one, jax.jit(projected)(DROPPED.train(jax.random.key(0))))
    assert not jnp.array_equal(one, two)


def differing(*results):
    return len({np.asarray(r - X @ W["w"]).tobytes() for r in results}) == len(results)


def test_masks_differ_by_call_site_and_group():
    twice = strict(lambda p: (X @ p["w"], X @ p["w"]))
    assert differing(*twice(DROPPED.train(jax.random.key(0))))
    params = {"a": W["w"], "b": W["w"] + 0}
    adapted = wrapped(params, ["a", "b"], lora_dropout=0.5)
    lora = adapted.adapters["lora"]
    adapted = adapted.replace(adapters={"lora": {"a": lora["a"], "b": lora["a"]}})
    alone = [strict(lambda p, n=n: X @ p[n]) for n in "ab"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tied_lora.UnreadTargetWarning)
        assert differing(*(f(adapted.train(jax.random.key(0))) for f in alone))


@pytest.mark.parametrize("stacked", [False, True])
def test_masks_differ_by_scan_step(stacked):
    params = {"w": jnp.stack([W["w"]] * 3)} if stacked else W

    def fn(p):
        if stacked:
            return jax.lax.scan(lambda c, w: (c, X @ w), 0, p["w"])[1]
        return jax.lax.scan(lambda c, _: (c, X @ p["w"]), 0, None, length=3)[1]

    adapted = wrapped(params, ["w"], lora_dropout=0.5, sites=tied_lora.trace(fn, params))
    adapted = adapted.replace(
        adapters=jax.tree.map(lambda x: jnp.ones_like(x) * 0.1, adapted.adapters)
    )
    assert differing(*strict(fn)(adapted.train(jax.random.key(0))))
    rest = strict(fn)(adapted)
    close(rest[0], rest[2])


def test_dropout_keeps_the_expectation():
    keys = jax.random.split(jax.random.key(0), 4000)
    mean = jax.vmap(lambda k: projected(DROPPED.train(k)))(keys).mean(0)
    expected = projected(DROPPED)
    spread = float(jnp.abs(expected - X @ W["w"]).max())
    assert float(jnp.abs(mean - expected).max()) < 0.1 * spread


def test_lookups_have_no_dropout():
    table = wrapped(PARAMS, ["embed_tokens"], lora_dropout=0.5)
    fn = strict(lambda p: p["embed_tokens"]["embedding"][TOKENS])
    chex.assert_trees_all_equal(fn(table.train(jax.random.key(0))), fn(table))


def test_dropout_and_its_gradient_agree():
    adapted = DROPPED.train(jax.random.key(3))
    direction = randomised(adapted.adapters, 5)

    def run(adapters):
        return jnp.sum(projected(adapted.replace(adapters=adapters)) ** 2)

    def along(step):
        return run(jax.tree.map(lambda a, d: a + step * d, adapted.adapters, direction))

    step = 1e-2
    slope = sum(
        float(jnp.vdot(g, d))
        for g, d in zip(
            *map(jax.tree.leaves, (jax.grad(run)(adapted.adapters), direction)), strict=True
        )
    )
    assert float(along(step) - along(-step)) / (2 * step) == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["up"]])
def test_differentiated_before_adapted_with_dropout_is_refused(targets):
    adapted = wrapped(PARAMS, targets, lora_dropout=0.5)
    step = tied_lora.adapt(jax.grad(lambda p: loss(p, TOKENS)))
    with pytest.raises(
        ValueError, match=r"dropout is on, and .* differentiated before.*value_and_grad"
    ):
        step(adapted.train(jax.random.key(0)))
    close(step(adapted), jax.grad(loss)(tied_lora.merge(adapted), TOKENS))


def test_a_weight_that_is_added_up_has_none_and_says_so():
    added_up = tied_lora.adapt(lambda p: jnp.tanh(p["w"]))
    said = "dropout, which is on, does nothing here"
    with pytest.warns(tied_lora.DensifyWarning, match=f"bytes, and {said}. Take it out") as caught:
        result = added_up(DROPPED.train(jax.random.key(0)))
    assert len(caught) == 1
    with pytest.warns(tied_lora.DensifyWarning) as caught:
        chex.assert_trees_all_equal(added_up(DROPPED), result)
    assert said not in str(caught[0].message)


@pytest.mark.parametrize("transform", [jax.jvp, jax.linearize], ids=["jvp", "linearize"])
def test_dropout_in_a_forward_differentiated_function_is_refused(transform):
    def model(params: Any, x: jax.Array) -> Any:
        def f(x: jax.Array) -> jax.Array:
            return x @ params["dense"]["kernel"]

        return jax.jvp(f, (x,), (x,))[1] if transform is jax.jvp else jax.linearize(f, x)[1](x)

    adapted = one_kernel.wrapped(lora_dropout=0.5).train(jax.random.key(0))
    with pytest.raises(ValueError, match="'dense/kernel' is read in a function that was differen"):
        tied_lora.adapt(model)(adapted, one_kernel.X)
    tied_lora.adapt(model)(adapted.eval(), one_kernel.X)


def test_dropout_inside_shard_map_differs_where_the_data_does():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jnp.ones((4, 8))

    def model(params: Any, check_vma: bool) -> jax.Array:
        return jax.shard_map(
            lambda w, x: x @ w, mesh=mesh, in_specs=(jax.P(), jax.P("x")), out_specs=jax.P("x"),
            check_vma=check_vma,
        )(params["dense"]["kernel"], rows)  # fmt: skip

    adapted = one_kernel.wrapped(lora_dropout=0.5).train(jax.random.key(0))
    found = np.asarray(jax.jit(lambda a: tied_lora.adapt(model)(a, True))(adapted))
    assert len({row.tobytes() for row in found}) > 1
    with pytest.raises(ValueError, match="shard_map with check_vma=False"):
        tied_lora.adapt(model)(adapted, False)
    plain = tied_lora.adapt(model)(adapted.eval(), False)
    np.testing.assert_allclose(plain, rows @ tied_lora.merge(adapted)["dense"]["kernel"], rtol=1e-5)
