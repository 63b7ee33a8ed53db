"""Labelled arrays: moved by their labels, scaled along some, multiplied over those they share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_tied_lora._algebra.factor import (
    RANK,
    Factor,
    accumulator,
    contract,
    operation_dtype,
    product_axes,
    take,
)
from tests.helpers.oracle import array

A, B = array(4, 2, seed=1), array(2, 3, seed=2)
NEAR, FAR = Factor(A, (0, RANK)), Factor(B, (RANK, 1))


def test_axes_are_named_and_moved_by_name():
    moved = NEAR.relabel(lambda axis: axis + 5)
    assert moved.axes == (5, RANK)
    assert moved.array is A
    assert (NEAR.size(0), NEAR.size(RANK)) == (4, 2)
    turned = NEAR.ordered((RANK, 1, 0))
    assert turned.axes == (RANK, 0)
    assert jnp.array_equal(turned.array, A.T)
    assert NEAR.ordered((0, 1, RANK)) is NEAR


def test_spread_over_axes_that_it_lacks():
    found = NEAR.spread((RANK, 1, 0), (2, 3, 4))
    assert jnp.array_equal(found, jnp.broadcast_to(A.T[:, None, :], (2, 3, 4)))
    assert NEAR.spread((0, RANK), (4, 2)) is A


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scaled_along_some_axes_in_float32(dtype):
    column = jnp.asarray([1e-3, 1.0, 3.0, 1e3], jnp.float32)
    found = NEAR.astype(dtype).times(Factor(column, (0,)))
    assert found.array.dtype == dtype
    expected = (A.astype(dtype).astype(jnp.float32) * column[:, None]).astype(dtype)
    assert jnp.array_equal(found.array, expected)


def test_is_a_pytree_of_its_array():
    leaves, tree = jax.tree.flatten(NEAR)
    assert leaves == [A]
    assert jax.tree.unflatten(tree, [3]).axes == (0, RANK)
    assert tree != jax.tree.structure(Factor(A, (1, RANK)))


def test_a_product_sums_over_what_is_shared_and_not_kept():
    product = contract(NEAR, FAR, (), accumulate=jnp.float32)
    assert product.axes == (0, 1)
    np.testing.assert_allclose(product.array, A @ B, rtol=1e-6)
    batched = contract(Factor(A, (0, 1)), Factor(array(4, 3, seed=3), (0, 2)), (0,),
                       accumulate=jnp.float32)  # fmt: skip
    assert batched.axes == (0, 1, 2)
    expected = jnp.einsum("br,bc->brc", A, array(4, 3, seed=3))
    np.testing.assert_allclose(batched.array, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("lhs", "rhs", "keep", "axes"),
    [
        ((0, RANK), (RANK, 1), (), (0, 1)),
        ((0, RANK), (RANK, 1), (RANK,), (RANK, 0, 1)),
        ((0, 1), (1, 0), (), ()),
        ((0, 1), (1, 0), (1,), (1,)),
        ((0,), (1,), (), (0, 1)),
    ],
)
def test_axes_of_a_product(lhs, rhs, keep, axes):
    assert product_axes(lhs, rhs, keep) == axes
    sizes = {0: 2, 1: 3, RANK: 4}
    factors = (Factor(jnp.ones([sizes[a] for a in own]), own) for own in (lhs, rhs))
    assert contract(*factors, keep, accumulate=jnp.float32).axes == axes


def test_dtypes_of_sums_and_of_operations():
    assert accumulator("bfloat16", "float16") == jnp.float32
    assert accumulator("bfloat16", "float64") == np.float64
    assert operation_dtype("bfloat16", "float32") == jnp.float32
    assert operation_dtype("int8", "bfloat16") == jnp.bfloat16


def test_entries_are_taken_where_an_axis_is_split():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    ids = jnp.array([2, 0])
    for spec, found in ((jax.P("x"), jax.P(None, None)), (jax.P(None, "x"), jax.P(None, "x"))):
        split = jax.device_put(A, jax.NamedSharding(mesh, spec))
        taken = take(split, ids, 0)
        assert taken.sharding.spec == found
        assert jnp.array_equal(taken, A[ids])
    assert jnp.array_equal(take(A, ids, 0), A[ids])
