"""wrap: containers, abstract params, boxes, shardings, initial factors, repaired ties."""

from __future__ import annotations

import dataclasses
import gc
import time

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig, TiedLeaf
from tests.helpers.small_models import TOKENS, StackedLM, TiedLM, init, randomised

TABLE = "embed_tokens/embedding"
CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens", "up"])
PARAMS = init(TiedLM())


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    kernel: jax.Array
    bias: jax.Array


def shapes_of(adapted):
    pairs = adapted.adapters["lora"].items()
    return {key: (p["lora_a"].shape, p["lora_b"].shape) for key, p in pairs}


# Containers


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed_tokens = nnx.Embed(12, 8, rngs=rngs)
        self.up = nnx.Linear(8, 8, rngs=rngs)


@pytest.mark.parametrize(
    "params",
    [
        PARAMS,
        FrozenDict(PARAMS),
        nnx.split(Net(nnx.Rngs(0)))[1],
        {**PARAMS, "up": Dense(PARAMS["up"]["kernel"], PARAMS["up"]["bias"])},
        jax.tree.map(np.asarray, PARAMS),
    ],
    ids=["dict", "FrozenDict", "nnx.State", "dataclass", "numpy"],
)
def test_containers(params):
    adapted = tied_lora.wrap(params, CONFIG)
    assert shapes_of(adapted) == {TABLE: ((12, 2), (2, 8)), "up/kernel": ((8, 2), (2, 8))}
    assert jax.tree.structure(adapted.params) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(adapted.params), jax.tree.leaves(params), strict=True)
    assert all(a is b for a, b in pairs)
    assert isinstance(adapted.params, type(params))


def test_lists_and_tuples():
    w = jnp.ones((8, 4))
    params = {"layers": [{"w": w}, (w + 1, {"w": w + 2})]}
    adapted = tied_lora.wrap(params, LoraConfig(r=2, target_modules=["w", "layers.1.0"]))
    assert set(adapted.adapters["lora"]) == {"layers/0/w", "layers/1/0", "layers/1/1/w"}
    config = LoraConfig(r=2, target_modules=["w"], layers_to_transform=[1])
    assert set(tied_lora.wrap(params, config).adapters["lora"]) == {"layers/1/1/w"}


def test_the_structure_of_the_result():
    adapted = tied_lora.wrap(PARAMS, CONFIG)
    assert set(adapted.adapters) == {"lora"}
    assert adapted.rng is None
    assert {k: float(v) for k, v in adapted.scaling.items()} == {TABLE: 2.0, "up/kernel": 2.0}
    assert {x.dtype for x in jax.tree.leaves((adapted.adapters, adapted.scaling))} == {
        jnp.dtype("float32")
    }


# Abstract params, and params inside transformations


def test_abstract_params_give_abstract_factors():
    model = StackedLM()
    shapes = jax.eval_shape(lambda: init(model))
    sites = tied_lora.trace(model.apply, {"params": shapes}, TOKENS)
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj", "o_proj"])
    abstract = tied_lora.wrap(shapes, config, sites=sites)
    concrete = tied_lora.wrap(init(model), config, sites=sites)
    assert {type(x) for x in jax.tree.leaves(abstract)} == {jax.ShapeDtypeStruct}
    assert abstract.plan is concrete.plan
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, concrete)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: lambda p: jax.eval_shape(f, p)])
def test_inside_jit_and_eval_shape(transform):
    params = {"embed_tokens": {"embedding": PARAMS[TABLE.split("/")[0]]["embedding"]}}
    params["lm_head"] = {"kernel": params["embed_tokens"]["embedding"]}
    ties = tied_lora.find_ties(params)
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    outside = tied_lora.wrap(params, config)
    inside = transform(lambda p: tied_lora.wrap(p, config, ties=ties))(params)
    assert inside.plan.groups == outside.plan.groups
    assert len(jax.tree.leaves(inside.params)) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(inside, outside)
    if transform is jax.jit:
        chex.assert_trees_all_close(inside.adapters, outside.adapters, rtol=1e-6)


# Ranks and scalings


def test_patterns():
    params = {
        f"layers_{i}": {n: {"kernel": jnp.ones((16, 16))} for n in ("q", "v")} for i in range(2)
    }
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q", "v"],
        rank_pattern={"layers_0.q": 2, "v": 8}, alpha_pattern={"layers_1/v": 24},
    )  # fmt: skip
    adapted = tied_lora.wrap(params, config)
    ranks = {a.key: a.rank for _, a in adapted.plan.adapters()}
    assert ranks == {
        "layers_0/q/kernel": 2, "layers_0/v/kernel": 8, "layers_1/q/kernel": 4,
        "layers_1/v/kernel": 8,
    }  # fmt: skip
    scaling = {k: float(v) for k, v in adapted.scaling.items()}
    assert scaling == {
        "layers_0/q/kernel": 4.0, "layers_0/v/kernel": 1.0, "layers_1/q/kernel": 2.0,
        "layers_1/v/kernel": 3.0,
    }  # fmt: skip


def test_rslora():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["up"], use_rslora=True)
    assert float(tied_lora.wrap(PARAMS, config).scaling["up/kernel"]) == 4.0


# Repaired ties


@pytest.mark.parametrize(
    "head", [jax.ShapeDtypeStruct((8, 12), jnp.float32), jnp.full((8, 12), 7.0)],
    ids=["placeholder", "random"],
)  # fmt: skip
def test_a_lost_tie_is_repaired(head):
    class Untied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(12, 8, name="embed_tokens")(tokens)
            return nn.Dense(12, use_bias=False, name="lm_head")(x)

    model, table = Untied(), PARAMS["embed_tokens"]["embedding"]
    params = {"embed_tokens": {"embedding": table}, "lm_head": {"kernel": head}}
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    adapted = tied_lora.wrap(params, config, ties=[(TABLE, "lm_head/kernel")])
    assert params["lm_head"]["kernel"] is head
    assert adapted.params["lm_head"]["kernel"] == TiedLeaf(TABLE, True)
    assert [x is table for x in jax.tree.leaves(adapted.params)] == [True]
    adapted = adapted.replace(adapters=randomised(adapted.adapters))
    merged = tied_lora.merge(adapted)
    chex.assert_trees_all_equal(merged["lm_head"]["kernel"], merged["embed_tokens"]["embedding"].T)
    got = tied_lora.adapt(model.apply, on_dense="error")({"params": adapted}, TOKENS)
    chex.assert_trees_all_close(got, model.apply({"params": merged}, TOKENS), rtol=1e-5)
    [(group, adapter)] = adapted.plan.adapters()
    assert group.shapes(adapter) == {"lora_a": (12, 2), "lora_b": (2, 8)}


def test_a_tie_that_is_not_adapted_is_stored_once_too():
    w = jnp.ones((8, 8))
    params = {"a": {"kernel": w}, "b": {"kernel": w}, "up": {"kernel": w + 1}}
    adapted = tied_lora.wrap(params, LoraConfig(r=2, target_modules=["up"]))
    assert adapted.params["b"]["kernel"] == TiedLeaf("a/kernel")
    assert [[a.rank for a in g.adapters] for g in adapted.plan.groups] == [[], [2]]
    base = tied_lora.base(adapted)
    assert base["a"]["kernel"] is base["b"]["kernel"] is w


# Size


def test_ten_thousand_targets():
    w = np.ones((8, 4), np.float32)
    params = {f"layers_{i}": {"w": w.copy()} for i in range(10_000)}
    config = LoraConfig(r=2, target_modules=["w"])
    tied_lora.wrap({"layers_0": params["layers_0"]}, config)
    start = time.thread_time()  # not the wall clock: other tests run beside this one
    adapted = tied_lora.wrap(params, config)
    took = time.thread_time() - start
    assert len(adapted.plan.adapted) == 10_000
    assert took < 6  # one by one they took more than 8 s


def test_warnings_show_the_line_that_wraps():
    """A warning of `wrap` names the caller's file, and the collector runs again afterwards."""
    params = init(TiedLM())
    sites = tied_lora.trace(TiedLM().apply, {"params": params}, TOKENS)
    cases = [
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": False},
        {"target_modules": ["up", "nothing"]},
        {"target_modules": ["up"], "rank_pattern": {"nothing": 3}},
    ]
    for fields in cases:
        config = tied_lora.LoraConfig(r=2, **fields)
        with pytest.warns(
            (tied_lora.UnmatchedTargetWarning, tied_lora.WeightTyingWarning)
        ) as caught:
            tied_lora.wrap(params, config, sites=sites)
        assert [w.filename for w in caught] == [__file__]
    assert gc.isenabled()
