"""New rows: from which distribution, and where they are placed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import flax_tied_lora as tied_lora
from flax_tied_lora._vocabulary.rows import extended, grown
from tests.helpers.oracle import array

V, D = 24, 8
KEY = jax.random.key(0)


def grow(leaf: Any, size: int, init: Any = "mean", axis: int = 0) -> Any:
    return grown(leaf, axis, leaf.shape[axis], size, init, KEY, path="table")


def test_mean_and_covariance():
    """As transformers' ``_init_added_embeddings_weights_with_mean``: 1e-9 of the covariance."""
    mixing = array(4, 4, seed=2)
    table = array(V, 4, seed=1) @ mixing + 3  # off zero: the rows have to be centred
    new = np.asarray(grow(table, V + 4000)[V:], np.float64)
    old = np.asarray(table, np.float64)
    covariance = 1e-9 * np.cov(old.T, bias=True)
    deviation = np.sqrt(np.diag(covariance))
    np.testing.assert_array_less(abs(new.mean(0) - old.mean(0)), 0.1 * deviation)
    np.testing.assert_allclose(
        np.cov(new.T, bias=True), covariance, atol=0.1 * np.outer(deviation, deviation).max()
    )


def test_padding_does_not_change_the_new_rows():
    table = array(V, D)
    np.testing.assert_array_equal(grow(table, V + 3), grow(table, 200)[: V + 3])


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "numpy"])
def test_dtype_and_kind_stay(kind):
    table = np.asarray(array(V, D)) if kind == "numpy" else array(V, D, dtype=jnp.dtype(kind))
    new = grow(table, V + 2)
    assert isinstance(new, type(table))
    assert new.dtype == table.dtype
    np.testing.assert_array_equal(new[:V], table)
    mean = np.mean(np.asarray(table, np.float32), axis=0)
    np.testing.assert_allclose(np.asarray(new[V], np.float32), mean, rtol=1e-2, atol=1e-3)


def test_initializers_and_given_rows():
    table, rows = array(V, D), array(2, D, seed=3)
    drawn = grow(table.T, V + 3, jax.nn.initializers.normal(0.02), axis=1)
    expected = jax.nn.initializers.normal(0.02)(KEY, (3, D), jnp.float32)
    np.testing.assert_array_equal(drawn[:, V:], expected.T)
    given = grow(table, V + 3, np.asarray(rows))
    np.testing.assert_array_equal(given[V : V + 2], rows)
    np.testing.assert_array_equal(given[-1], grow(table, V + 3)[-1])
    params = {"embed": {"embedding": table}, "lm_head": {"kernel": table.T, "bias": array(V)}}

    def new(init):
        grown, _ = tied_lora.grow_vocabulary(params, V + 2, init=init)
        return grown["embed"]["embedding"][V:], grown["lm_head"]

    ours, head = new(rows)
    np.testing.assert_array_equal(ours, rows)
    np.testing.assert_allclose(head["kernel"][:, V], table.mean(0), atol=5e-4)
    ours, head = new(jax.nn.initializers.ones)
    np.testing.assert_array_equal(ours, 1)
    np.testing.assert_array_equal(head["kernel"][:, V:], 1)
    np.testing.assert_array_equal(head["bias"][V:], 0)
    ours, head = new({"lm_head/kernel": rows})
    np.testing.assert_array_equal(head["kernel"][:, V:], rows.T)
    np.testing.assert_allclose(ours[0], table.mean(0), atol=5e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [("x", None), (None, "x")], ids=["by vocabulary", "by width"])
def test_sharded_tables(kind, spec):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    table = array(V, D)
    sharded = jax.device_put(table, sharding)
    new = grow(sharded, 32)
    assert new.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(new, grow(table, 32), atol=1e-7)
    longer = extended(sharded, 0, V, jnp.zeros((8, D)), path="a")
    assert longer.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(np.asarray(longer)[V:], 0)
    # A user's key may be on one device.
    key = jax.device_put(jax.random.key(0), jax.devices()[0])
    params = {"embed": {"embedding": sharded}, "lm_head": {"kernel": sharded.T}}
    ties = [("embed/embedding", "lm_head/kernel")]
    both, _ = tied_lora.grow_vocabulary(params, 32, ties=ties, rng=key)
    turned = jax.NamedSharding(mesh, jax.P(*spec[::-1]))
    assert both["lm_head"]["kernel"].sharding.is_equivalent_to(turned, 2)
    np.testing.assert_array_equal(both["lm_head"]["kernel"], both["embed"]["embedding"].T)
    if spec[0]:
        with pytest.raises(ValueError, match=r"'table' .*pass pad_to_multiple_of=4"):
            grow(sharded, 30)
