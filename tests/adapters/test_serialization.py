"""`flax.serialization` of what this library puts into params: state dicts and bytes, and back."""

from __future__ import annotations

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import Adapted, LoraConfig, TiedLeaf

TABLE = jax.random.normal(jax.random.key(0), (16, 4))
PARAMS = {"embed": {"embedding": TABLE}, "head": {"kernel": TABLE.T}, "up": {"kernel": TABLE.T}}
TIES = [("embed/embedding", "head/kernel")]


def wrapped(r=2, seed=0, **options):
    config = LoraConfig(r=r, target_modules=["embed", "up"], **options)
    adapted = tied_lora.wrap(PARAMS, config, ties=TIES)
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(adapted.adapters)))
    leaves, treedef = jax.tree.flatten(adapted.adapters)
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return adapted.replace(adapters=jax.tree.unflatten(treedef, drawn))


def same(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_adapted_comes_back_from_its_bytes():
    adapted, fresh = wrapped(seed=1), wrapped(seed=2)
    back = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(adapted))
    assert isinstance(back, Adapted)
    assert back.plan is adapted.plan
    same(back, adapted)
    same(tied_lora.merge(back), tied_lora.merge(adapted))
    state = flax.serialization.to_state_dict(adapted)
    assert set(state) == {"params", "adapters", "scaling", "rng", "slot"}
    assert state["params"]["head"]["kernel"] == {"tied_to": "embed/embedding", "transposed": True}


def test_dropout_and_a_slot_come_back():
    adapted = wrapped(lora_dropout=0.5).train(jax.random.key(7))
    back = flax.serialization.from_bytes(wrapped(), flax.serialization.to_bytes(adapted))
    assert jnp.array_equal(jax.random.key_data(back.rng), jax.random.key_data(adapted.rng))
    stacked = tied_lora.select(tied_lora.stack([wrapped(seed=1), wrapped(seed=2)]), 1)
    back = flax.serialization.from_bytes(stacked, flax.serialization.to_bytes(stacked))
    assert int(back.slot) == 1
    same(back.adapters, stacked.adapters)


def test_collections_with_a_declared_tie_come_back():
    variables = wrapped(seed=1).variables()
    data = flax.serialization.to_bytes(variables)
    back = flax.serialization.from_bytes(wrapped(seed=2).variables(), data)
    assert back["params"]["head"]["kernel"] == TiedLeaf("embed/embedding", True)
    same(back, variables)


@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_a_quantised_base_comes_back(qtype):
    params = {"up": {"kernel": jnp.ones((32, 32))}}
    config = LoraConfig(r=2, target_modules=["up"])
    adapted = tied_lora.wrap(tied_lora.quantize(params, qtype), config)
    back = flax.serialization.from_bytes(adapted, flax.serialization.to_bytes(adapted))
    same(tied_lora.merge(back), tied_lora.merge(adapted))
    other = tied_lora.wrap(tied_lora.quantize(params, qtype, block_size=16), config)
    plain = flax.serialization.to_state_dict(tied_lora.wrap(params, config))
    with pytest.raises(ValueError, match="for QuantizedArray; expected a dict with values"):
        flax.serialization.from_state_dict(other, plain)


def test_what_is_not_the_targets_is_refused():
    adapted = wrapped()
    state = flax.serialization.to_state_dict(adapted)
    with pytest.raises(ValueError, match="found 'anything' for Adapted; expected a dict with para"):
        flax.serialization.from_state_dict(adapted, "anything")
    with pytest.raises(ValueError, match=r"lora_a of '.*' is float32\[16, 3\]; the plan has \[16"):
        flax.serialization.from_state_dict(adapted, flax.serialization.to_state_dict(wrapped(3)))
    untied = state | {"params": {**state["params"], "head": {"kernel": TABLE.T}}}
    with pytest.raises(ValueError, match=r"found float32\[4, 16\] where the target has TiedLeaf"):
        flax.serialization.from_state_dict(adapted, untied)
    scaling = {key: jnp.ones(3) for key in adapted.scaling}
    with pytest.raises(ValueError, match="the scaling of"):
        flax.serialization.from_state_dict(adapted, state | {"scaling": scaling})
