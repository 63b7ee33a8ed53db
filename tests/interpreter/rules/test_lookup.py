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
from tests.helpers.oracle import array, check, numbers, only, wrapped

TABLE = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
IDS = numbers(2, 3, below=8, seed=5)


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
