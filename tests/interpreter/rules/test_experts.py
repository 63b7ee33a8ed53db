"""Grouped products (mixtures of experts), stacked kernels, convolutions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers import one_kernel
from tests.helpers.oracle import array, check, labelled, only, wrapped

X = array(6, 4, seed=2)
EXPERTS = labelled((3, 4, 5), (1,), (2,))


def kernel(params):
    return params["dense"]["kernel"]


@pytest.mark.parametrize("sizes", [(1, 2, 3), (0, 6, 0), (2, 1, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ragged_dot(sizes, dtype):
    experts = labelled((3, 4, 5), (1,), (2,), dtype=dtype)
    groups = jnp.array(sizes)
    (read,) = only(
        check(lambda p, x: lax.ragged_dot(x, kernel(p), groups), experts, X.astype(dtype)),
        "projection",
    )
    assert (read.site.batch, read.site.rows, read.site.cols) == ((0,), (1,), (2,))


def test_ragged_dot_of_a_rearranged_and_scaled_kernel():
    swapped = labelled((4, 5, 3), (0,), (1,))

    def fn(params, x, sizes):
        w = 0.5 * jnp.transpose(kernel(params), (2, 0, 1))
        return lax.ragged_dot(x, w, sizes), lax.ragged_dot(x, w * 2.0, sizes[::-1])

    only(check(fn, swapped, X, jnp.array([2, 2, 2])), "projection")


def test_ragged_dot_with_factors_shared_by_all_experts():
    """[experts, d, f] with rows d and columns (experts, f): lora_a is one for all experts."""
    shared = labelled((3, 4, 5), (1,), (0, 2))
    only(check(lambda p, x: lax.ragged_dot(x, kernel(p), jnp.array([1, 2, 3])), shared, X),
         "projection")  # fmt: skip


def test_ragged_dot_over_columns():
    sizes = jnp.array([1, 2, 3])

    def fn(params, y):
        return lax.ragged_dot(y, jnp.swapaxes(kernel(params), 1, 2), sizes)

    only(check(fn, EXPERTS, array(6, 5, seed=3)), "projection")


def test_ragged_dot_over_rows_and_experts_is_added_up():
    """Experts among the rows: no thin product is grouped that way."""
    mixed = labelled((3, 4, 5), (0, 1), (2,))

    def fn(params, x):
        return lax.ragged_dot(x, kernel(params), jnp.array([1, 2, 3]))

    explained = check(fn, mixed, X, on_dense="allow")
    assert {r.site.operation for r in explained.reads} == {"ragged_dot_general"}


ALL = {
    "einsum": lambda w, x: jnp.einsum("nd,edf->nef", x, w),
    "picked per token": lambda w, x: jnp.einsum("nd,ndf->nf", x, w[jnp.array([0, 2, 1, 1, 0, 2])]),
    "one by one": lambda w, x: [x @ w[i] for i in range(3)],
    "one by an index": lambda w, x: x @ lax.dynamic_index_in_dim(w, jnp.argmax(x[0]) % 3, 0, False),
    "vmap": lambda w, x: jax.vmap(lambda e: x @ e)(w),
    "vmap with data": lambda w, x: jax.vmap(lambda e, y: y @ e)(w, x.reshape(3, 2, 4)),
    "a slice of experts": lambda w, x: jnp.einsum("nd,edf->nef", x, w[1:]),
    "dynamic slice": lambda w, x: jnp.einsum(
        "nd,edf->nef", x, lax.dynamic_slice(w, (jnp.argmax(x[0]) % 2, 0, 0), (2, 4, 5))
    ),
    "reordered": lambda w, x: jnp.einsum("nd,edf->nef", x, jnp.take(w, jnp.array([2, 0]), axis=0)),
    "out of bounds": lambda w, x: jnp.einsum(
        "nd,edf->nef", x, jnp.take(2.0 * w, jnp.array([2, 9]), axis=0, mode="fill", fill_value=0.5)
    ),
}


@pytest.mark.parametrize("form", ALL.values(), ids=ALL.keys())
def test_experts_picked_stay_low_rank(form):
    reads = only(check(lambda p, x: form(kernel(p), x), EXPERTS, X), "projection")
    assert {r.site.operation for r in reads} == {"dot_general"}


def test_rows_of_a_stacked_table():
    """[codebooks, vocabulary, d]: the codebook is walked in step, the row is picked."""
    site = tied_lora.CallSite("embed/embedding", "gather", role="lookup", rows=(1,), cols=(2,))
    tables = wrapped(
        {"embed": {"embedding": array(3, 6, 4, seed=1)}},
        ["embed"],
        sites=tied_lora.CallSites((site,)),
    )

    def fn(params, ids):
        w = params["embed"]["embedding"]
        return jax.vmap(lambda t, i: t[i])(w, ids), w[1][ids], w[ids % 3, ids]

    only(check(fn, tables, jnp.array([[0, 5], [2, 2], [1, 4]])), "lookup")


CONVOLUTIONS = {
    "1d": ((3, 4, 6), (2, 5, 4), {"padding": "SAME"}),
    "stride": ((3, 4, 6), (2, 7, 4), {"padding": "VALID", "window_strides": (2,)}),
    "dilated": ((2, 4, 6), (2, 7, 4), {"padding": [(2, 1)], "rhs_dilation": (2,)}),
    "transposed": ((3, 4, 6), (1, 4, 4), {"padding": [(2, 2)], "lhs_dilation": (2,)}),
    "groups": ((3, 2, 6), (2, 5, 4), {"padding": "SAME", "feature_group_count": 2}),
    "depthwise": ((3, 1, 4), (2, 5, 4), {"padding": "SAME", "feature_group_count": 4}),
}


@pytest.mark.parametrize(("shape", "data", "options"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_convolution(shape, data, options, dtype):
    adapted = labelled(shape, (0, 1), (2,), dtype=dtype)
    options = {"window_strides": (1,), **options}

    def fn(params, x):
        return lax.conv_general_dilated(
            x, kernel(params), dimension_numbers=("NWC", "WIO", "NWC"), **options
        )

    (read,) = only(check(fn, adapted, array(*data, seed=2, dtype=dtype)), "projection")
    assert (read.site.rows, read.site.cols) == ((0, 1), (2,))


def test_convolution_of_two_dimensions_channels_first():
    adapted = labelled((5, 3, 2, 2), (1, 2, 3), (0,))

    def fn(params, x):
        return lax.conv_general_dilated(x, 2.0 * kernel(params), (1, 1), "SAME")

    only(check(fn, adapted, array(1, 3, 4, 4, seed=2)), "projection")


def test_convolution_with_the_weight_as_data_is_added_up():
    def fn(params, x):
        return lax.conv_general_dilated(kernel(params), x, (1,), "SAME")

    explained = check(fn, EXPERTS, array(2, 4, 3, seed=2), on_dense="allow")
    assert [r.served for r in explained.reads] == ["dense"]


@pytest.mark.parametrize("columns", [1, 3])
def test_groups_that_differ_in_their_columns(columns):
    """Each group's matrix is some columns of one table: the group axis is an axis of lora_b."""
    params = {"embed": {"embedding": array(6, 4 * columns, seed=1)}}
    x = array(6, 6, seed=2)

    def model(params, x):
        each = params["embed"]["embedding"].reshape(6, 4, columns).swapaxes(0, 1)
        return lax.ragged_dot(x, each, jnp.array([2, 0, 3, 1]))

    explained = check(model, wrapped(params, ["embed"], r=2), x, on_dense="error")
    assert [r.served for r in explained.reads] == ["low rank"]


def test_data_of_another_dtype_in_grouped_products():
    sizes = jnp.array([2, 1])
    narrow = one_kernel.X.astype(jnp.bfloat16)

    def use(w: jax.Array) -> jax.Array:
        both = jnp.stack([w, 2 * w])
        return lax.ragged_dot(narrow, both, sizes, preferred_element_type=jnp.float32)

    one_kernel.check(use, on_dense="error")
