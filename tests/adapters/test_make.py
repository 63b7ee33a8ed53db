"""Factors: boxed and placed like their leaf; what they start with."""

from __future__ import annotations

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig
from tests.helpers.small_models import TiedLM, init, randomised

TABLE = "embed_tokens/embedding"
PARAMS = init(TiedLM())


# Boxes


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_boxes_are_kept_and_factors_get_their_own(box):
    params = {
        "embed_tokens": {"embedding": box(jnp.ones((12, 8)), ("vocab", "embed"))},
        "q_proj": {"kernel": box(jnp.ones((3, 8, 2, 4)), (None, "embed", "heads", "kv"))},
    }

    def fn(p, ids):
        p = meta.unbox(p)
        x = p["embed_tokens"]["embedding"][ids]
        return [jnp.einsum("bd,dhk->bhk", x, w) for w in p["q_proj"]["kernel"]]

    sites = tied_lora.trace(fn, params, jnp.array([1, 2]))
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    adapted = tied_lora.wrap(params, config, sites=sites)
    assert jax.tree.structure(adapted.params) == jax.tree.structure(params)
    names = {
        key: tuple(pair[n].names for n in ("lora_a", "lora_b"))
        for key, pair in adapted.adapters["lora"].items()
    }
    assert names == {
        TABLE: (("vocab", None), (None, "embed")),
        "q_proj/kernel": ((None, "embed", None), (None, None, "heads", "kv")),
    }
    assert {type(x) for p in adapted.adapters["lora"].values() for x in p.values()} == {box}
    randomly = adapted.replace(adapters=randomised(adapted.adapters))
    ids = jnp.array([1, 2])
    chex.assert_trees_all_close(
        tied_lora.adapt(fn)(randomly, ids), fn(tied_lora.merge(randomly), ids), rtol=1e-5
    )
    assert isinstance(tied_lora.merge(randomly)["q_proj"]["kernel"], box)


def test_boxed_leaves_under_linen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            return nn.Dense(4, kernel_init=kernel_init, name="up")(x)

    x = jnp.ones((2, 8))
    params = Model().init(jax.random.key(0), x)["params"]
    adapted = tied_lora.wrap(params, LoraConfig(r=2, target_modules=["up"]))
    adapted = adapted.replace(adapters=randomised(adapted.adapters))
    specs = nn.get_partition_spec(adapted.adapters)["lora"]["up/kernel"]
    assert specs == {"lora_a": jax.P("in", None), "lora_b": jax.P(None, "out")}
    got = tied_lora.adapt(Model().apply)({"params": adapted}, x)
    chex.assert_trees_all_close(
        got, Model().apply({"params": tied_lora.merge(adapted)}, x), rtol=1e-5
    )


# Shardings


def mesh():
    return jax.make_mesh((4, 2), ("rows", "cols"), (jax.sharding.AxisType.Auto,) * 2)


def sharded(spec, shape=(16, 8)):
    return jax.device_put(jnp.ones(shape), jax.NamedSharding(mesh(), spec))


@pytest.mark.parametrize(
    ("spec", "a", "b"),
    [
        (jax.P("rows", "cols"), jax.P("rows", None), jax.P(None, "cols")),
        (jax.P("rows"), jax.P("rows", None), jax.P(None, None)),
        (jax.P(None, ("rows", "cols")), jax.P(None, None), jax.P(None, ("rows", "cols"))),
        (jax.P(), jax.P(None, None), jax.P(None, None)),
    ],
)
def test_factors_are_placed_as_their_leaf(spec, a, b):
    adapted = tied_lora.wrap({"w": sharded(spec)}, LoraConfig(r=2, target_modules=["w"]))
    pair = adapted.adapters["lora"]["w"]
    for factor, expected in ((pair["lora_a"], a), (pair["lora_b"], b)):
        assert factor.sharding.is_equivalent_to(jax.NamedSharding(mesh(), expected), factor.ndim)
    plain = tied_lora.wrap({"w": jnp.ones((16, 8))}, LoraConfig(r=2, target_modules=["w"]))
    chex.assert_trees_all_close(
        jax.device_get(adapted.adapters), jax.device_get(plain.adapters), rtol=1e-6
    )


def test_factors_are_created_straight_into_shards():
    config = LoraConfig(r=2, target_modules=["w"])
    params = {"w": sharded(jax.P("rows", "cols"))}
    abstract = tied_lora.wrap(jax.eval_shape(lambda: params), config)
    assert {x.sharding for x in jax.tree.leaves(abstract.adapters)} == {None}
    shapes = {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=params["w"].sharding)}
    abstract = tied_lora.wrap(shapes, config)
    shardings = jax.tree.map(lambda x: x.sharding, abstract.adapters)
    make = jax.jit(lambda p: tied_lora.wrap(p, config).adapters, out_shardings=shardings)
    made = make(params)
    assert made["lora"]["w"]["lora_a"].sharding.spec == jax.P("rows", None)
    assert made["lora"]["w"]["lora_b"].sharding.spec == jax.P(None, "cols")
    assert made["lora"]["w"]["lora_a"].addressable_shards[0].data.shape == (4, 2)


# Initial factors


def init_of(params, **fields):
    config = LoraConfig(**{"r": 4, "target_modules": ["embed_tokens", "up"], **fields})
    return tied_lora.wrap(params, config, rng=jax.random.key(3)).adapters["lora"]


WIDE = {"embed_tokens": {"embedding": jnp.ones((200, 100))}, "up": {"kernel": jnp.ones((200, 100))}}


def test_a_kernel_starts_like_pefts_linear():
    pair = init_of(WIDE)["up/kernel"]
    bound = 1 / math.sqrt(200)
    assert not pair["lora_b"].any()
    assert float(jnp.abs(pair["lora_a"]).max()) <= bound
    assert float(pair["lora_a"].std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_a_table_starts_like_pefts_embedding():
    pair = init_of(WIDE)[f"{TABLE}"]
    assert not pair["lora_a"].any()
    assert float(pair["lora_b"].std()) == pytest.approx(1, rel=0.15)


def test_gaussian_factors():
    pair = init_of(WIDE, init_lora_weights="gaussian")["up/kernel"]
    assert float(pair["lora_a"].std()) == pytest.approx(1 / 4, rel=0.1)
    assert not pair["lora_b"].any()


def test_no_factor_is_zero_for_debugging():
    factors = init_of(WIDE, init_lora_weights=False)
    assert all(x.std() > 0 for x in jax.tree.leaves(factors))


def test_order_of_targets_never_matters():
    names = ["embed_tokens", "up"]
    first, second = (init_of(PARAMS, target_modules=t, r=2, init_lora_weights=False)
                     for t in (names, names[::-1]))  # fmt: skip
    chex.assert_trees_all_equal(first, second)
    alone = init_of(PARAMS, target_modules=["up"], r=2, init_lora_weights=False)
    chex.assert_trees_all_equal(first["up/kernel"], alone["up/kernel"])


def test_factors_of_different_groups_and_keys_differ():
    params = {"a": {"up": jnp.ones((8, 8))}, "b": {"up": jnp.ones((8, 8))}}
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    lora = tied_lora.wrap(params, config).adapters["lora"]
    other = tied_lora.wrap(params, config, rng=jax.random.key(1)).adapters["lora"]
    arrays = [np.asarray(x["a/up"]["lora_a"]) for x in (lora, other)] + [lora["b/up"]["lora_a"]]
    assert len({a.tobytes() for a in map(np.asarray, arrays)}) == 3
    old = tied_lora.wrap(params, config, rng=jax.random.PRNGKey(0)).adapters["lora"]
    chex.assert_trees_all_equal(lora, old)
