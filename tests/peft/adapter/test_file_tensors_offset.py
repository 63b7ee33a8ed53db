"""Adapters of a model whose norms are stored less 1 in PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import load_file as load_flax

import flax_tied_lora as tied_lora
from flax_tied_lora.names import Offset, names_of
from flax_tied_lora.peft import load_adapter, save_adapter, save_merged


def test_a_copied_norm_is_shifted_there_and_back(tmp_path):
    params = {
        "norm": {"scale": jnp.array([1.5, 2.0, 0.25])},
        "up": {"kernel": jnp.ones((3, 2))},
    }
    names = names_of(
        None,
        [
            ("norm/scale", "norm.weight", None, None, {"d": Offset(-1.0)}),
            ("up/kernel", "up.weight", None, "linear"),
        ],
    )
    config = tied_lora.LoraConfig(r=1, target_modules=["up"], modules_to_save=["norm"])
    adapted = tied_lora.wrap(params, config)
    save_adapter(tmp_path / "adapter", adapted, names)
    tensors = load_flax(tmp_path / "adapter" / "adapter_model.safetensors")
    [copy] = [x for name, x in tensors.items() if "norm" in name]
    np.testing.assert_array_equal(copy, params["norm"]["scale"] - 1)
    again = load_adapter(tmp_path / "adapter", params, names)
    for ours, back in zip(*map(jax.tree.leaves, (adapted.adapters, again.adapters)), strict=True):
        np.testing.assert_array_equal(ours, back)

    save_merged(tmp_path / "merged", adapted, names, {"model_type": "llama"})
    merged = load_flax(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_array_equal(merged["norm.weight"], params["norm"]["scale"] - 1)
