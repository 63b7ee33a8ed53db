"""How a target names a tie group: its end, its layers, its parts."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._planning.matches import adaptable, excluded, numbered, stacked_hint


def test_modules_to_save_means_every_module_that_ends_so():
    """As ``str.endswith`` in PEFT: "norm" is "input_layernorm", too."""
    names = ["input_layernorm", "norm", "norms"]
    params = {"layers": {name: {"scale": jnp.ones(4)} for name in names}}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(modules_to_save=["norm"]))
    expected = {"layers/input_layernorm/scale", "layers/norm/scale"}
    assert set(adapted.adapters["modules_to_save"]) == expected
    with pytest.raises(ValueError, match="modules_to_save='form' names no leaf"):
        tied_lora.wrap(params, tied_lora.LoraConfig(modules_to_save=["form"]))


def test_what_can_have_factors():
    shapes = {"a": (4, 6), "b": (4,), "c": ()}
    assert [n for n, s in shapes.items() if adaptable(jnp.ones(s))] == ["a"]
    assert not adaptable(jnp.ones((4, 6), jnp.int32))
    assert not adaptable(None)


def test_what_is_left_out():
    config = tied_lora.LoraConfig(r=2, target_modules=["up"], exclude_modules=["norm", "layers.0"])
    assert excluded(config, "body/norm")
    assert excluded(config, "other", "body/layers/0")
    assert not excluded(config, "body/layers/10", "body/normal")
    assert not excluded(tied_lora.LoraConfig(r=2, target_modules=["up"]), "body/norm")


def test_names_that_the_layers_of_a_stacked_leaf_would_have():
    names = set(numbered("model/layers/block/q", (2, 4, 6)))
    assert {"model/layers/0/block/q", "model/layers_1/block/q", "model/layers/1/q"} <= names
    assert not any("/2" in name for name in names)
    assert list(numbered("model/layers/q", (4, 6))) == []
    assert list(numbered("model/layers/0/q", (2, 4, 6))) == []


def test_a_layer_of_a_stacked_leaf_is_said_how_to_be_named():
    leaves = {"model/layers/q/kernel": jnp.ones((2, 4, 6)), "model/layers/q/bias": jnp.ones((2, 6))}
    config = tied_lora.LoraConfig(r=2, target_modules=["layers.1.q"])
    hint = stacked_hint(config, "layers.1.q", ["layers.1.q"], leaves)
    assert "'model/layers/q/kernel' float32[2, 4, 6] may hold several layers" in hint
    assert 'parts={"q": (0, {"first": 1, "rest": 1})}' in hint
    assert stacked_hint(config, "k", ["k"], leaves) == ""
