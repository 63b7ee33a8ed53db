"""Rearranging operations keep a weight as its parts; what mixes rows and columns adds it up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import flax_tied_lora as tied_lora
from tests.helpers.oracle import array, check, wrapped

TABLE = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
X = array(3, 6, seed=2)
ROW, COLUMN = array(6, seed=3), array(8, seed=4)


def table(params):
    return params["embed"]["embedding"]


# Each takes the [8, 6] table to something that is multiplied with data over its last axis.
KEPT = {
    "transpose": lambda w: jnp.transpose(w.T, (1, 0)),
    "reshape, rows split": lambda w: w.reshape(2, 4, 6),
    "reshape, columns split": lambda w: w.reshape(8, 2, 3).transpose(1, 0, 2).reshape(2, 8, 3)[0],
    "reshape, merged again": lambda w: w.reshape(2, 4, 6).reshape(8, 6),
    "expand and squeeze": lambda w: jnp.squeeze(jnp.expand_dims(w, (0, 2)), (0, 2)),
    "broadcast": lambda w: jnp.broadcast_to(w[None], (2, 8, 6)),
    "slice of rows": lambda w: w[1:7:2],
    "slice of columns": lambda w: w[:, :4],
    "split": lambda w: jnp.split(w, 2)[1],
    "split of columns": lambda w: jnp.split(w, [2], axis=1)[1],
    "concatenate with rows": lambda w: jnp.concatenate([w, array(2, 6, seed=7)]),
    "concatenate with itself": lambda w: jnp.concatenate([w[:2], w, w.T.T]),
    "concatenate columns": lambda w: jnp.concatenate([w, 2.0 * w[:, :3]], axis=1),
    "pad": lambda w: jnp.pad(w, ((1, 2), (0, 0)), constant_values=0.5),
    "pad of columns": lambda w: jnp.pad(w, ((0, 0), (0, 2))),
    "pad, inside and cut": lambda w: lax.pad(w, jnp.float32(0), [(-1, 1, 1), (0, 0, 0)]),
    "flip": lambda w: jnp.flip(w, (0, 1)),
    "roll": lambda w: jnp.roll(w, 2, axis=0),
    "stack": lambda w: jnp.stack([w, 2.0 * w], 1),
    "tile": lambda w: jnp.tile(w, (2, 1)),
    "cast there and back": lambda w: w.astype(jnp.float32),
    "scalar": lambda w: 2.0 * w / 3.0,
    "negated": lambda w: -w,
    "data's scalar": lambda w: w * jnp.tanh(X[0, 0]),
    "row vector": lambda w: w * ROW[None],
    "column vector": lambda w: w / (2.0 + jnp.abs(COLUMN))[:, None],
    "both vectors": lambda w: (w * ROW[None])[:6] * ROW[None],
    "sum of two": lambda w: w + 0.5 * w,
    "difference": lambda w: w - 0.25 * w[::-1],
    "barrier": lambda w: lax.optimization_barrier((w, X))[0],
    "stop_gradient": lax.stop_gradient,
    "copy": jnp.copy,
    "named": lambda w: checkpoint_name(w, "table"),
    "reduced over rows": lambda w: w.reshape(2, 4, 6).sum(0),
}


@pytest.mark.parametrize("form", KEPT.values(), ids=KEPT.keys())
def test_stays_low_rank(form):
    def fn(params, x):
        w = form(table(params))
        return jnp.tensordot(jnp.resize(x, (3, w.shape[-1])), w, (1, w.ndim - 1))

    explained = check(fn, TABLE, X)
    assert {r.site.operation for r in explained.reads} == {"dot_general"}
    assert {r.served for r in explained.reads} == {"low rank"}


# Not the one with a first axis along which nothing varies: picking from it picks the whole.
WITH_ROWS = [name for name in KEPT if name != "broadcast"]


@pytest.mark.parametrize("form", [KEPT[name] for name in WITH_ROWS], ids=WITH_ROWS)
def test_is_followed_by_a_lookup(form):
    explained = check(lambda params: form(table(params))[jnp.array([0, 0])], TABLE)
    assert {r.served for r in explained.reads} == {"low rank"}


@pytest.mark.parametrize("name", ["stop_gradient", "barrier", "scalar", "both vectors", "roll"])
def test_bfloat16(name):
    low = wrapped({"embed": {"embedding": array(8, 6, seed=1, dtype=jnp.bfloat16)}}, ["embed"])
    low_x = X.astype(jnp.bfloat16)

    def fn(params, x):
        row = ROW.astype(x.dtype)
        w = table(params)
        if name == "both vectors":
            w = w * row[None] * COLUMN.astype(x.dtype)[:, None]
        elif name != "barrier":
            w = KEPT[name](w)
        return w[jnp.array([1, 2])], x @ lax.optimization_barrier(w)[:, :6].T

    check(fn, low, low_x, on_dense="allow")


def test_cast_between_floating_types():
    def fn(params, x, low=jnp.bfloat16):
        w = table(params).astype(low)
        return x.astype(low) @ w.T, w.astype(jnp.float32)[2:4] @ x.T

    explained = check(fn, TABLE, X, reference=lambda p, x: fn(p, x, low=jnp.float32))
    assert [r.served for r in explained.reads] == ["low rank", "low rank"]
    out, _ = tied_lora.adapt(fn)(TABLE, X)
    assert out.dtype == jnp.bfloat16


def test_sharding_constraint():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("x"))

    def fn(params, x):
        return x @ lax.with_sharding_constraint(table(params), rows).T

    explained = check(fn, TABLE, X)
    assert [r.served for r in explained.reads] == ["low rank"]


def test_sum_over_all_rows_or_columns():
    """It is a product with ones: served from the factors, and data from there on."""

    def fn(params, x):
        w = table(params)
        return w.mean(0) + x[0], w.sum(1), w.sum() * x, (2.0 * w).sum(1, keepdims=True)

    explained = check(fn, TABLE, X)
    assert [(r.site.operation, r.served, r.site.rows) for r in explained.reads] == [
        ("reduce_sum", "low rank", (0,)), ("reduce_sum", "low rank", (1,)),
        ("reduce_sum", "low rank", (0, 1)), ("reduce_sum", "low rank", (1,)),
    ]  # fmt: skip


DENSE = {
    "sin": lambda w: jnp.sin(w),
    "integer_pow": lambda w: w**2,
    "mul": lambda w: w * w,
    "add": lambda w: w + 1.0,
    "div": lambda w: 1.0 / w,
    "sub": lambda w: jax.nn.softmax(w),
    "cumsum": lambda w: jnp.cumsum(w, 0),
    "reshape": lambda w: w.reshape(48),  # rows and columns in one axis
    "reduce_max": lambda w: w.max(0),
    "sort": lambda w: jnp.sort(w, 0),
    "ne": lambda w: (w != 0).sum(),
    "select_n": lambda w: jnp.where(ROW[None] > jnp.zeros((8, 1)), w, 0.0),
    "return": lambda w: w.T,
}


@pytest.mark.parametrize(("operation", "form"), DENSE.items(), ids=DENSE.keys())
def test_added_up_and_reported(operation, form):
    def fn(params):
        with jax.named_scope("Head"):
            return form(table(params))

    explained = check(fn, TABLE, on_dense="allow")
    dense = [r for r in explained.reads if r.served == "dense"]
    assert operation in [r.site.operation for r in dense]
    with pytest.raises(tied_lora.DensifyError, match="embed/embedding"):
        tied_lora.adapt(fn, on_dense="error")(TABLE)
    with pytest.warns(tied_lora.DensifyWarning) as caught:
        tied_lora.adapt(fn)(TABLE)
    text = str(
        next(w.message for w in caught if operation in str(w.message) or operation == "return")
    )
    assert "'embed/embedding'" in text
    assert "192 bytes" in text  # 8 x 6 float32
    assert "in 'Head'" in text or operation == "return"


def test_cast_to_integers_is_not_linear():
    def fn(params):
        return table(params).astype(jnp.int32)

    explained = check(fn, TABLE, on_dense="allow")
    assert [(r.site.operation, r.served) for r in explained.reads] == [
        ("convert_element_type", "dense")
    ]


def test_one_warning_for_each_place():
    def fn(params):
        return jnp.sin(table(params)) + jnp.cos(table(params)) + jnp.sin(table(params))

    with pytest.warns(tied_lora.DensifyWarning) as caught:
        tied_lora.adapt(fn)(TABLE)
    assert len(caught) == 3


def test_reshape_of_three_axes_that_splits_and_merges_rows():
    site = tied_lora.CallSite(
        "dense/kernel", "dot_general", role="projection", rows=(0, 1), cols=(2,)
    )
    kernel = wrapped(
        {"dense": {"kernel": array(4, 3, 5, seed=1)}}, ["dense"], sites=tied_lora.CallSites((site,))
    )

    def fn(params, x):
        w = params["dense"]["kernel"]
        return x @ w.reshape(12, 5), x @ w.reshape(2, 2, 3, 5).reshape(12, 5)

    explained = check(fn, kernel, array(2, 12, seed=2))
    assert [r.site.rows for r in explained.reads] == [(0, 1), (0, 1)]


def test_axes_of_size_one():
    def fn(params, x):
        w = table(params)[:1]
        return w.reshape(1, 6, 1) * 2.0, x @ w.reshape(6, 1), x[:, :1] @ w

    explained = check(fn, TABLE, X, on_dense="allow")
    assert [r.served for r in explained.reads][:2] == ["low rank", "low rank"]
