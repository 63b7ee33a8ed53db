"""Lookups pick rows of the parts: every way to index, every mode, indices of any rank."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers import one_kernel
from tests.helpers.compiling import as_shipped
from tests.helpers.oracle import array, check, labelled, numbers, only, wrapped

TABLE = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
IDS = numbers(2, 3, below=8, seed=5)
BEYOND = jnp.array([0, 7, 8, 20, -1, -8, -9, -30])
DIMS = lax.GatherDimensionNumbers(
    offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0, 1)
)


def table(params):
    return params["embed"]["embedding"]


ROWS = {
    "take": lambda w: jnp.take(w, IDS, axis=0),
    "W[ids]": lambda w: w[IDS],
    "W[(ids,)]": lambda w: w[(IDS,)],
    "W[ids, ...]": lambda w: w[IDS, ...],
    "one id": lambda w: jnp.take(w, IDS[0, 0], axis=0),
    "ids of four axes": lambda w: w[IDS.reshape(1, 2, 1, 3)],
    "transposed": lambda w: w.T[:, IDS],
    "vmap over ids": lambda w: jax.vmap(lambda i: w[i])(IDS),
    "vmap twice": lambda w: jax.vmap(jax.vmap(lambda i: w[i]))(IDS),
    "numpy ids": lambda w: w[jax.device_get(IDS)],
    "uint8 ids": lambda w: w[IDS.astype(jnp.uint8)],
    "negative ids": lambda w: w[IDS - 8],
    "sorted": lambda w: w.at[jnp.sort(IDS.ravel())].get(indices_are_sorted=True),
    "unique": lambda w: w.at[jnp.arange(3)].get(unique_indices=True),
    "in bounds": lambda w: w.at[IDS].get(mode="promise_in_bounds"),
    "scaled": lambda w: (2.0 * w)[IDS],
    "some columns": lambda w: w[IDS, 1:4],
}


@pytest.mark.parametrize("form", ROWS.values(), ids=ROWS.keys())
def test_rows(form):
    (read,) = only(check(lambda params: form(table(params)), TABLE), "lookup")
    assert read.site.operation == "gather"
    assert read.site.rows == (0,)
    assert read.site.cols == (1,)


OTHERS = {
    "columns": lambda w: w[:, jnp.array([0, 3])],
    "along axis": lambda w: jnp.take_along_axis(w, IDS[:, :1].reshape(2, 1), axis=0),
    "batched rows": lambda w: jax.vmap(lambda part, i: part[i])(w.reshape(2, 4, 6), IDS[:, :2] % 4),
    "two row axes": lambda w: w.reshape(2, 4, 6)[IDS % 2, IDS % 4],
}


@pytest.mark.parametrize("form", OTHERS.values(), ids=OTHERS.keys())
def test_other_axes(form):
    only(check(lambda params: form(table(params)), TABLE), "lookup")


@pytest.mark.parametrize("mode", ["clip", "wrap", "fill"])
@pytest.mark.parametrize("axis", [0, 1])
def test_out_of_bounds(mode, axis):
    check(lambda params: jnp.take(table(params), BEYOND, axis=axis, mode=mode), TABLE)


# What a promise that is not kept gives: the last row is picked, and its gradient is dropped.
PROMISED = {
    "W[ids]": lambda w: w[BEYOND],
    "columns": lambda w: w[:, BEYOND],
    "both": lambda w: w[BEYOND, BEYOND[::-1]],
    "promised": lambda w: w.at[BEYOND].get(mode="promise_in_bounds"),
    "small ids": lambda w: w.at[BEYOND.astype(jnp.int8)].get(mode="promise_in_bounds"),
    "vmap": lambda w: jax.vmap(lambda i: w[i])(BEYOND),
    "batched": lambda w: jax.vmap(lambda row, i: row[i])(w, BEYOND[:, None]),
    "windows": lambda w: lax.gather(
        w, jnp.array([[1, 2], [6, 4]]), DIMS, (2, 3), mode="promise_in_bounds"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "dora", "rows", "copy"])
@pytest.mark.parametrize("form", PROMISED)
def test_promised_in_bounds_and_out_of_them(form, kind):
    adapted = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"], kind=kind)
    check(lambda params: PROMISED[form](table(params)), adapted)


@pytest.mark.parametrize("kind", ["lora", "dora", "rows", "copy", "quantized"])
@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
def test_a_loss_that_is_nan_out_of_bounds_has_the_merged_gradients(mode, kind):
    """What `jnp.take` fills in makes the loss NaN, and no gradient of a row that is there."""
    adapted = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"], kind=kind)

    def fn(params):
        return jnp.tanh(table(params).at[BEYOND].get(mode=mode)), jax.grad(
            lambda w: jnp.sum(jnp.tanh(w.at[BEYOND[3]].get(mode=mode)))
        )(table(params))

    check(fn, adapted, on_dense="allow")


@pytest.mark.parametrize("form", ["layers", "one entry", "constant"])
def test_a_promise_not_kept_where_what_is_picked_stays_a_weight(form):
    adapted = labelled((3, 4, 5), (1,), (2,))
    form_of = {
        "layers": lambda w: w,
        "one entry": lambda w: w[:1],
        "constant": lambda w: jnp.broadcast_to(w[0], (3, 4, 5)),
    }[form]

    def fn(params, x, ids):
        w = form_of(params["dense"]["kernel"])
        return jnp.einsum("ti,tio->to", x, w[ids])

    check(fn, adapted, array(4, 4, seed=3), jnp.array([0, 5, 2, -7]), on_dense="allow")


@pytest.mark.parametrize("fill", [None, 0, -2.5])
def test_fill_values_are_not_scaled(fill):
    def fn(params):
        w = table(params)
        # A scale of the whole, of rows, of columns; rows and columns picked.
        scaled = (w, -3.0 * w, w * jnp.arange(1.0, 9.0)[:, None], w * jnp.arange(1.0, 7.0)[None])
        return [
            jnp.take(s, BEYOND, axis=axis, mode="fill", fill_value=fill)
            for s in scaled for axis in (0, 1)
        ]  # fmt: skip

    check(fn, TABLE)


def test_row_and_column_out_of_bounds():
    def fn(params):
        w, i, j = table(params), jnp.array([0, 9, 3, 9]), jnp.array([0, 1, 9, 9])
        return [w.at[i, j].get(mode=m) for m in ("fill", "clip")]

    check(fn, TABLE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_hot_product_is_a_lookup(dtype):
    adapted = wrapped({"dense": {"kernel": array(8, 6, seed=1, dtype=dtype)}}, ["dense"])

    def fn(params):
        w = params["dense"]["kernel"]
        hot = jax.nn.one_hot(IDS, 8, dtype=w.dtype)
        return hot @ w, jnp.einsum("vd,btv->btd", w, hot)

    only(check(fn, adapted), "lookup")


def test_dynamic_slice():
    def fn(params, i):
        w = table(params)
        return [
            lax.dynamic_slice(w, (i, 0), (3, 6)),
            lax.dynamic_slice(w, (i, i), (2, 2)),
            lax.dynamic_slice_in_dim(w, i, 2, axis=1),
            lax.dynamic_index_in_dim(w, i, keepdims=False),
            lax.dynamic_slice(w, (i, i), (8, 6)),
        ]

    for start in (0, 4, 7, 30, -2):
        check(fn, TABLE, jnp.int32(start), on_dense="allow")
    reads = tied_lora.explain(fn, TABLE, jnp.int32(1)).reads
    assert [(r.site.operation, r.served) for r in reads] == [
        *[("dynamic_slice", "low rank")] * 4, ("return", "dense")
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    adapted = wrapped({"embed": {"embedding": array(8, 6, seed=1, dtype=dtype)}}, ["embed"])
    only(check(lambda p: jnp.take(table(p), IDS, axis=0), adapted), "lookup")
    assert tied_lora.adapt(lambda p: table(p)[IDS])(adapted).dtype == dtype


def test_small_deltas_survive_bfloat16():
    """A merge rounds a delta of 1e-4 away; the lookup adds it to the row it belongs to."""
    adapted = wrapped({"embed": {"embedding": array(8, 6, seed=1, dtype=jnp.bfloat16)}}, ["embed"])
    adapted = adapted.replace(adapters=jax.tree.map(lambda f: 0.01 * f, adapted.adapters))

    def fn(params):
        return table(params)[IDS].astype(jnp.float32) @ jnp.ones((6, 1))

    check(fn, adapted)


def test_indices_from_the_weight_itself():
    def fn(params):
        w = table(params)
        return w[jnp.argmax(w, axis=0)]

    explained = check(fn, TABLE, on_dense="allow")
    assert {r.site.operation: r.served for r in explained.reads} == {
        "argmax": "dense", "gather": "low rank",
    }  # fmt: skip


def test_a_factors_gradient_copies_no_tokens():
    """Summed over two axes of tokens it would: their gradient, transposed."""
    rows, columns, tokens = 40, 20, (3, 8)
    adapted = wrapped({"embed": array(rows, columns)}, ["embed"])

    def loss(params, ids, x):
        return jnp.sum(jnp.sin(params["embed"][ids] + x))

    step = tied_lora.value_and_grad(tied_lora.adapt(loss, on_dense="error"))
    args = adapted, numbers(*tokens, below=rows), array(*tokens, columns)
    text = as_shipped(jax.jit(step).lower(*args)).as_text()
    assert "f32[24,20]" in text
    assert "f32[20,24]" not in text


def test_an_index_out_of_bounds_where_the_delta_is_constant():
    def use(w: jax.Array) -> jax.Array:
        many = jnp.broadcast_to(w[None], (3, 8, 4))
        return jnp.take(many, jnp.array([1, 5]), axis=0, mode="fill", fill_value=0)

    one_kernel.check(use, on_dense="allow")


def test_columns_cut_out_by_index_are_a_projection():
    """A fused kernel from which each use cuts its columns."""

    def model(params: Any, start: jax.Array) -> jax.Array:
        kernel = params["dense"]["kernel"]
        return one_kernel.X @ lax.dynamic_slice_in_dim(kernel, start, 2, axis=1)

    adapted = one_kernel.wrapped()
    sites = tied_lora.trace(model, tied_lora.base(adapted), jnp.int32(1))
    assert [(s.role, s.rows, s.cols) for s in sites] == [("projection", (0,), (1,))]
    found = tied_lora.explain(model, adapted, jnp.int32(1))
    assert [(r.site.role, r.served) for r in found.reads] == [("projection", "low rank")]
    one_kernel.check(
        lambda w: one_kernel.X @ lax.dynamic_slice_in_dim(w, jnp.int32(1), 2, axis=1),
        on_dense="error",
    )


def test_rows_picked_from_stacked_kernels_compile():
    """XLA's CPU compiler aborts on this product's transposition if it may fold the two."""
    config = tied_lora.LoraConfig(r=2, target_modules=["dense"])
    kernel = jax.random.normal(jax.random.key(0), (3, 8, 4, 4))
    params = {"dense": {"kernel": kernel}}

    def product(params: Any) -> jax.Array:
        return jnp.einsum("nr,erlc->nelc", jnp.ones((2, 8)), params["dense"]["kernel"][:, :, :, :])

    def stacked(params: Any) -> jax.Array:
        return jnp.einsum("elnr,erlc->elnc", jnp.ones((3, 4, 2, 8)), params["dense"]["kernel"])

    def model(params: Any) -> jax.Array:
        return jnp.take(params["dense"]["kernel"], jnp.array([[0, 3], [1, 2]]), axis=2)

    sites = tied_lora.trace(stacked, params)
    adapted = tied_lora.wrap(params, config, sites=sites)
    adapted = adapted.replace(adapters=jax.tree.map(lambda x: x + 0.5, adapted.adapters))
    for function in (model, product):
        run = as_shipped(jax.jit(tied_lora.adapt(function, on_dense="allow")).lower(adapted))
        found, expected = run(adapted), function(tied_lora.merge(adapted))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


ONE_ENTRY = {
    "several axes": lambda w, ids: jnp.tanh(
        jnp.take(w.reshape(1, 8, 6).T, ids, axis=2, mode="wrap")
    ),
    "multiplied then": lambda w, ids: jnp.einsum(
        "abc,a->bc", jnp.take(w.reshape(1, 8, 6), ids, axis=0, mode="clip"), jnp.ones(2)
    ),
}


@pytest.mark.parametrize("form", ONE_ENTRY.values(), ids=ONE_ENTRY.keys())
@pytest.mark.parametrize("kind", ["lora", "copy", "rows"])
def test_an_axis_of_one_entry_indexed_by_several(form, kind):
    """Nothing is picked, but the result has new axes, along which the weight does not vary."""
    adapted = wrapped({"embed": {"embedding": array(8, 6, seed=3)}}, ["embed"], kind=kind)
    ids = jnp.array([[0, 0], [0, 0]])
    check(lambda p: form(p["embed"]["embedding"], ids[0]), adapted, on_dense="allow")
    if form is ONE_ENTRY["several axes"]:
        check(lambda p: form(p["embed"]["embedding"], ids), adapted, on_dense="allow")


@pytest.mark.parametrize("fill", [None, 0.0, 2.5])
def test_what_is_filled_in_has_no_part_in_a_scales_gradient(fill):
    """DoRA's scale: out of bounds NaN is filled in, and the magnitude's gradient is finite."""
    adapted = wrapped({"embed": {"embedding": array(8, 6, seed=3)}}, ["embed"], kind="dora")
    ids = jnp.array([1, 9, -3, 7])
    check(
        lambda p: jnp.take(p["embed"]["embedding"], ids, 0, mode="fill", fill_value=fill), adapted
    )
