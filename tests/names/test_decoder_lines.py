"""Tables of EasyDeL, SkyRL tx, bonsai and Levanter, and the configs that mean them.

`tests/libraries/` compares models under these names with PyTorch's.
"""

from __future__ import annotations

import types

import numpy as np
import pytest

from flax_tied_lora.names import from_state_dict, names_of, to_state_dict

QUERY = "model.layers.1.self_attn.q_proj.weight"
WHERE = {
    "easydel/llama": ("easydel.modules.llama.llama_configuration", "llama"),
    "easydel/gemma3": ("easydel.modules.gemma3.gemma3_configuration", "gemma3_text"),
    "skyrl-tx/qwen3": ("tx.models.configs", "qwen3"),
    "skyrl/llama": ("skyrl.tx.models.configs", "llama"),
    "bonsai/qwen3": ("bonsai.models.qwen3.modeling", None),
    "levanter/llama": ("levanter.models.llama", None),
    "levanter/gpt2": ("levanter.models.gpt2", None),
}


@pytest.mark.parametrize("family", WHERE)
@pytest.mark.parametrize("tied", [False, True])
def test_a_config_names_its_family(family, tied):
    module, model_type = WHERE[family]
    kind = type("Config", (types.SimpleNamespace,), {"__module__": module})
    config = kind(tie_word_embeddings=tied)
    if model_type is not None:
        config.model_type = model_type
    names = names_of(config)
    assert names.family == family
    assert bool(names.tied) == tied


@pytest.mark.parametrize(
    ("family", "path", "shape"),
    [
        ("easydel/qwen3", "model/layers/1/self_attn/q_proj/kernel", (16, 32)),
        ("skyrl/llama", "model/layers/_stacked/self_attn/q_proj/kernel", (2, 16, 32)),
        ("bonsai/qwen3", "layers/1/attn/q_proj/kernel", (16, 4, 8)),
        ("levanter/llama", "transformer/layers/stacked/self_attn/q_proj/weight", (2, 2, 2, 8, 16)),
    ],
)
def test_a_query_there_and_back(family, path, shape):
    names = names_of(family)
    weight = next(w for w in names.to_torch(path, shape) if w.name == QUERY)
    assert (weight.shape(shape), weight.kind) == ((32, 16), "linear")
    assert names.to_flax(QUERY) == (path, weight)


def test_gpt2_of_levanter_is_stored_as_pytorch_has_it():
    draw = lambda *shape: np.random.default_rng(0).standard_normal(shape).astype(np.float32)  # noqa: E731
    fused, bias = draw(2, 16, 3, 4, 4), draw(2, 3, 4, 4)
    block = "transformer/blocks/stacked/attn/c_attn"
    params = {f"{block}/weight": fused, f"{block}/bias": bias,
              "embeddings/token_embeddings/weight": draw(20, 16)}  # fmt: skip
    names = names_of("levanter/gpt2")
    state = to_state_dict(params, names)
    np.testing.assert_array_equal(
        state["transformer.h.1.attn.c_attn.weight"], fused[1].reshape(16, 48)
    )
    np.testing.assert_array_equal(state["transformer.h.0.attn.c_attn.bias"], bias[0].reshape(48))
    back = from_state_dict(state, params, names)
    for path, leaf in params.items():
        np.testing.assert_array_equal(back[path], leaf)
