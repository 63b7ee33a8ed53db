"""`grow_vocabulary` on an `Adapted`, and training with tokens that were added."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from tests.helpers.oracle import array, check, perturbed
from tests.helpers.small_models import wrapped

V, D, N = 12, 8, 15
TABLE = "embed_tokens/embedding"
TOKENS = np.array([[1, 12, 14, 3, 14], [13, 5, 12, 2, 13]], np.int32)


def params(untied: bool = False) -> dict[str, Any]:
    head = {"kernel": array(D, V, seed=3)} if untied else {}
    return {
        "embed_tokens": {"embedding": array(V, D)},
        "up": {"kernel": array(D, D, seed=1)},
        "lm_head": {**head, "bias": array(V, seed=2)},
    }


def model(params: Any, tokens: Any) -> jax.Array:
    table, head = params["embed_tokens"]["embedding"], params["lm_head"]
    x = table[tokens]
    x = x + jnp.tanh(x @ params["up"]["kernel"])
    logits = x @ head["kernel"] if "kernel" in head else x @ table.T
    return logits + head["bias"][None, None, :]


@functools.cache
def sites(untied: bool = False) -> tied_lora.CallSites:
    return tied_lora.trace(model, params(untied), TOKENS % V)


def adapted(untied: bool = False, **fields: Any) -> tied_lora.Adapted:
    targets = fields.pop("targets", ["embed_tokens", "up"])
    return wrapped(params(untied), targets, sites=sites(untied), **fields)


def leaf_of(own: tied_lora.Adapted, path: str) -> Any:
    return functools.reduce(lambda tree, name: tree[name], path.split("/"), own.params)


KINDS: dict[str, dict[str, Any]] = {
    "factors": {},
    "factors and rows": {"trainable_token_indices": [1, 5]},
    "rows": {"targets": ["up"], "trainable_token_indices": [1, 5]},
    "dora": {"use_dora": True},
    "copies": {"targets": ["up"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "a head of its own": {"untied": True, "targets": ["embed_tokens", "lm_head/kernel"]},
    "a head of its own, dora": {"untied": True, "targets": ["lm_head/kernel"], "use_dora": True},
    "biases": {"bias": "all"},
    "separate": {"targets": ["embed_tokens", "lm_head"], "ensure_weight_tying": False},
}


@pytest.mark.filterwarnings("ignore::flax_tied_lora.WeightTyingWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_old_tokens_stay_as_they_are(kind):
    old = adapted(**KINDS[kind])
    new, vocabulary = tied_lora.grow_vocabulary(old, N, pad_to_multiple_of=8)
    assert isinstance(new, tied_lora.Adapted)
    assert vocabulary.size == 16
    tokens = TOKENS % V
    expected = tied_lora.adapt(model)(old, tokens)
    found = tied_lora.adapt(model)(new, tokens)
    np.testing.assert_allclose(found[..., :V], expected, rtol=2e-5, atol=2e-5)
    assert new.params["embed_tokens"]["embedding"].shape == (16, D)
    assert all(g.shape == leaf_of(new, g.key).shape for g in new.plan.groups)
    assert new.plan is tied_lora.Plan.from_json(new.plan.to_json())
    assert new.replace(adapters=new.adapters).plan is new.plan  # of the plan's shapes
    if kind not in ("dora", "separate"):  # DoRA scales whole columns
        # New tokens start as the base has them, whatever the adapters have learned.
        table, merged = (
            f(new)["embed_tokens"]["embedding"] for f in (tied_lora.base, tied_lora.merge)
        )
        np.testing.assert_array_equal(merged[V:], table[V:])


@pytest.mark.parametrize("kind", ["dora", "a head of its own, dora"])
def test_the_oracle_after_growth(kind):
    new, _ = tied_lora.grow_vocabulary(adapted(**KINDS[kind]), N)
    check(model, perturbed(new), TOKENS)


def test_new_rows_of_factors_are_zeros_and_learn():
    new, _ = tied_lora.grow_vocabulary(adapted(), N)
    pair = new.adapters["lora"][TABLE]
    assert jnp.all(pair["lora_a"][V:] == 0)
    grads = GRADIENTS(new.adapters, new)[1]["lora"][TABLE]
    assert jnp.all(jnp.any(grads["lora_a"][V:] != 0, axis=1))


def test_boxes_shards_shapes_and_stacks():
    mesh = jax.make_mesh((4,), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    sharded = params()
    sharded["embed_tokens"] = {
        "embedding": nn.Partitioned(jax.device_put(array(V, D), sharding), names=("x", None))
    }
    new, _ = tied_lora.grow_vocabulary(wrapped(sharded, ["embed_tokens"]), 16)
    factor = new.adapters["lora"][TABLE]["lora_a"]
    assert isinstance(factor, nn.Partitioned)
    assert factor.names == ("x", None)
    assert factor.value.shape == (16, 2)
    assert new.params["embed_tokens"]["embedding"].value.sharding.is_equivalent_to(sharding, 2)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), adapted(use_dora=True))
    new, _ = tied_lora.grow_vocabulary(shapes, N)
    assert {n: x.shape for n, x in new.adapters["lora"][TABLE].items()} == {
        "lora_a": (N, 2), "lora_b": (2, D), "lora_magnitude": (D,),
    }  # fmt: skip

    one = adapted()
    stacked = tied_lora.stack([one, one])
    with pytest.raises(ValueError, match="stacked adapters are grown one by one"):
        tied_lora.grow_vocabulary(stacked, N)


def loss(adapters: Any, own: tied_lora.Adapted) -> jax.Array:
    logits = tied_lora.adapt(model, on_dense="error")(
        own.replace(adapters=adapters), TOKENS[:, :-1]
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()


# One compiled function for all tests: compiling is what takes their time.
GRADIENTS = jax.jit(jax.value_and_grad(loss))
NEW = list(range(V, N))
TRAINED: dict[str, dict[str, Any]] = {
    "only new rows": {"target_modules": [], "trainable_token_indices": NEW},
    "new rows, and factors of the whole table": {
        "target_modules": ["embed_tokens"], "trainable_token_indices": NEW,
    },
    "factors, and new rows frozen": {"target_modules": ["up", "embed_tokens"]},
}  # fmt: skip


@pytest.mark.parametrize("what", TRAINED)
def test_training(what):
    grown, vocabulary = tied_lora.grow_vocabulary(params(), N)
    assert list(vocabulary.new_tokens) == NEW
    config = tied_lora.LoraConfig(r=2, lora_alpha=4, **TRAINED[what])
    own = tied_lora.wrap(grown, config, sites=sites())
    if what == "new rows, and factors of the whole table":
        check(model, perturbed(own), TOKENS)

    adapters, losses = own.adapters, []
    for _ in range(40):
        value, grads = GRADIENTS(adapters, own)
        adapters = jax.tree.map(lambda x, g: x - 0.05 * g, adapters, grads)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]

    # The tie holds: what is looked up and what is projected with are one array, the merged one.
    trained = own.replace(adapters=adapters)
    table = tied_lora.merge(trained)["embed_tokens"]["embedding"]
    expected = model(tied_lora.merge(trained), TOKENS)
    np.testing.assert_allclose(tied_lora.adapt(model)(trained, TOKENS), expected, atol=1e-4)
    if what == "only new rows":
        np.testing.assert_array_equal(table[:V], params()["embed_tokens"]["embedding"])
        assert not jnp.allclose(table[V:], grown["embed_tokens"]["embedding"][V:], atol=1e-2)


def test_the_gradient_of_new_rows_is_the_sum_of_both_uses():
    grown, _ = tied_lora.grow_vocabulary(params(), N)
    config = tied_lora.LoraConfig(trainable_token_indices=NEW)
    own = tied_lora.wrap(grown, config, sites=sites())

    def both(lookup: Any, projection: Any) -> jax.Array:
        x = lookup[TOKENS[:, :-1]]
        x = x + jnp.tanh(x @ grown["up"]["kernel"])
        logits = x @ projection.T + grown["lm_head"]["bias"][None, None, :]
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    table = grown["embed_tokens"]["embedding"]
    first, second = jax.jit(jax.grad(both, argnums=(0, 1)))(table, table)
    found = GRADIENTS(own.adapters, own)[1]["trainable_tokens"][TABLE]
    assert jnp.all(jnp.any(first[V:] != 0, axis=1))
    assert jnp.all(jnp.any(second[V:] != 0, axis=1))
    np.testing.assert_allclose(found, (first + second)[V:], rtol=1e-4, atol=1e-6)


def test_checkpoints_are_for_the_grown_base(tmp_path):
    table = array(V, D)
    old = {"embed_tokens": {"embedding": table}, "lm_head": {"kernel": table.T}}
    ties = [(TABLE, "lm_head/kernel")]
    grown, _ = tied_lora.grow_vocabulary(old, N, ties=ties)
    config = tied_lora.LoraConfig(r=2, target_modules=["embed_tokens"])
    own = perturbed(tied_lora.wrap(grown, config, ties=ties))
    checkpoint.save(tmp_path / "a", own)
    restored = checkpoint.restore(tmp_path / "a", grown).adapted
    assert restored.plan is own.plan
    merged = tied_lora.merge(restored)
    np.testing.assert_array_equal(
        merged["lm_head"]["kernel"], merged["embed_tokens"]["embedding"].T
    )
    with pytest.raises(checkpoint.CheckpointError, match="embed_tokens/embedding"):
        checkpoint.restore(tmp_path / "a", old)
    # Where an adapter was trained before tokens came: restored on the old base, then grown.
    before = perturbed(tied_lora.wrap(old, config, ties=ties))
    checkpoint.save(tmp_path / "b", before)
    later, _ = tied_lora.grow_vocabulary(checkpoint.restore(tmp_path / "b", old).adapted, N)
    np.testing.assert_allclose(
        tied_lora.merge(later)["lm_head"]["kernel"][:, :V],
        tied_lora.merge(before)["lm_head"]["kernel"],
        atol=1e-6,
    )
