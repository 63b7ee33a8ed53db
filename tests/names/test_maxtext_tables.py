"""Tables of MaxText's families: what is scaled and shifted, where layers are, known configs.

`tests/libraries/` compares models under these names with PyTorch's.
"""

from __future__ import annotations

import types
from typing import Any

import jax
import numpy as np
import pytest

from flax_tied_lora.names import Names, from_state_dict, names_of, to_state_dict
from tests.libraries.maxtext_like import FAMILIES, ROWS, config_of, shapes


def drawn(config: dict[str, Any]) -> Any:
    numbers = np.random.default_rng(0)
    draw = lambda x: numbers.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes(config))


def both(family: str, **fields: Any) -> tuple[Names, Any]:
    config = {**config_of(family, scanned=False), **fields}
    return names_of(config), drawn(config)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family, scanned):
    names, params = both(family, scan_layers=scanned)
    state = to_state_dict(params, names)
    layers = 8 if family == "gemma3" else 4 if family == "gemma2" else 2
    assert {int(n.split(".")[2]) for n in state if ".layers." in n} == set(range(layers))
    back = from_state_dict(state, params, names)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6, 1e-6), back, params)
    for name in state:
        path, weight = names.to_flax(name)
        leaf = params
        for key in path.split("/"):
            leaf = leaf[key]
        assert weight in names.to_torch(path, leaf.shape)


def test_a_layer_of_gemma_2_is_two_of_pytorch_s():
    names, params = both("gemma2", scan_layers=True)
    leaf = params["decoder"]["layers"]["self_attention_global"]["key"]["kernel"]
    [weight] = [x for k, x in to_state_dict(params, names).items() if "3.self_attn.k_proj" in k]
    np.testing.assert_array_equal(weight, leaf[:, 1].reshape(16, -1).T)


def test_layers_of_gemma_3_are_stacked_by_its_period_and_the_rest_is_apart():
    names, _ = both("gemma3", scan_layers=True, num_decoder_layers=14)
    paths = [names.to_flax(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 7, 11, 12, 13)]
    assert [(p.removesuffix("/mlp/wi_1/kernel"), dict(w.part).get(1)) for p, w in paths] == [
        ("decoder/layers/layers_0", 0),
        ("decoder/layers/layers_1", 1),
        ("decoder/layers/layers_5", 1),
        ("decoder/layers_remainder/layers_0", None),
        ("decoder/layers_remainder/layers_1", None),
    ]


def test_the_scanned_axis_is_where_the_config_says():
    names, _ = both("qwen3", scan_layers=True, param_scan_axis=0)
    path = "decoder/layers/self_attention/query/kernel"
    assert [w.part for w in names.to_torch(path, (2, 16, 4, 8))] == [((0, 0),), ((0, 1),)]


def test_only_the_rotary_embedding_of_llama_3_1_turns_neighbours():
    kinds = {}
    for fields in ({"rope_type": "llama3.1"}, {"rope_type": "default"},
                   {"rope_type": "default", "model_name": "llama3.1-8b"}):  # fmt: skip
        names, _ = both("llama", **fields)
        [weight] = names.to_torch("decoder/layers_0/self_attention/key/kernel", 3)
        kinds[fields["rope_type"], fields.get("model_name")] = bool(weight.maps)
    assert list(kinds.values()) == [True, False, True]


def test_norms_of_gemma_are_stored_one_more_and_its_table_times_the_root_of_its_width():
    for family, root in (("gemma2", 2560**0.5), ("gemma3", 50.5)):  # the second in bfloat16
        names, _ = both(family, emb_dim=2560)
        norm = names.to_flax("model.norm.weight")[1]
        assert (norm.offset, norm.factor) == (-1.0, 1.0)
        assert names.to_flax("model.embed_tokens.weight")[1].factor == pytest.approx(1 / root)


def test_a_padded_table_needs_the_rows_of_pytorch_s():
    config = config_of("llama", scanned=False) | {"logits_via_embedding": False}
    assert names_of(config).to_flax("lm_head.weight")[1].shape((32, ROWS)) == (ROWS, 32)
    names = names_of(config, vocab_size=120)
    assert not names.tied
    assert names.vocab_size == 120
    assert names.to_flax("lm_head.weight")[1].shape((32, ROWS)) == (120, 32)
    assert names.to_flax("model.embed_tokens.weight")[1].shape((ROWS, 32)) == (120, 32)


def test_a_config_of_maxtext_names_its_family():
    kind = type("HyperParameters", (types.SimpleNamespace,), {"__module__": "maxtext.configs.x"})
    fields = {k: v for k, v in config_of("llama", False).items() if k != "model_type"}
    block = types.SimpleNamespace(value="llama2")
    assert names_of(kind(decoder_block=block, **fields)).family == "maxtext/llama"
    with pytest.raises(ValueError, match="no table of names for the family 'maxtext/deepseek'"):
        names_of(kind(decoder_block="deepseek", **fields))


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="depend on its config, and head_dim is missing"):
        names_of("maxtext/llama")
