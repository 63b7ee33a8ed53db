"""names_of_leaves: models whose modules are called as in PyTorch need no table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora.names import from_state_dict, names_of, names_of_leaves, to_state_dict
from flax_tied_lora.peft import load_adapter, save_adapter
from tests.helpers.oracle import array

KERNEL = array(2, 3)
LLAMA = {"model_type": "llama", "vocab_size": 24, "tie_word_embeddings": True}


def layer(seed):
    return {
        "self_attn": {
            "q_proj": {"kernel": array(8, 8, seed=seed), "bias": array(8, seed=seed + 1)},
            "q_norm": {"scale": array(4, seed=seed + 2)},
        },
        "mlp": {"up_proj": {"weight": array(12, 8, seed=seed + 3)}},
        "input_layernorm": {"weight": array(8, seed=seed + 4)},
    }


def params(layers, head=False):
    tree = {
        "model": {
            "embed_tokens": {"embedding": array(24, 8)},
            **layers,
            "norm": {"scale": jnp.ones(8)},
        }
    }
    return tree | ({"lm_head": {"kernel": array(8, 24, seed=9)}} if head else {})


LISTED = {"layers": {"0": layer(1), "1": layer(20)}}
UNDERSCORED = {"layers_0": layer(1), "layers_1": layer(20)}


@pytest.mark.parametrize("layers", [LISTED, UNDERSCORED], ids=["layers/0", "layers_0"])
def test_kernels_are_transposed_and_pytorchs_own_weights_are_not(layers):
    tree = params(layers)
    names = names_of_leaves(tree, LLAMA)
    state = to_state_dict(tree, names, duplicates=True)
    first = "model.layers.0."
    np.testing.assert_array_equal(state[f"{first}self_attn.q_proj.weight"], array(8, 8, seed=1).T)
    np.testing.assert_array_equal(state[f"{first}self_attn.q_proj.bias"], array(8, seed=2))
    np.testing.assert_array_equal(state[f"{first}self_attn.q_norm.weight"], array(4, seed=3))
    np.testing.assert_array_equal(state[f"{first}mlp.up_proj.weight"], array(12, 8, seed=4))
    np.testing.assert_array_equal(state[f"{first}input_layernorm.weight"], array(8, seed=5))
    np.testing.assert_array_equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    back = from_state_dict(state, tree, names)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), tree, back))


def test_they_are_the_names_of_the_family():
    tree = {"model": {"embed_tokens": {"embedding": array(24, 8)},
                      "layers": {"0": {"mlp": {"up_proj": {"kernel": array(8, 12)}}}}}}  # fmt: skip
    found, known = names_of_leaves(tree, LLAMA), names_of(LLAMA)
    for path in ("model/embed_tokens/embedding", "model/layers/31/mlp/up_proj/kernel"):
        assert found.to_torch(path, 2) == known.to_torch(path, 2)
    assert dict(found.tied) == dict(known.tied)
    assert found.vocab_size == 24


@pytest.mark.parametrize(
    ("config", "head", "tied"),
    [
        (LLAMA, False, True), ({**LLAMA, "tie_word_embeddings": False}, True, False),
        (None, False, True), (None, True, False),
    ],
)  # fmt: skip
def test_a_tie_is_what_the_config_says_or_that_there_is_no_head(config, head, tied):
    names = names_of_leaves(params(LISTED, head), config)
    assert dict(names.tied) == ({"model/embed_tokens/embedding": ("lm_head",)} if tied else {})


def test_gpt2_stores_its_projections_as_flax_does():
    attention = {"c_attn": {"kernel": array(8, 24)}}
    tree = {"wte": {"embedding": array(24, 8)}, "h": {"0": {"attn": attention}}}
    tree = {"transformer": tree}
    names = names_of_leaves(tree, {"model_type": "gpt2", "tie_word_embeddings": True})
    (weight,) = names.to_torch("transformer/h/5/attn/c_attn/kernel", (8, 24))
    assert (weight.name, weight.kind) == ("transformer.h.5.attn.c_attn.weight", "conv1d")
    assert weight.shape((8, 24)) == (8, 24)


def test_a_prefix_that_paths_lack():
    names = names_of_leaves({"layers": {"0": layer(1)}}, prefix="model.")
    (weight,) = names.to_torch("layers/0/self_attn/q_proj/kernel", 2)
    assert weight.name == "model.layers.0.self_attn.q_proj.weight"


def test_an_adapter_goes_to_peft_and_back(tmp_path):
    tree = params(UNDERSCORED)
    names = names_of_leaves(tree, LLAMA)
    config = tied_lora.LoraConfig(
        r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False
    )
    adapted = tied_lora.wrap(tree, config)
    save_adapter(tmp_path, adapted, names)
    again = load_adapter(tmp_path, tree, names)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), again.adapters, adapted.adapters)
    assert jax.tree.all(same)


@pytest.mark.parametrize(
    ("tree", "config", "message"),
    [
        ({"a": {"kernel": array(2, 3, 4)}}, None, "'a/kernel' has 3 axes; expected .in, out."),
        ({"a": {"kernel": array(2, 3)}}, LLAMA, "tied, and no leaf is a table called embed_tokens"),
        ({"l_0": {"kernel": KERNEL}, "l": {"0": {"weight": KERNEL}}}, None, "'l.{}.weight'"),
    ],
)  # fmt: skip
def test_what_it_cannot_tell_is_said(tree, config, message):
    with pytest.raises(ValueError, match=message):
        names_of_leaves(tree, config)
