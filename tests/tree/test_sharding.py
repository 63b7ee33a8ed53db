"""What an array's type says of where it is: Explicit axes, manual axes, and neither."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from flax_tied_lora._tree import sharding

EXPLICIT, AUTO = jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto


def on(kind, spec, shape=(8, 4)):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    return jax.device_put(jnp.ones(shape), jax.NamedSharding(mesh, spec))


def test_only_explicit_axes_are_part_of_a_type():
    assert sharding.explicit(jax.typeof(on(EXPLICIT, jax.P("x")))).spec == jax.P("x", None)
    assert sharding.explicit(jax.typeof(on(AUTO, jax.P("x")))) is None
    assert sharding.explicit(jax.typeof(jnp.ones(2))) is None


def test_which_arrays_are_split():
    assert sharding.split(on(EXPLICIT, jax.P(None, "y"))).spec == jax.P(None, "y")
    assert sharding.split(on(EXPLICIT, jax.P())) is None
    assert sharding.split(jnp.ones(2)) is None


def test_an_array_is_whole_as_far_as_its_type_says():
    assert sharding.single(jnp.ones(2))
    assert sharding.single(on(EXPLICIT, jax.P()))
    assert not sharding.single(on(EXPLICIT, jax.P("x")))
    assert not sharding.single(on(AUTO, jax.P()))  # the compiler may split it


def test_arrays_that_are_split_over_one_mesh_axis():
    rows, cols, both = (on(EXPLICIT, jax.P(*s)) for s in (["x"], [None, "y"], [("x", "y")]))
    assert not sharding.share_names(rows, cols)
    assert sharding.share_names(rows, both)
    assert sharding.share_names(cols, both)
    assert not sharding.share_names(rows, jnp.ones(2))


def test_replicated_and_placed_as_another():
    split, plain = on(EXPLICIT, jax.P("x", "y")), jnp.ones((8, 4))
    assert sharding.replicated(split).sharding.spec == jax.P(None, None)
    assert sharding.replicated(plain) is plain
    assert sharding.placed_as(on(EXPLICIT, jax.P()), split).sharding.spec == jax.P("x", "y")
    assert sharding.placed_as(plain, jnp.ones(2)) is plain


@pytest.mark.parametrize("axes", [("x",), ("x", "y"), ()])
def test_manual_axes_that_an_array_differs_over(axes):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AUTO,) * 2)

    def program(whole, part):
        assert sharding.varying(whole) == set()
        assert sharding.varying(part) == {"x"}
        assert sharding.varying(sharding.vary(whole, axes)) == {*axes}
        assert sharding.varying(sharding.vary(part, axes)) == {"x", *axes}
        return part

    specs = {"in_specs": (jax.P(), jax.P("x")), "out_specs": jax.P("x")}
    jax.eval_shape(jax.shard_map(program, mesh=mesh, **specs), jnp.ones(4), jnp.ones(4))
    assert sharding.varying(jnp.ones(4)) == set()
