"""Loops: a weight that is only carried along stays symbolic, a changed one is added up first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers import one_kernel
from tests.helpers.oracle import array, check, labelled, wrapped

SQUARE = wrapped({"dense": {"kernel": array(4, 4, seed=1)}}, ["dense"])
LAYERS = labelled((3, 4, 4), (1,), (2,))
X = array(2, 4, seed=2)


def kernel(params):
    return params["dense"]["kernel"]


def served(explained):
    return [(r.site.operation, r.served) for r in explained.reads]


def step(w, x):
    return jnp.tanh(x @ w)


KEPT = {
    "constant": lambda w, x: lax.scan(lambda c, _: (step(w, c), c), x, length=3),
    "carried": lambda w, x: lax.scan(
        lambda c, _: ((c[0], step(*c)), None), (w, x), length=3
    )[0][1],
    "carried, through rearranging": lambda w, x: lax.scan(
        lambda c, _: ((c[0], step(2.0 * c[0].T, c[1])), None), (w, x), length=3
    )[0][1],
    "carried and returned": lambda w, x: x @ lax.scan(
        lambda c, _: (c, step(c, x)), w, length=2
    )[0],
    "with data": lambda w, x: lax.scan(lambda c, s: (step(w, c) * s, s), x, jnp.arange(3.0)),
    "reversed, unrolled": lambda w, x: lax.scan(
        lambda c, s: (step(w, c) * s, c), x, jnp.arange(4.0), reverse=True, unroll=2
    ),
    "fori": lambda w, x: lax.fori_loop(0, 3, lambda i, c: step(w, c) + i.astype(c.dtype), x),
    "nested": lambda w, x: lax.scan(
        lambda c, _: (lax.scan(lambda d, _: (step(w, d), None), c, length=2)[0], None), x, length=2
    )[0],
    "with checkpoint": lambda w, x: lax.scan(
        lambda c, _: (jax.checkpoint(step)(w, c), None), x, length=3
    )[0],
    "with cond": lambda w, x: lax.scan(
        lambda c, i: (lax.cond(i > 1, lambda v: step(v, c), lambda v: c @ v.T, w), None),
        x, jnp.arange(3),
    )[0],
    "lookups": lambda w, x: lax.scan(lambda c, i: (c + w.T[:, i][None], None), x, jnp.arange(3))[0],
    "under vmap": lambda w, x: jax.vmap(
        lambda row: lax.scan(lambda c, _: (jnp.tanh(c @ w), None), row, length=2)[0]
    )(x),
}  # fmt: skip


@pytest.mark.parametrize("form", KEPT.values(), ids=KEPT)
def test_scan_keeps_the_weight(form):
    explained = check(lambda p, x: form(kernel(p), x), SQUARE, X)
    assert explained.reads
    assert {s for _, s in served(explained)} == {"low rank"}


@pytest.mark.parametrize("name", ["constant", "carried", "nested"])
def test_scan_in_bfloat16(name):
    low = wrapped({"dense": {"kernel": array(4, 4, seed=1, dtype=jnp.bfloat16)}}, ["dense"])
    check(lambda p, x: KEPT[name](kernel(p), x), low, X.astype(jnp.bfloat16))


CHANGED = {
    "scaled": lambda w, x: lax.scan(
        lambda c, _: ((c[0] * 0.5, step(*c)), None), (w, x), length=3
    )[0][1],
    "rotated": lambda w, x: lax.scan(
        lambda c, _: ((c[1], c[0], step(c[0], c[2])), None), (w, 2.0 * w, x), length=3
    )[0][2],
    "one of two": lambda w, x: lax.scan(
        lambda c, _: ((c[0], c[1] + 1.0, step(c[0], c[2]) @ c[1]), None), (w, w, x), length=3
    )[0][2],
    "fori": lambda w, x: lax.fori_loop(0, 2, lambda i, c: c @ c.T, w),
}  # fmt: skip


@pytest.mark.parametrize("form", CHANGED.values(), ids=CHANGED)
def test_carry_that_changes_is_added_up(form):
    def fn(params, x):
        with jax.named_scope("loop"):
            return form(kernel(params), x)

    explained = check(fn, SQUARE, X, on_dense="allow")
    assert ("scan", "dense") in served(explained)
    with pytest.warns(tied_lora.DensifyWarning, match="'dense/kernel'.*'scan' in 'loop'.*64 bytes"):
        tied_lora.adapt(fn)(SQUARE, X)


def test_only_the_changed_carry_is_added_up():
    explained = check(lambda p, x: CHANGED["one of two"](kernel(p), x), SQUARE, X, on_dense="allow")
    assert served(explained) == [("scan", "dense"), ("dot_general", "low rank")]


def handed_on(w, x):
    """A checkpoint hides from JAX that the slices come back: the scan returns its own weight."""
    body = jax.checkpoint(lambda c, v: (step(v, c), (c, v, 2.0 * c)))
    x, (_, again, doubled) = lax.scan(body, x, w)
    return lax.scan(lambda c, v: (step(v, c), None), x, again)[0], doubled


WALKED = {
    "layers": lambda w, x: lax.scan(lambda c, v: (step(v, c), None), x, w)[0],
    "results of each": lambda w, x: lax.scan(lambda c, v: (c, x @ v), 0, w)[1],
    "reversed": lambda w, x: lax.scan(lambda c, v: (step(v, c), c), x, w, reverse=True),
    "unrolled": lambda w, x: lax.scan(lambda c, v: (step(v, c), None), x, w, unroll=3)[0],
    "with data": lambda w, x: lax.scan(
        lambda c, vs: (step(vs[0], c) * vs[1], None), x, (w, jnp.arange(1.0, 4.0))
    )[0],
    "scaled": lambda w, x: lax.scan(lambda c, v: (step(v, c), None), x, 2.0 * w)[0],
    "scaled by layer": lambda w, x: lax.scan(
        lambda c, v: (step(v, c), None), x, w * jnp.arange(1.0, 4.0)[:, None, None]
    )[0],
    "twice": lambda w, x: lax.scan(lambda c, v: (step(v[0], c) @ v[1], None), x, (w, 0.5 * w))[0],
    "map": lambda w, x: lax.map(lambda v: x @ v, w),
    "checkpointed": lambda w, x: lax.scan(
        lambda c, v: (jax.checkpoint(step)(v, c), None), x, w
    )[0],
    "handed on": lambda w, x: handed_on(w, x)[0] + jnp.sum(handed_on(w, x)[1]),
    "indexed": lambda w, x: lax.fori_loop(
        0, 3, lambda i, c: step(lax.dynamic_index_in_dim(w, i, 0, keepdims=False), c), x
    ),
    "indexed by []": lambda w, x: lax.scan(lambda c, i: (step(w[i], c), None), x, jnp.arange(3))[0],
    "in jit": lambda w, x: jax.jit(
        lambda w, x: lax.scan(lambda c, v: (step(v, c), None), x, w)[0]
    )(w, x),
}  # fmt: skip


@pytest.mark.parametrize("form", WALKED.values(), ids=WALKED)
def test_scan_over_stacked_layers(form):
    explained = check(lambda p, x: form(kernel(p), x), LAYERS, X)
    assert {s for _, s in served(explained)} == {"low rank"}
    assert {(r.site.rows, r.site.cols) for r in explained.reads} == {((1,), (2,))}


def test_scan_over_rows_of_a_table():
    """The leading axis is one of rows: each step has one row, and columns shared by all."""
    table = wrapped({"embed": {"embedding": array(6, 4, seed=1)}}, ["embed"])

    def fn(params, x):
        w = params["embed"]["embedding"]
        return lax.scan(lambda c, row: (jnp.tanh(c * row[None]), x @ row), x, w)

    check(fn, table, X, on_dense="allow")


def test_scan_over_layers_with_rows_in_front():
    turned = labelled((4, 3, 4), (0,), (2,))

    def fn(params, x):
        w = jnp.swapaxes(kernel(params), 0, 1)
        return lax.scan(lambda c, v: (step(v, c), None), x, w)[0]

    assert {s for _, s in served(check(fn, turned, X))} == {"low rank"}


# while_loop has no reverse-mode derivative: values only.

WHILE = {
    "constant": lambda w, x: lax.while_loop(
        lambda c: jnp.sum(c[0]) < 3, lambda c: (c[0] + 1, step(w, c[1])), (0, x)
    ),
    "carried": lambda w, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1], step(c[1], c[2])), (0, w, x)
    )[2],
    "in the test": lambda w, x: lax.while_loop(
        lambda c: jnp.sum(jnp.abs(c[1] @ w)) > 0.5,
        lambda c: (c[0] + 1, 0.5 * c[1]), (0, x),
    ),
    "carried and in the test": lambda w, x: lax.while_loop(
        lambda c: jnp.sum(jnp.abs(c[1] @ c[0])) > 0.5, lambda c: (c[0], 0.5 * step(*c)), (w, x)
    )[1],
    "fori of unknown length": lambda w, x: lax.fori_loop(
        0, jnp.argmax(x[0]) + 1, lambda i, c: step(w, c), x
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", WHILE.values(), ids=WHILE)
def test_while_keeps_the_weight(form):
    explained = check(lambda p, x: form(kernel(p), x), SQUARE, X, gradients=False)
    assert explained.reads
    assert {s for _, s in served(explained)} == {"low rank"}


def test_while_that_changes_the_weight():
    def fn(params, x):
        return lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, 0.5 * c[1], step(c[1], c[2])),
            (0, kernel(params), x),
        )[2]  # fmt: skip

    explained = check(fn, SQUARE, X, on_dense="allow", gradients=False)
    assert served(explained)[0] == ("while", "dense")
    with pytest.warns(tied_lora.DensifyWarning, match="'dense/kernel'.*'while'.*64 bytes"):
        tied_lora.adapt(fn)(SQUARE, X)


def test_loops_of_two_layers_are_told_apart():
    """Two scans of one body over different leaves: each has its own factors and its own name."""
    params = {"a": {"kernel": array(4, 4, seed=1)}, "b": {"kernel": array(4, 4, seed=2)}}
    adapted = wrapped(params, ["a", "b"])

    def loop(w, x):
        return lax.scan(lambda c, _: (step(w, c), None), x, length=2)[0]

    def fn(params, x):
        return loop(params["b"]["kernel"], loop(params["a"]["kernel"], x))

    explained = check(fn, adapted, X)
    explained.assert_tied()
    assert [(r.site.leaf, r.groups) for r in explained.reads] == [
        ("a/kernel", ("a/kernel",)), ("b/kernel", ("b/kernel",)),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["scan", "while"])
def test_a_loop_that_changes_its_weight_runs_once(kind):
    seen: list[int] = []

    def body(carry: Any) -> Any:
        w, x = carry
        jax.debug.callback(lambda: seen.append(1))
        return w * 0.9, x + (one_kernel.X @ w)

    def use(w: jax.Array) -> jax.Array:
        start = (w, jnp.zeros((3, 4)))
        if kind == "scan":
            return lax.scan(lambda c, _: (body(c), None), start, None, length=3)[0][1]
        return lax.fori_loop(0, 3, lambda _, c: body(c), start)[1]

    tied_lora.adapt(lambda p: use(p["dense"]["kernel"]), on_dense="allow")(one_kernel.wrapped())
    jax.effects_barrier()
    assert len(seen) == 3


@pytest.mark.parametrize("through", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_a_carry_handed_on_through_a_function_is_unchanged(through):
    body = through(lambda carry: (carry[0], jnp.tanh(carry[1] @ carry[0] @ carry[0].T)))

    def use(w: jax.Array) -> jax.Array:
        return lax.scan(lambda c, _: (body(c), None), (w, one_kernel.X), None, length=3)[0][1]

    one_kernel.check(use, on_dense="error")


def test_a_scan_of_no_steps():
    def use(w: jax.Array) -> jax.Array:
        empty = w.reshape(2, 4, 4)[:0]
        return lax.scan(lambda x, k: (x @ k, None), one_kernel.X[:, :4], empty)[0]

    one_kernel.check(use, on_dense="allow")
