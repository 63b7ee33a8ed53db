"""Adapters of tunix's models, with their head axes and fused kernels, in PEFT's layers."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import traverse_util

import flax_tied_lora as tied_lora
from flax_tied_lora.names import from_state_dict, to_state_dict
from flax_tied_lora.peft import load_adapter, save_adapter
from tests.against_torch.test_merged_export_torch import READS, reads
from tests.against_torch.test_names_torch import BODY, TORCH, torch_of_tunix
from tests.helpers.name_tables import TUNIX, tunix_names
from tests.helpers.oracle import perturbed


def fused(kind):
    return f"layers/0/attn/{'qkv' if kind.endswith('fused') else 'kv'}_einsum/w"


@pytest.mark.parametrize(("kind", "parts"), [
    *((kind, ()) for kind in ("llama3", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_fused")),
    ("gemma3", ("k", "v")), ("gemma3", ("v",)), ("gemma3_fused", ("q", "k", "v")),
])  # fmt: skip
def test_there_and_back(kind, parts, tmp_path):
    """Parts: of the fused kernel, those that have factors of their own."""
    names, shapes = tunix_names(kind), TUNIX[kind][2]
    flat = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    template = traverse_util.unflatten_dict(flat, sep="/")
    params = from_state_dict(torch_of_tunix(kind), template, names)
    targets = [path for path in READS if path in shapes and not (parts and path == fused(kind))]
    every = "qkv" if kind.endswith("fused") else "kv"
    config = tied_lora.LoraConfig(
        r=4,
        target_modules=[
            "embedder/input_embedding", *targets, *(f"{fused(kind)}:{p}_proj" for p in parts)
        ],
        parts={fused(kind): (0, [f"{p}_proj" for p in every])} if parts else {},
    )  # fmt: skip
    sites = tied_lora.trace(reads, params)
    adapted = perturbed(tied_lora.wrap(params, config, sites=sites), size=0.1)
    save_adapter(tmp_path, adapted, names)

    model, kind_of_config, fields = TORCH[kind]
    base = getattr(transformers, f"{model}ForCausalLM")(
        getattr(transformers, kind_of_config)(**{**BODY, **fields})
    )
    state = {n: torch.from_numpy(np.array(x)) for n, x in torch_of_tunix(kind).items()}
    base.load_state_dict(state, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).base_model.model
    expected = to_state_dict(tied_lora.merge(adapted), names, duplicates=True)
    layers = {n: m for n, m in theirs.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(layers) >= len(targets) + max(2, 1 + len(parts))
    for name, layer in layers.items():
        with torch.no_grad():
            found = layer.base_layer.weight + layer.get_delta_weight("default")
        np.testing.assert_allclose(
            found.numpy(), expected[f"{name}.weight"], rtol=1e-5, atol=1e-5, err_msg=name
        )

    again = load_adapter(tmp_path, params, names, sites=sites)
    assert {a.key for _, a in again.plan.adapters()} == {a.key for _, a in adapted.plan.adapters()}
    assert jax.tree.structure(again.adapters) == jax.tree.structure(adapted.adapters)
    for ours, back in zip(*map(jax.tree.leaves, (adapted.adapters, again.adapters)), strict=True):
        np.testing.assert_array_equal(ours, back)
