"""Checkpoints of every kind of adapter: all collections, separate ones, boxed and sharded ones."""

from __future__ import annotations

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from flax_tied_lora.checkpoint import CheckpointError
from tests.helpers.small_models import TOKENS, TiedLM, init, randomised, wrapped

PARAMS = {**init(TiedLM()), "norm": {"scale": jnp.ones(8)}}
OPTIMIZER = optax.adamw(0.1)
CONFIGS = {
    "all collections": {
        "targets": ["up"], "modules_to_save": ["norm"], "trainable_token_indices": [3, 11],
        "bias": "all",
    },
    "rows and factors of a table": {
        "targets": ["embed_tokens"], "trainable_token_indices": [3, 11],
    },
    "dora": {"targets": ["embed_tokens", "up"], "use_dora": True},
    "copies only": {"targets": None, "modules_to_save": ["embed_tokens", "up"]},
    "rows only": {"targets": None, "trainable_token_indices": [0]},
}  # fmt: skip


def adapted(name, params=PARAMS):
    return wrapped(params, **CONFIGS[name])


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(tmp_path, name):
    own = adapted(name)
    state = randomised(OPTIMIZER.init(own.adapters), 5)
    checkpoint.save(tmp_path / "a", own, opt_state=state, step=7)
    restored = checkpoint.restore(tmp_path / "a", PARAMS, opt_state=OPTIMIZER)
    assert restored.adapted.plan is own.plan
    same(restored.adapted, own)
    same(restored.opt_state, state)


def test_collections_of_the_first():
    assert set(adapted("all collections").adapters) == {
        "lora", "modules_to_save", "trainable_tokens", "bias"
    }  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_dtypes_are_kept(tmp_path, name):
    own = adapted(name)
    own = own.replace(adapters=jax.tree.map(lambda x: x.astype(jnp.bfloat16), own.adapters))
    checkpoint.save(tmp_path / "a", own)
    same(checkpoint.restore(tmp_path / "a", PARAMS).adapted, own)


@pytest.mark.parametrize("name", CONFIGS)
def test_variables_round_trip(name):
    own = adapted(name)
    again = tied_lora.Adapted.from_variables(own.variables(), own.plan)
    same(again, own)


def test_separate_adapters(tmp_path):
    params = init(TiedLM())

    def fn(params, tokens):
        return TiedLM().apply({"params": params}, tokens)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tied_lora.WeightTyingWarning)
        own = wrapped(
            params, ["embed_tokens"], modules_to_save=["lm_head"], ensure_weight_tying=False,
            sites=tied_lora.trace(fn, params, TOKENS),
        )  # fmt: skip
    checkpoint.save(tmp_path / "a", own)
    restored = checkpoint.restore(tmp_path / "a", params).adapted
    assert restored.plan is own.plan
    same(restored, own)


@pytest.mark.parametrize("sharding", ["mesh", "one for all", "a tree"])
@pytest.mark.parametrize("name", ["all collections", "dora"])
def test_placed_elsewhere(tmp_path, name, sharding):
    own = adapted(name)
    checkpoint.save(tmp_path / "a", own)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P())
    how = {
        "mesh": mesh,
        "one for all": place,
        "a tree": jax.tree.map(lambda _: place, own.adapters),
    }
    restored = checkpoint.restore(tmp_path / "a", PARAMS, sharding=how[sharding]).adapted
    same(restored, own)
    if sharding != "mesh":
        assert {x.sharding for x in jax.tree.leaves(restored.adapters)} == {place}


def test_like_a_sharded_and_boxed_leaf(tmp_path):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def boxed(path, leaf):
        names = ("x",) + (None,) * (leaf.ndim - 1)
        leaf = jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*names)))
        return nn.Partitioned(leaf, names=names)

    params = jax.tree_util.tree_map_with_path(boxed, PARAMS)
    config = tied_lora.LoraConfig(
        r=2, target_modules=["up"], modules_to_save=["norm"], trainable_token_indices=[3, 11],
        bias="all",
    )  # fmt: skip
    own = tied_lora.wrap(params, config)
    rows = own.adapters["trainable_tokens"]["embed_tokens/embedding"]
    copy = own.adapters["modules_to_save"]["norm/scale"]
    assert (rows.names, copy.names) == ((None, None), ("x",))
    assert own.adapters["bias"]["up/bias"].names == ("x",)
    checkpoint.save(tmp_path / "a", own)
    restored = checkpoint.restore(tmp_path / "a", params).adapted
    same(restored, own)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(own), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {k: v for k, v in a.items() if k != "bias"}, "expected a collection 'bias'"),
        (lambda a: {**a, "bias": {}}, "in 'bias' missing 'up/bias'"),
        (lambda a: {**a, "modules_to_save": {"x": jnp.ones(3)}}, "unknown 'x'"),
        (lambda a: {**a, "bias": {"up/bias": jnp.ones(3)}},
         r"bias of 'up/bias' is float32\[3\]; the plan has \[8\]"),
        (lambda a: {**a, "trainable_tokens": {"embed_tokens/embedding": jnp.ones((3, 8))}},
         r"trainable_tokens of 'embed_tokens/embedding' is float32\[3, 8\]; the plan has \[2, 8\]"),
        (lambda a: {**a, "trainable_tokens": [1]}, "'trainable_tokens' is a list; expected a dict"),
    ],
)  # fmt: skip
def test_adapters_that_are_not_the_plans(change, message):
    own = adapted("all collections")
    with pytest.raises(ValueError, match=message):
        own.replace(adapters=change(own.adapters))


def test_a_collection_that_the_plan_knows_and_has_not():
    own = adapted("rows only")
    own.replace(adapters={**own.adapters, "mine": {"x": jnp.ones(3)}, "bias": {}})
    with pytest.raises(ValueError, match="in 'bias' unknown 'up/bias'"):
        own.replace(adapters={**own.adapters, "bias": {"up/bias": jnp.ones(8)}})


def test_another_base_is_refused(tmp_path):
    checkpoint.save(tmp_path / "a", adapted("all collections"))
    other = {**PARAMS, "norm": {"scale": jnp.full(8, 2.0)}}
    with pytest.raises(CheckpointError, match="'norm/scale' has other values"):
        checkpoint.restore(tmp_path / "a", other)
