"""Params and adapters that are made into shards, merged and optimised there."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.linen.spmd as spmd
import jax
import optax
import pytest
from jax.sharding import AxisType

import flax_tied_lora as tied_lora
from tests.helpers.collectives import collectives

V, D, H, R = 32, 16, 24, 4
CONFIG = tied_lora.LoraConfig(r=R, lora_alpha=8, target_modules=["embed", "dense"])


def params() -> dict[str, Any]:
    k1, k2 = jax.random.split(jax.random.key(0))
    return {
        "embed": {"embedding": jax.random.normal(k1, (V, D))},
        "dense": {"kernel": jax.random.normal(k2, (D, D)) / 4},
    }


BIG = 4096  # rows of a table that must be nowhere whole


def initialised(key: jax.Array) -> Any:
    k1, k2 = jax.random.split(key)
    return {
        "embed": {"embedding": jax.random.normal(k1, (BIG, D))},
        "dense": {"kernel": jax.random.normal(k2, (D, D))},
    }


@pytest.fixture(scope="module")
def created() -> Any:
    """Params and adapters made in one program: its abstract result, the program, and its result."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    shapes = jax.eval_shape(initialised, jax.random.key(0))
    specs = {"embed": {"embedding": jax.P("x")}, "dense": {"kernel": jax.P(None, "x")}}
    abstract = tied_lora.wrap(
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.NamedSharding(mesh, s)
            ), shapes, specs,
        ), CONFIG,
    )  # fmt: skip
    shardings = jax.tree.map(lambda x: x.sharding or jax.NamedSharding(mesh, jax.P()), abstract)

    def create(key: jax.Array) -> tied_lora.Adapted:
        base, own = jax.random.split(key)
        return tied_lora.wrap(initialised(base), CONFIG, rng=own)

    program = jax.jit(create, out_shardings=shardings).lower(jax.random.key(0)).compile()
    return abstract, program, program(jax.random.key(0))


def test_params_and_adapters_are_made_straight_into_shards(created):
    abstract, program, adapted = created
    assert program.memory_analysis().temp_size_in_bytes < 4 * BIG * D / 2  # random bits, in shards
    assert collectives(program) == []
    for made, described in zip(jax.tree.leaves(adapted), jax.tree.leaves(abstract), strict=True):
        if described.sharding is not None:
            assert made.sharding.is_equivalent_to(described.sharding, made.ndim)
    factors = adapted.adapters["lora"]["embed/embedding"]
    assert {s.data.shape for s in factors["lora_a"].addressable_shards} == {(BIG // 8, R)}
    assert {s.data.shape for s in factors["lora_b"].addressable_shards} == {(R, D)}
    table = adapted.params["embed"]["embedding"]
    assert {s.data.shape for s in table.addressable_shards} == {(BIG // 8, D)}


def test_merging_stays_in_shards(created):
    _, _, adapted = created
    program = jax.jit(tied_lora.merge).lower(adapted).compile()
    assert collectives(program) == []
    for merged in (program(adapted), tied_lora.merge(adapted)):
        for old, new in zip(jax.tree.leaves(adapted.params), jax.tree.leaves(merged), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


def test_an_optimizers_state_is_sharded_like_its_factors(created):
    _, _, adapted = created
    optimizer = optax.adam(1e-3)
    state: Any = optimizer.init(adapted.adapters)
    abstract = jax.eval_shape(optimizer.init, adapted.adapters)
    places = optax.tree.map_params(
        optimizer, lambda _, factor: factor.sharding, abstract, adapted.adapters,
        transform_non_params=lambda _: None,
    )  # fmt: skip
    compiled: Any = jax.jit(optimizer.init, out_shardings=places)(adapted.adapters)
    for found in (state, compiled):
        for moments in (found[0].mu, found[0].nu):
            for moment, factor in zip(
                jax.tree.leaves(moments), jax.tree.leaves(adapted.adapters), strict=True
            ):
                assert moment.sharding.is_equivalent_to(factor.sharding, factor.ndim)


def test_names_of_boxes_give_the_shardings_of_factors():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    boxed = {
        "embed": {"embedding": nn.LogicallyPartitioned(params()["embed"]["embedding"], ("v", "e"))},
        "dense": {"kernel": nn.Partitioned(params()["dense"]["kernel"], (None, "x"))},
    }
    adapted = tied_lora.wrap(boxed, CONFIG)
    logical = nn.get_partition_spec(adapted.adapters)["lora"]
    rules = [("v", "x"), ("e", "y")]
    table = spmd.logical_to_mesh_sharding(logical["embed/embedding"], mesh, rules)
    assert {k: s.spec for k, s in table.items()} == {
        "lora_a": jax.P("x", None), "lora_b": jax.P(None, "y")
    }  # fmt: skip
    assert logical["dense/kernel"] == {"lora_a": jax.P(None, None), "lora_b": jax.P(None, "x")}
