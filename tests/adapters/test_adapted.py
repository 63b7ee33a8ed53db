"""Adapted: a pytree; its variables, stacked ones, and the printed table."""

from __future__ import annotations

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import PLACEHOLDER

import flax_tied_lora as tied_lora
from flax_tied_lora import Adapted, LoraConfig
from tests.helpers import one_kernel
from tests.helpers.small_models import TiedLM, init, randomised, wrapped

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


def test_orbaxs_placeholders_stand_for_arrays():
    params = {"up": {"kernel": jnp.ones((4, 4))}}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(r=2, target_modules=["up"]))
    empty = adapted.replace(adapters=jax.tree.map(lambda _: PLACEHOLDER, adapted.adapters))
    assert "up/kernel" in str(empty)
    assert empty.replace(adapters=adapted.adapters).adapters is adapted.adapters
    params = jax.tree.map(lambda _: PLACEHOLDER, adapted.params)
    assert "up/kernel" in str(adapted.replace(params=params))
