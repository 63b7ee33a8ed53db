"""Replaced rows in whole programs: control flow, meshes, differentiation, stacks; their cost."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers.compiling import as_shipped
from tests.helpers.oracle import array, check, numbers
from tests.helpers.small_models import wrapped

V, D = 8, 6
REPLACED = (5, 0, 3)
IDS = jnp.array([1, 5, 0])
X = array(3, D, seed=2)


def table(params):
    return params["embed"]["embedding"]


@functools.cache
def adapted(dtype=jnp.float32, lora=False):
    params = {"embed": {"embedding": array(V, D, seed=1, dtype=dtype)}}
    targets = ["embed"] if lora else None
    return wrapped(params, targets, trainable_token_indices=list(REPLACED))


def both(w, x):
    """A lookup and a projection: a layer of a language model that has none."""
    return jnp.tanh((w[IDS] + x) @ w.T)


def through_scan(w, x):
    return lax.scan(lambda c, _: (jnp.tanh(c @ w.T @ w), both(w, c)), x, None, length=2)


def through_scan_over_rows(w, x):
    return lax.scan(lambda c, row: (2 * c, c @ row), x, w)[1]


def through_while(w, x):
    return lax.fori_loop(0, 2, lambda i, c: both(w, c) @ w, x)


def through_cond(w, x):
    return lax.cond(x[0, 0] > 0, both, lambda w, x: x @ w.T, w, x)


def through_shard_map(w, x):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(w, x):
        return x @ w.T

    specs = {"in_specs": (jax.P("x"), jax.P()), "out_specs": jax.P(None, "x")}
    return jax.shard_map(local, mesh=mesh, **specs)(w, x)


def through_shard_map_of_columns(w, x):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(w, x):
        return lax.psum(x @ w.T, "x"), w[IDS]

    specs = {"in_specs": (jax.P(None, "x"), jax.P(None, "x")),
             "out_specs": (jax.P(), jax.P(None, "x"))}  # fmt: skip
    return jax.shard_map(local, mesh=mesh, **specs)(w, x)


PROGRAMS = {
    "jit": jax.jit(both),
    "jit of jit": jax.jit(lambda w, x: jax.jit(both)(w, x) + jax.jit(both)(2 * w, x)),
    "jit returns the table": lambda w, x: both(jax.jit(lambda w: w.T)(w).T, x),
    "checkpoint": jax.checkpoint(both),
    "scan": through_scan,
    "scan over rows": through_scan_over_rows,
    "while": through_while,
    "cond": through_cond,
    "shard_map": through_shard_map,
    "shard_map of columns": through_shard_map_of_columns,
    "vmap": lambda w, x: jax.vmap(lambda row: w @ row + w[IDS[0]] @ row)(x),
    "gradient of data": lambda w, x: jax.grad(lambda x: jnp.sum(both(w, x)))(x),
    "checkpointed gradient": lambda w, x: jax.grad(
        lambda x: jnp.sum(jax.checkpoint(both)(w, x))
    )(x),
    "gradient of the table": lambda w, x: jax.grad(lambda w: jnp.sum(both(w, x)))(w),
    "forward mode": lambda w, x: jax.jvp(lambda x: both(w, x), (x,), (x,)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program, dtype):
    explained = check(
        lambda p, x: PROGRAMS[program](table(p), x), adapted(dtype), X.astype(dtype),
        gradients=program != "while",
    )  # fmt: skip
    assert {r.served for r in explained.reads} == {"rows"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_with_lora_on_the_same_table(program):
    explained = check(
        lambda p, x: PROGRAMS[program](table(p), x), adapted(lora=True), X,
        gradients=program != "while",
    )  # fmt: skip
    assert {r.served for r in explained.reads} == {"low rank"}


def test_stacked_adapters():
    several = [
        adapted().replace(adapters=jax.tree.map(lambda x, i=i: (i + 1) * x, adapted().adapters))
        for i in range(3)
    ]
    stacked = tied_lora.stack(several)
    run = tied_lora.adapt(lambda p, x: both(table(p), x), on_dense="error")
    found = jax.vmap(run, in_axes=(tied_lora.adapter_axes(stacked), None))(stacked, X)
    for got, each in zip(found, several, strict=True):
        np.testing.assert_allclose(got, both(table(tied_lora.merge(each)), X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("spec", [jax.P("x"), jax.P(None, "x")], ids=["vocabulary", "width"])
def test_a_sharded_table(kind, spec):
    own = adapted()
    mesh = jax.make_mesh((2,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    explicit = {"out_sharding": jax.P()} if kind == "Explicit" else {}

    def fn(params, x):
        w = table(params)
        h = w.at[IDS].get(**explicit) + x
        return jnp.dot(h, w.T, **explicit)

    expected = jax.value_and_grad(lambda a: jnp.sum(jnp.sin(fn_plain(tied_lora.merge(a)))))(
        own.replace(scaling={})
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(own.params, jax.NamedSharding(mesh, spec))
        new = tied_lora.wrap(params, own.plan.config)
        rows = new.adapters["trainable_tokens"]["embed/embedding"]
        assert rows.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P(None, *spec[1:])), 2)
        new = new.replace(adapters=jax.tree.map(
            lambda old, x: jax.device_put(x, old.sharding), new.adapters, own.adapters
        ))  # fmt: skip
        run = tied_lora.adapt(fn, on_dense="error")
        found = jax.jit(
            jax.value_and_grad(
                lambda adapters, a: jnp.sum(jnp.sin(run(a.replace(adapters=adapters), X)))
            )
        )(new.adapters, new)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for got, want in zip(
        jax.tree.leaves(found[1]), jax.tree.leaves(expected[1].adapters), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def fn_plain(params):
    w = table(params)
    return (w[IDS] + X) @ w.T


# What they cost

BIG_V, WIDTH, COUNT, LENGTH = 4096, 32, 8, 16


def arrays_in(jaxpr):
    """Yields the shape and dtype of every array that a program makes, inner programs included."""
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                yield from arrays_in(inner.jaxpr)
            elif hasattr(inner, "eqns"):
                yield from arrays_in(inner)
        yield from (v.aval for v in eqn.outvars)


def big():
    params = {"embed": {"embedding": array(BIG_V, WIDTH, seed=1)}}
    return wrapped(params, None, trainable_token_indices=list(range(0, 10 * COUNT, 10)))


def model(params, ids):
    w = table(params)
    return jax.nn.logsumexp(w[ids] @ w.T, axis=-1)


@pytest.mark.parametrize("differentiated", [False, True])
def test_memory_is_that_of_the_rows(differentiated):
    own, ids = big(), numbers(LENGTH, below=BIG_V, seed=5)
    run = tied_lora.adapt(model, on_dense="error")

    def loss(adapters, ids):
        return jnp.sum(run(own.replace(adapters=adapters), ids))

    fn = jax.value_and_grad(loss) if differentiated else loss
    made = list(arrays_in(jax.make_jaxpr(fn)(own.adapters, ids).jaxpr))
    assert made
    sizes = {a.shape for a in made if BIG_V in a.shape}
    assert (BIG_V,) in sizes  # which row has which slot
    assert {s for s in sizes if COUNT in s} == set()
    # The frozen table is read as it is stored; nothing of its size is computed.
    assert not [s for s in sizes if sorted(s) == sorted((BIG_V, WIDTH))]
    assert {s for s in sizes if len(s) > 2} == set()
    plain = jax.jit(lambda p, ids: jnp.sum(model(p, ids)))
    temp = as_shipped(jax.jit(fn).lower(own.adapters, ids)).memory_analysis().temp_size_in_bytes
    logits = 4 * LENGTH * BIG_V
    floor = as_shipped(plain.lower(own.params, ids)).memory_analysis().temp_size_in_bytes
    assert temp < floor + (3 if differentiated else 1.5) * logits + 64 * 1024
