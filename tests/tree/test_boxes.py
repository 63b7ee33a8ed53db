"""Boxes: which leaves have one, its names for a factor's axes, and what comes in its place."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from flax_tied_lora._tree.boxes import (
    boxed_like,
    boxes_of,
    in_place,
    names_along,
    unboxed,
    with_slots,
)
from flax_tied_lora._tree.foreign import loaded_type
from tests.helpers.bad_inputs import Box

BOX = nn.Partitioned(jnp.ones((4, 6)), ("rows", "cols"))


def test_boxes_by_the_path_of_their_leaf():
    params = {"a": {"kernel": BOX, "bias": jnp.ones(6)}, "b": nn.LogicallyPartitioned(1.0, ())}
    assert set(boxes_of(params)) == {"a/kernel", "b"}
    assert boxes_of(params)["a/kernel"] is BOX
    assert boxes_of({"a": jnp.ones(2)}) == {}


def test_a_factor_has_the_names_of_the_axes_that_it_has():
    assert names_along(("rows", "cols"), (1, "rank", 0, 7)) == ["cols", None, "rows", None]
    factor = boxed_like(BOX, (0, "rank"), jnp.ones((4, 2)))
    assert type(factor) is nn.Partitioned
    assert factor.names == ("rows", None)
    assert factor.value.shape == (4, 2)


def test_a_box_without_names_is_refused():
    with pytest.raises(ValueError, match="boxed in a Box, which has no axis names; expected flax"):
        boxed_like(Box(jnp.ones(4)), (0,), jnp.ones(4))


def test_an_array_is_taken_out_with_slots_or_without():
    assert unboxed(BOX).shape == (4, 6)
    assert unboxed("no box") == "no box"
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    stacked = with_slots(nn.Partitioned(jnp.ones((3, 4, 6)), ("x", None), mesh=mesh))
    assert stacked.names == (None, "x", None)
    assert unboxed(stacked).sharding.spec == jax.P(None, "x", None)
    # Inside `jax.vmap` over slots the array lacks the box's first axis.
    shapes = []
    jax.vmap(lambda factor: shapes.append(unboxed(factor).shape))(stacked)
    assert shapes == [(4, 6)]
    assert with_slots(3) == 3


def test_what_comes_in_the_place_of_an_array_is_boxed_and_placed_like_it():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    old = nn.Partitioned(jax.device_put(jnp.ones((4, 6)), sharding), ("rows", "cols"))
    new = in_place(old, jnp.zeros((4, 6)))
    assert new.names == ("rows", "cols")
    assert new.value.sharding == sharding
    assert not new.value.any()
    assert in_place(jnp.ones(2), jnp.zeros(2)).tolist() == [0, 0]


def test_classes_of_nnx_are_known_where_it_is_imported(monkeypatch):
    from flax import nnx

    assert loaded_type("flax.nnx", "Module") is nnx.Module
    monkeypatch.delitem(__import__("sys").modules, "flax.nnx")
    assert not isinstance(3, loaded_type("flax.nnx", "Module"))
