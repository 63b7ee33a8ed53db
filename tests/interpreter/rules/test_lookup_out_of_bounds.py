"""Indices out of bounds: each mode, what is filled in, and promises that are not kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.helpers import one_kernel
from tests.helpers.oracle import array, check, labelled, wrapped

TABLE = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
BEYOND = jnp.array([0, 7, 8, 20, -1, -8, -9, -30])
DIMS = lax.GatherDimensionNumbers(
    offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0, 1)
)


def table(params):
    return params["embed"]["embedding"]


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


def test_an_index_out_of_bounds_where_the_delta_is_constant():
    def use(w: jax.Array) -> jax.Array:
        many = jnp.broadcast_to(w[None], (3, 8, 4))
        return jnp.take(many, jnp.array([1, 5]), axis=0, mode="fill", fill_value=0)

    one_kernel.check(use, on_dense="allow")


@pytest.mark.parametrize("fill", [None, 0.0, 2.5])
def test_what_is_filled_in_has_no_part_in_a_scales_gradient(fill):
    """DoRA's scale: out of bounds NaN is filled in, and the magnitude's gradient is finite."""
    adapted = wrapped({"embed": {"embedding": array(8, 6, seed=3)}}, ["embed"], kind="dora")
    ids = jnp.array([1, 9, -3, 7])
    check(
        lambda p: jnp.take(p["embed"]["embedding"], ids, 0, mode="fill", fill_value=fill), adapted
    )
