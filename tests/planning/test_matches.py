"""How a target names a tie group: its end, its layers, its parts."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora


def test_modules_to_save_means_every_module_that_ends_so():
    """As ``str.endswith`` in PEFT: "norm" is "input_layernorm", too."""
    names = ["input_layernorm", "norm", "norms"]
    params = {"layers": {name: {"scale": jnp.ones(4)} for name in names}}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(modules_to_save=["norm"]))
    expected = {"layers/input_layernorm/scale", "layers/norm/scale"}
    assert set(adapted.adapters["modules_to_save"]) == expected
    with pytest.raises(ValueError, match="modules_to_save='form' names no leaf"):
        tied_lora.wrap(params, tied_lora.LoraConfig(modules_to_save=["form"]))
