"""Full params: one copy of what is tied on disk, one array again when read."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import freeze

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint

VOCAB, WIDTH = 32, 16
CONFIG = tied_lora.LoraConfig(r=2, target_modules=["embed", "dense"])


def tied_params():
    """Params in which the table stands three times: twice as it is, once transposed."""
    table = jax.random.normal(jax.random.key(0), (VOCAB, WIDTH))
    dense = {"kernel": jnp.ones((WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)}
    same = {"embed": {"embedding": table}, "second": {"embedding": table}}
    return {**same, "head": {"kernel": table.T}, "dense": dense}


TIES = [("embed/embedding", "head/kernel")]


def trained():
    """An Adapted with factors that change all that they are added to."""
    adapted = tied_lora.wrap(tied_params(), CONFIG, ties=TIES)
    return adapted.replace(adapters=jax.tree.map(lambda x: x + 0.5, adapted.adapters))


def assert_same(found, expected):
    """The same structure, types and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(x) is type(y)
        if hasattr(x, "dtype"):
            assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(params=[jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def mesh(request):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(request.param,) * 2)


def _assert_placed(x, sharding):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)


def bytes_on_disk(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_full_params_keep_their_tie(tmp_path):
    table = jax.random.normal(jax.random.key(0), (512, 128))
    tied = {"embed": {"embedding": table}, "second": {"embedding": table}, "head": {"k": table.T}}
    checkpoint.save_params(tmp_path / "a", tied, ties=[("embed/embedding", "head/k")])
    checkpoint.save_params(tmp_path / "b", {"embed": {"embedding": table}})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", tied)
    once, alone = bytes_on_disk(tmp_path / "a"), bytes_on_disk(tmp_path / "b")
    assert once < alone + 10_000 < 1.1 * table.nbytes
    assert bytes_on_disk(tmp_path / "c") > 2.5 * alone
    found = checkpoint.restore_params(tmp_path / "a")
    assert_same(found, tied)
    assert found["embed"]["embedding"] is found["second"]["embedding"]
    # Found again without being told.
    (group,) = tied_lora.find_ties(found)
    assert set(group.paths) == {"embed/embedding", "second/embedding"}


def test_merged_params_with_the_ties_of_the_plan(tmp_path):
    adapted = trained()
    merged = tied_lora.merge(adapted)
    checkpoint.save_params(tmp_path / "a", merged, ties=adapted.plan)
    found = checkpoint.restore_params(tmp_path / "a", tied_params())
    assert_same(found, merged)
    assert found["embed"]["embedding"] is found["second"]["embedding"]


def test_full_params_into_a_target(tmp_path, mesh):
    table = jnp.arange(VOCAB * WIDTH, dtype=jnp.bfloat16).reshape(VOCAB, WIDTH)
    params = {"a": {"embedding": table}, "b": [table, np.ones(3, np.float32)], "c": jnp.int8(3)}
    checkpoint.save_params(tmp_path / "a", params)
    place = jax.NamedSharding(mesh, jax.P("x", "y"))
    boxed = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=place)
    target = freeze({"a": {"embedding": nn.Partitioned(boxed, ("x", "y"))}, "b": params["b"]})
    target = target.copy({"c": params["c"]})
    found = checkpoint.restore_params(tmp_path / "a", target)
    assert jax.tree.structure(found) == jax.tree.structure(target)
    assert found["a"]["embedding"].names == ("x", "y")
    assert found["a"]["embedding"].value is found["b"][0]
    _assert_placed(found["b"][0], place)
    assert_same(jax.device_get(jax.tree.leaves(found)), jax.device_get(jax.tree.leaves(params)))
    everywhere = jax.NamedSharding(mesh, jax.P())
    found = checkpoint.restore_params(tmp_path / "a", sharding=everywhere)
    jax.tree.map(lambda x: _assert_placed(x, everywhere), found)
    each = jax.tree.map(lambda x: place if x.ndim == 2 else everywhere, params)
    found = checkpoint.restore_params(tmp_path / "a", params, sharding=each)
    jax.tree.map(_assert_placed, found, each)


def test_nnx_state(tmp_path):
    embed = nnx.Embed(VOCAB, WIDTH, rngs=nnx.Rngs(0))
    state = nnx.state({"embed": embed, "layers": [nnx.Linear(2, 3, rngs=nnx.Rngs(1))]}, nnx.Param)
    state["head"] = nnx.State({"kernel": nnx.Param(embed.embedding.get_value())})
    checkpoint.save_params(tmp_path / "a", state)
    found = checkpoint.restore_params(tmp_path / "a", state)
    assert_same(found, state)
    assert found["head"]["kernel"].get_value() is found["embed"]["embedding"].get_value()
    plain = checkpoint.restore_params(tmp_path / "a")
    assert plain["head"]["kernel"] is plain["embed"]["embedding"]
    assert plain["layers"]["0"]["kernel"].shape == (2, 3)
