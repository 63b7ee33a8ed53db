"""Programs within programs: jit, checkpoint, cond, shard_map."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import flax_tied_lora as tied_lora
from tests.helpers.oracle import array, check, wrapped
from tests.helpers.tied_table import IDS, TABLE, X, served, table


def project(w, x):
    return jnp.tanh(x @ w.T)


# jit


def test_jit_takes_and_returns_weights():
    @jax.jit
    def inner(w, x):
        return w.T, x @ w.T

    def fn(params, x):
        turned, y = inner(table(params), x)
        return y, x @ turned

    assert served(check(fn, TABLE, X)) == [("dot_general", "low rank")] * 2


def test_jit_of_several_weights_and_constants():
    params = {"a": {"kernel": array(6, 4, seed=1)}, "b": {"kernel": array(4, 6, seed=2)}}
    adapted = wrapped(params, ["a", "b"])
    offset = np.arange(4, dtype=np.float32)

    @functools.partial(jax.jit, static_argnames="times")
    def inner(x, p, times):
        for _ in range(times):
            x = jnp.tanh(x @ p["a"]["kernel"] + offset[None]) @ p["b"]["kernel"]
        return x

    explained = check(lambda p, x: inner(x, p, times=2), adapted, X)
    assert [(r.site.leaf, r.site.ordinal) for r in explained.reads] == [
        ("a/kernel", 0), ("b/kernel", 0), ("a/kernel", 1), ("b/kernel", 1),
    ]  # fmt: skip
    explained.assert_tied()


def test_ordinals_and_scopes_through_nested_jit():
    @jax.jit
    def attend(w, x):
        with jax.named_scope("attend"):
            return x @ w.T

    def fn(params, x):
        with jax.named_scope("Model"):
            with jax.named_scope("embed"):
                h = table(params)[IDS] + x
            with jax.named_scope("head"):
                return jax.jit(lambda w, h: attend(w, h) + attend(2.0 * w, h))(table(params), h)

    explained = check(fn, TABLE, X)
    assert [(r.site.operation, r.site.ordinal, r.site.scope) for r in explained.reads] == [
        ("gather", 0, "Model/embed"), ("dot_general", 0, "Model/head/attend"),
        ("dot_general", 1, "Model/head/attend"),
    ]  # fmt: skip
    assert {r.groups for r in explained.reads} == {("embed/embedding",)}


def test_one_function_called_six_times_stays_one():
    inner = jax.jit(project)

    def fn(params, x):
        for _ in range(6):
            x = inner(table(params), x)[:, :6]
        return x

    text = jax.jit(tied_lora.adapt(fn)).lower(TABLE, X).as_text()
    assert text.count("func.func private @project") == 1
    assert text.count("call @project") == 6


def test_what_an_inner_jit_donates_is_not_taken_from_others():
    @functools.partial(jax.jit, donate_argnums=0)
    def inner(w, x):
        return w * 2.0, x @ w.T

    def fn(params, x):
        w, y = inner(table(params), x)
        return y, x @ w.T

    for run in (tied_lora.adapt(fn), jax.jit(tied_lora.adapt(fn))):
        for ours, theirs in zip(run(TABLE, X), fn(tied_lora.merge(TABLE), X), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    # The table and its factors are still there, for this call and for others.
    assert not any(x.is_deleted() for x in jax.tree.leaves(TABLE))


# checkpoint

POLICIES = {
    "none": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "no batch dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("logits"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["logits"], names_which_can_be_offloaded=[],
        offload_src="device", offload_dst="pinned_host",
    ),
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_checkpoint(policy):
    def block(w, x):
        return jnp.sin(checkpoint_name(x @ w.T, "logits"))

    def fn(params, x):
        return jax.checkpoint(block, policy=policy)(table(params), x) @ table(params)

    assert {s for _, s in served(check(fn, TABLE, X))} == {"low rank"}


def test_checkpoint_that_returns_a_weight_and_nests():
    def fn(params, x):
        turned = jax.checkpoint(lambda w: jax.checkpoint(lambda v: 2.0 * v.T)(w))(table(params))
        return x @ turned

    assert served(check(fn, TABLE, X)) == [("dot_general", "low rank")]


# cond

BRANCHES = {
    "alike": (lambda w: w.T, lambda w: w.T),
    "scaled in both": (lambda w: w.T * 2.0, lambda w: w.T * 3.0),
    "scaled in one": (lambda w: w.T, lambda w: w.T * 3.0),
    "data": (lambda w: X @ w.T, lambda w: -X @ w.T),
    "data in one": (lambda w: X @ w.T, lambda w: jnp.zeros((3, 8))),
    "lookup and projection": (lambda w: w[IDS] @ w.T, lambda w: X @ w.T),
}


@pytest.mark.parametrize(("name", "branches"), BRANCHES.items(), ids=BRANCHES)
def test_cond(name, branches):
    def fn(params, x):
        out = lax.cond(x[0, 0] > 0, *branches, table(params))
        return x @ out if out.shape[0] == 6 else out

    allowed = "allow" if name == "scaled in one" else "error"
    for data in (X, -X):
        explained = check(fn, TABLE, data, on_dense=allowed)
    assert {s for _, s in served(explained)} <= (
        {"dense", "low rank"} if allowed == "allow" else {"low rank"}
    )


def test_branches_that_return_different_weights_are_added_up():
    def fn(params, x):
        w = lax.cond(x[0, 0] > 0, lambda w: w.T, lambda w: w.T + w.T, table(params))
        return x @ w

    assert "dense" in {s for _, s in served(check(fn, TABLE, X, on_dense="allow"))}
    with pytest.warns(tied_lora.DensifyWarning, match="'embed/embedding'"):
        tied_lora.adapt(fn)(TABLE, X)


def test_switch():
    def fn(params, x, i):
        forms = [lambda w: x @ w.T, lambda w: 2.0 * x @ w.T, lambda w: jnp.ones((3, 8))]
        return lax.switch(i, forms, table(params))

    for i in range(3):
        assert {s for _, s in served(check(fn, TABLE, X, jnp.int32(i)))} == {"low rank"}


# shard_map


@pytest.mark.parametrize("spec", [jax.P("x"), jax.P(None, "x"), jax.P()])
def test_shard_map(spec):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(params, x):
        def local(w, x):
            out = x[:, : w.shape[1]] @ w.T
            return lax.psum(out, "x") if spec == jax.P(None, "x") else out

        data = jax.P(None, "x") if spec == jax.P(None, "x") else jax.P()
        result = jax.P(None, "x") if spec == jax.P("x") else jax.P()
        return jax.shard_map(local, mesh=mesh, in_specs=(spec, data), out_specs=result)(
            table(params), x
        )

    assert served(check(fn, TABLE, X)) == [("dot_general", "low rank")]
