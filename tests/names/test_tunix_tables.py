"""Tables of tunix's families: there and back, heads, fused forms, and configs that are known."""

from __future__ import annotations

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_tied_lora.names import UnmappedError, from_state_dict, names_of, to_state_dict
from tests.helpers.name_tables import (
    GEMMA2,
    GEMMA2_FUSED,
    LLAMA3,
    TUNIX,
    assert_same,
    draw,
    flat,
    tunix_names,
)


class TestTunix:
    @pytest.mark.parametrize("case", TUNIX)
    def test_there_and_back(self, case):
        names, params = tunix_names(case), draw(TUNIX[case][2])
        for path, shape in TUNIX[case][2].items():
            for weight in names.to_torch(path, shape):
                assert names.to_flax(weight.name) == (path, weight)
        state = to_state_dict(params, names)
        assert_same(from_state_dict(state, params, names), params)
        assert ("lm_head.weight" in state) == ("lm_head" in params)

    def test_heads_are_rows_of_pytorch_s_projections(self):
        w = flat(draw(GEMMA2))["layers/0/attn/kv_einsum/w"]
        state = to_state_dict(draw(GEMMA2), names_of("tunix/gemma2"))
        value = state["model.layers.0.self_attn.v_proj.weight"]
        np.testing.assert_array_equal(value[16 + 5], w[1, 1, :, 5])
        fused = flat(draw(GEMMA2_FUSED))["layers/0/attn/qkv_einsum/w"]
        state_of_fused = to_state_dict(draw(GEMMA2_FUSED), tunix_names("gemma2_fused"))
        for i, p in enumerate("qkv"):
            projection = state_of_fused[f"model.layers.0.self_attn.{p}_proj.weight"]
            np.testing.assert_array_equal(projection[3 * 16 + 5], fused[i, 3, :, 5])
        q = flat(draw(LLAMA3))["layers/0/attn/q_proj/w"]
        projection = to_state_dict(draw(LLAMA3), tunix_names("llama3"))
        np.testing.assert_array_equal(
            projection["model.layers.0.self_attn.q_proj.weight"][2 * 16 + 7], q[:, 2, 7]
        )
        o = flat(draw(GEMMA2))["layers/0/attn/attn_vec_einsum/w"]
        np.testing.assert_array_equal(
            state["model.layers.0.self_attn.o_proj.weight"][:, 2 * 16 + 3], o[2, 3]
        )

    def test_the_fused_form_needs_the_config(self):
        with pytest.raises(UnmappedError, match="num_attention_heads and num_key_value_heads"):
            names_of("tunix/gemma2").to_torch("layers/0/attn/qkv_einsum/w", (3, 4, 32, 16))

    def test_tunix_s_llama_by_transformers_name(self):
        with pytest.raises(UnmappedError, match=r"its table is names_of\('tunix/llama3'\)"):
            names_of("llama").to_torch("layers/0/attn/q_proj/w", 3)

    @pytest.mark.parametrize(
        ("module", "fields", "family", "head"),
        [
            ("qwen2", {"use_tied_embedding": True}, "tunix/qwen2", "embedder/input_embedding"),
            ("qwen3", {"use_tied_embedding": False}, "tunix/qwen3", "lm_head/w"),
            ("llama3", {"weight_tying": True}, "tunix/llama3", "embedder/input_embedding"),
            ("gemma", {"use_post_ffw_norm": True}, "tunix/gemma2", "embedder/input_embedding"),
            ("gemma3", {}, "tunix/gemma3", "embedder/input_embedding"),
        ],
    )
    def test_a_model_config_of_tunix(self, module, fields, family, head):
        config = model_config(module, num_heads=4, num_kv_heads=4, **fields)
        names = names_of(config)
        assert names.family == family
        assert names.to_flax("lm_head.weight")[0] == head
        if "gemma" in module:
            assert len(names.to_torch("layers/0/attn/qkv_einsum/w", (3, 4, 32, 16))) == 3

    def test_gemma_1_of_tunix_is_refused(self):
        with pytest.raises(ValueError, match="no table of names for the family 'tunix/gemma1'"):
            names_of(model_config("gemma", use_post_ffw_norm=False))

    def test_nnx_state(self):
        class Model(nnx.Module):
            def __init__(self):
                self.embedder = nnx.Dict(input_embedding=nnx.Param(jnp.ones((5, 2))))
                self.layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)) for _ in range(2)])

        names = names_of("tunix/llama3", [("layers/{}/kernel", "l.{}.weight"),
                                          ("layers/{}/bias", "l.{}.bias")])  # fmt: skip
        graph, state = nnx.split(Model())
        tensors = {k: x + 1 for k, x in to_state_dict(state, names).items()}
        assert sorted(tensors)[:2] == ["l.0.bias", "l.0.weight"]
        found = nnx.merge(graph, from_state_dict(tensors, state, names))
        np.testing.assert_array_equal(found.layers[1].kernel[...], tensors["l.1.weight"].T)


def model_config(module, **fields):
    """Returns what ``names_of`` sees of a tunix config: its class's module, and fields."""
    cls = type("ModelConfig", (types.SimpleNamespace,), {})
    cls.__module__ = f"tunix.models.{module}.model"
    return cls(**fields)
