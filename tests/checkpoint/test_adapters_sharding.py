"""Checkpoints of adapters from one mesh to another, and to shardings that are asked for."""

from __future__ import annotations

import flax.linen as nn
import jax
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from tests.helpers.saved_model import (
    CONFIG,
    OPTIMIZER,
    TOKENS,
    VOCAB,
    WIDTH,
    assert_same,
    base_params,
    wrapped,
)


def mesh_of(kind, shape=(4, 2)):
    return jax.make_mesh(shape, ("x", "y"), axis_types=(kind,) * 2)


def table_spec(x):
    return jax.P("x", "y") if x.ndim == 2 else jax.P()


@pytest.fixture(params=[jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def mesh(request):
    return mesh_of(request.param)


def sharded(params, mesh):
    return jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, table_spec(x))), params)


def test_factors_follow_their_leaf_onto_a_mesh(tmp_path, mesh):
    adapted = wrapped()
    state = OPTIMIZER.init(adapted.adapters)
    checkpoint.save(tmp_path / "a", adapted, opt_state=state)
    params = sharded(base_params(), mesh)
    restored = checkpoint.restore(tmp_path / "a", params, opt_state=OPTIMIZER)
    fresh = tied_lora.wrap(params, CONFIG)
    for tree in (restored.adapted.adapters, restored.opt_state[0].mu, restored.opt_state[0].nu):
        jax.tree.map(lambda x, y: _assert_placed(x, y.sharding), tree, fresh.adapters)
    assert_same(jax.device_get(restored.adapted.adapters), jax.device_get(adapted.adapters))
    assert_same(jax.device_get(restored.opt_state), jax.device_get(state))


def _assert_placed(x, sharding):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)


def test_from_a_mesh_to_one_device_and_to_another_mesh(tmp_path, mesh):
    adapted = wrapped(sharded(base_params(), mesh))
    checkpoint.save(tmp_path / "a", adapted, opt_state=OPTIMIZER.init(adapted.adapters))
    restored = checkpoint.restore(tmp_path / "a", base_params(), opt_state=OPTIMIZER)
    for x in jax.tree.leaves((restored.adapted.adapters, restored.opt_state)):
        assert len(x.sharding.device_set) == 1
        assert not x.committed
    assert_same(jax.device_get(restored.adapted.adapters), jax.device_get(adapted.adapters))
    other = jax.make_mesh((2, 4), ("x", "y"), axis_types=mesh.axis_types)
    restored = checkpoint.restore(tmp_path / "a", adapted.params, sharding=other)
    factor = restored.adapted.adapters["lora"]["embed/embedding"]["lora_a"]
    _assert_placed(factor, jax.NamedSharding(other, jax.P("x", None)))
    assert_same(jax.device_get(restored.adapted.adapters), jax.device_get(adapted.adapters))


def test_shardings_as_asked(tmp_path, mesh):
    adapted = wrapped()
    checkpoint.save(tmp_path / "a", adapted)
    everywhere = jax.NamedSharding(mesh, jax.P())
    rows = jax.NamedSharding(mesh, jax.P(None, "y"))

    def place(x):
        return rows if x.shape[1] % 2 == 0 else everywhere

    each = jax.tree.map(place, adapted.adapters)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), adapted.adapters
    )
    for asked, expected in (
        (everywhere, jax.tree.map(lambda x: everywhere, adapted.adapters)),
        (each, each),
        (each["lora"], each),
        (abstract, each),
        (mesh, jax.tree.map(lambda x: everywhere, adapted.adapters)),
    ):
        found = checkpoint.restore(tmp_path / "a", base_params(), sharding=asked).adapted
        jax.tree.map(_assert_placed, found.adapters, expected)
        assert_same(jax.device_get(found.adapters), jax.device_get(adapted.adapters))


def test_a_mesh_and_the_names_of_boxes(tmp_path):
    mesh = mesh_of(jax.sharding.AxisType.Auto)
    init = nn.with_partitioning(nn.initializers.normal(), ("x", "logical"))
    boxed = nn.Embed(VOCAB, WIDTH, embedding_init=init).init(jax.random.key(0), TOKENS)["params"]
    adapted = tied_lora.wrap(boxed, tied_lora.LoraConfig(r=2, target_modules=["embedding"]))
    checkpoint.save(tmp_path / "a", adapted)
    found = checkpoint.restore(tmp_path / "a", boxed, sharding=mesh).adapted
    factors = found.adapters["lora"]["embedding"]
    _assert_placed(factors["lora_a"].value, jax.NamedSharding(mesh, jax.P("x", None)))
    _assert_placed(factors["lora_b"].value, jax.NamedSharding(mesh, jax.P()))
