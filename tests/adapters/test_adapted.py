"""Adapted: a pytree; merge, base, variables, stacking; the printed table."""

from __future__ import annotations

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import Adapted, LoraConfig
from tests.helpers import one_kernel
from tests.helpers.small_models import LAYERS, TOKENS, StackedLM, TiedLM, init, randomised, wrapped

TABLE, HEAD = "embed_tokens/embedding", "lm_head/kernel"
PARAMS = init(TiedLM())
W = PARAMS["embed_tokens"]["embedding"]


def delta(adapted, key, spec="ar,rb->ab"):
    pair = adapted.adapters["lora"][key]
    product = np.einsum(spec, *(np.asarray(pair[n], np.float64) for n in ("lora_a", "lora_b")))
    return float(adapted.scaling[key]) * product


def tied_params():
    return {"embed_tokens": {"embedding": W}, "lm_head": {"kernel": W}, "tail": {"kernel": W.T}}


def tied(**options):
    ties = [(TABLE, "tail/kernel")]
    return wrapped(tied_params(), ["embed_tokens"], ties=ties, **options)


# As a pytree


def test_is_a_pytree_of_its_arrays():
    adapted = wrapped(PARAMS, ["embed_tokens", "up"])
    leaves, treedef = jax.tree.flatten(adapted)
    assert len(leaves) == 3 + 4 + 2
    assert jax.tree.unflatten(treedef, leaves).plan is adapted.plan
    doubled = jax.tree.map(lambda x: 2 * x, adapted)
    assert isinstance(doubled, Adapted)
    assert float(doubled.scaling[TABLE]) == 2 * float(adapted.scaling[TABLE])
    assert hash(treedef) == hash(jax.tree.structure(doubled))


def test_passes_through_jit_and_copies():
    adapted = tied()
    for again in (jax.jit(lambda a: a)(adapted), copy.deepcopy(adapted),
                  pickle.loads(pickle.dumps(adapted))):  # fmt: skip
        assert again.plan is adapted.plan
        chex.assert_trees_all_equal(again, adapted)


def test_replace_and_train():
    adapted = wrapped(PARAMS, ["up"])
    other = adapted.replace(adapters=randomised(adapted.adapters, 9))
    assert other.params is adapted.params
    assert other.plan is adapted.plan
    key = jax.random.key(1)
    training = adapted.train(key)
    assert training.rng is key
    assert training.eval().rng is None
    assert adapted.rng is None
    raw = adapted.train(jax.random.PRNGKey(1)).rng
    assert jax.random.key_data(raw).tolist() == jax.random.key_data(key).tolist()


# merge


def test_merge_adds_each_delta_once():
    adapted = tied()
    merged = tied_lora.merge(adapted)
    expected = np.asarray(W, np.float64) + delta(adapted, TABLE)
    got = np.float64(merged["embed_tokens"]["embedding"])
    chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-6)
    assert merged["embed_tokens"]["embedding"] is merged["lm_head"]["kernel"]
    chex.assert_trees_all_equal(merged["tail"]["kernel"], merged["lm_head"]["kernel"].T)
    assert jax.tree.structure(merged) == jax.tree.structure(tied_params())


def test_merge_leaves_the_adapted_alone_and_can_be_wrapped_again():
    adapted = tied()
    before = jax.tree.leaves(adapted)
    merged = tied_lora.merge(adapted)
    assert all(a is b for a, b in zip(jax.tree.leaves(adapted), before, strict=True))
    again = tied_lora.wrap(merged, LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert [m.path for m in again.plan.adapted[0].members] == [TABLE, HEAD]


def test_merge_of_stacked_layers_and_heads():
    model = StackedLM()
    params = init(model)
    sites = tied_lora.trace(model.apply, {"params": params}, TOKENS)
    adapted = wrapped(params, ["q_proj", "o_proj"], sites=sites)
    merged = tied_lora.merge(adapted)["layers"]["layer"]
    for name, spec in (("q_proj", "lar,lrhk->lahk"), ("o_proj", "lhkr,lrb->lhkb")):
        expected = delta(adapted, f"layers/layer/{name}/kernel", spec)
        expected += np.asarray(params["layers"]["layer"][name]["kernel"])
        assert expected.shape[0] == LAYERS
        chex.assert_trees_all_close(
            np.float64(merged[name]["kernel"]), expected, rtol=1e-5, atol=1e-6
        )


def test_merge_in_bfloat16_rounds_once():
    params = {"w": jnp.asarray(W, jnp.bfloat16)}
    adapted = wrapped(params, ["w"])
    exact = np.asarray(params["w"], np.float64) + delta(adapted, "w")
    merged = tied_lora.merge(adapted)["w"]
    assert merged.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(merged, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))
    wide = tied_lora.merge(adapted, dtype=jnp.float32)["w"]
    assert wide.dtype == jnp.float32
    chex.assert_trees_all_close(np.float64(wide), exact, rtol=1e-6, atol=1e-6)


def test_merge_to_another_dtype_keeps_the_ties():
    merged = tied_lora.merge(tied(), dtype="bfloat16")
    assert merged["lm_head"]["kernel"] is merged["embed_tokens"]["embedding"]
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_merge_under_jit_and_without_deltas():
    adapted = tied()
    inside = jax.jit(tied_lora.merge)(adapted)
    chex.assert_trees_all_close(inside, tied_lora.merge(adapted), rtol=1e-6, atol=1e-6)
    fresh = tied_lora.wrap(PARAMS, LoraConfig(r=2, target_modules=["embed_tokens", "up"]))
    chex.assert_trees_all_equal(tied_lora.merge(fresh), PARAMS)


def test_merge_ignores_dropout():
    adapted = wrapped(PARAMS, ["up"], lora_dropout=0.5)
    training = adapted.train(jax.random.key(0))
    chex.assert_trees_all_equal(tied_lora.merge(training), tied_lora.merge(adapted))


# base


def test_base_copies_nothing():
    params = tied_params()
    base = tied_lora.base(wrapped(params, ["embed_tokens"], ties=[(TABLE, "tail/kernel")]))
    assert base["embed_tokens"]["embedding"] is base["lm_head"]["kernel"] is W
    chex.assert_trees_all_equal(base, params)
    plain = tied_lora.base(wrapped(PARAMS, ["up"]))
    same = zip(jax.tree.leaves(plain), jax.tree.leaves(PARAMS), strict=True)
    assert all(a is b for a, b in same)


def test_base_of_shapes():
    shapes = jax.eval_shape(tied_params)
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    ties = [(TABLE, HEAD), (TABLE, "tail/kernel")]
    base = tied_lora.base(tied_lora.wrap(shapes, config, ties=ties))
    chex.assert_trees_all_equal_shapes_and_dtypes(base, shapes)


# variables


def test_variables_round_trip():
    adapted = tied()
    variables = adapted.variables()
    assert set(variables) == {"params", "lora", "lora_scaling"}
    again = Adapted.from_variables(variables, adapted.plan)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (again, adapted)), strict=True))


# stacking


def test_stack():
    one, two = (wrapped(PARAMS, ["embed_tokens", "up"], seed=s) for s in (1, 2))
    stacked = tied_lora.stack([one, two])
    assert stacked.params is one.params
    assert stacked.scaling[TABLE].shape == (2,)
    assert stacked.adapters["lora"][TABLE]["lora_a"].shape == (2, 12, 2)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], stacked.adapters), two.adapters)
    axes = tied_lora.adapter_axes(stacked)
    assert (axes.params, axes.adapters, axes.scaling, axes.rng) == (None, 0, 0, None)


# printing


def test_prints_each_parameter_once():
    lines = str(tied()).splitlines()
    assert lines[0].split("  ")[0] == "group"
    assert lines[2].split() == [
        "embed_tokens/embedding", "lm_head/kernel,", "tail/kernel", "(transposed)", "same",
        "array,", "declared", "12", "x", "8", "LoRA,", "rank", "2", "40",
    ]  # fmt: skip
    assert lines[-1] == "trainable: 40 of 136 parameters (29.41 %)"


def test_prints_thousands_and_untied_groups():
    params = {"up": {"kernel": jnp.ones((1000, 50))}, "norm": {"scale": jnp.ones(7)}}
    text = str(tied_lora.wrap(params, LoraConfig(r=4, target_modules=["up"])))
    assert text.splitlines()[0].split()[-2] == "adapter"
    assert text.splitlines()[2].split() == [
        "up/kernel", "-", "-", "1000", "x", "50", "LoRA,", "rank", "4", "4,200"
    ]  # fmt: skip
    assert text.splitlines()[-1] == "trainable: 4,200 of 54,207 parameters (7.75 %)"


@pytest.mark.parametrize("abstract", [False, True])
def test_prints_shapes_as_it_prints_arrays(abstract):
    params = jax.eval_shape(lambda: PARAMS) if abstract else PARAMS
    adapted = tied_lora.wrap(params, LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert "trainable: 40 of 208 parameters" in str(adapted)
    assert repr(adapted) == "Adapted(1 groups adapted, rank 2)"


def test_factors_of_another_shape_are_refused():
    adapted = one_kernel.wrapped()
    pair = adapted.adapters["lora"]["dense/kernel"]
    for name, bad in {"lora_a": jnp.ones((7, 2)), "lora_b": jnp.ones((3, 4))}.items():
        adapters = {"lora": {"dense/kernel": {**pair, name: bad}}}
        with pytest.raises(ValueError, match=rf"Adapted.replace: {name} of 'dense/kernel' is flo"):
            adapted.replace(adapters=adapters)
