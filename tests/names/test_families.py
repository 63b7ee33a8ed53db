"""What is known of families: ties, heads, prefixes, tunix's configs and leaves."""

from __future__ import annotations

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_tied_lora.names import FAMILIES, UnmappedError, from_state_dict, names_of, to_state_dict
from tests.helpers.name_tables import (
    GEMMA2,
    GEMMA2_FUSED,
    LLAMA3,
    OWN,
    TUNIX,
    assert_same,
    draw,
    flat,
    tunix_names,
)


class TestFamilies:
    def test_what_names_a_family(self):
        config = types.SimpleNamespace(model_type="llama", tie_word_embeddings=True)
        for model in ("llama", {"model_type": "llama"}, config):
            assert names_of(model).family == "llama"
        assert "tunix/gemma3" in FAMILIES
        assert "bart" in FAMILIES

    @pytest.mark.parametrize(
        ("model", "says"),
        [
            ("gpt5", "family 'gpt5': known are gpt2, gpt_neo"),
            ("qwen3", "transformers has no Flax class for it; for tunix's say 'tunix/qwen3'"),
            (None, "For a model of your own give a table"),
            ({}, "found dict without a model_type"),
            (3, "found int without a model_type"),
        ],
    )
    def test_an_unknown_family_is_explained(self, model, says):
        with pytest.raises(ValueError, match="names_of") as error:
            names_of(model)
        assert says in str(error.value)

    def test_a_table_for_a_family_that_is_not_known(self):
        assert names_of({"model_type": "mine"}, OWN).to_torch("gate", ())[0].name == "gate.alpha"

    @pytest.mark.parametrize(
        ("model", "tie", "modules"),
        [
            ("gpt2", None, ("lm_head",)),
            ("gpt2", False, ()),
            ("llama", None, ()),
            ("llama", True, ("lm_head",)),
            ({"model_type": "llama", "tie_word_embeddings": True}, None, ("lm_head",)),
            ({"model_type": "llama", "tie_word_embeddings": True}, False, ()),
            ("t5", None, ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")),
            ("t5", False, ("encoder.embed_tokens", "decoder.embed_tokens")),
            ("bert", None, ("cls.predictions.decoder",)),
            ("tunix/qwen3", None, ()),
            ("tunix/qwen3", True, ("lm_head",)),
            ("tunix/gemma2", None, ("lm_head",)),
        ],
    )
    def test_ties(self, model, tie, modules):
        names = names_of(model, tie_word_embeddings=tie)
        table = next(line.path for line in names.lines if line.kind == "embedding")
        table = next((p for p in names.tied if p.endswith("embedding")), table)
        assert names.tied.get(table, ()) == modules
        for module in modules[:2]:
            path, weight = names.to_flax(f"{module}.weight")
            if (names.family, module) == ("llama", "lm_head"):  # its own leaf all the same
                assert path == "lm_head/kernel"
                continue
            assert path == table
            assert (weight.module, weight.dims) == (module, ((0,), (1,)))
            assert weight.kind == ("embedding" if "embed_tokens" in module else "linear")

    def test_the_head_is_a_leaf_where_the_config_does_not_tie(self):
        untied = names_of("gpt2", tie_word_embeddings=False)
        assert untied.to_torch("lm_head/kernel", 2)[0].name == "lm_head.weight"
        assert untied.to_flax("lm_head.weight")[0] == "lm_head/kernel"
        with pytest.raises(UnmappedError):
            names_of("gpt2").to_torch("lm_head/kernel", 2)

    def test_ties_of_the_user_s_own_come_on_top(self):
        names = names_of("gpt2", tied={"transformer/wte/embedding": ("head2", "lm_head")})
        assert names.tied == {"transformer/wte/embedding": ("lm_head", "head2")}
        assert names.to_flax("head2.weight")[0] == "transformer/wte/embedding"

    def test_a_head_s_bias_is_shared(self):
        path, weight = names_of("bert").to_flax("cls.predictions.decoder.bias")
        assert (path, weight.name) == ("cls/predictions/bias", "cls.predictions.decoder.bias")
        assert weight.kind == "vector"

    def test_with_and_without_the_prefix(self):
        names = names_of("gpt2")
        assert names.to_torch("h/0/ln_1/scale", 1)[0].name == "h.0.ln_1.weight"
        assert names.to_flax("h.0.ln_1.weight")[0] == "h/0/ln_1/scale"
        assert "wte/embedding" not in names.tied
        bare = names_of("bart").to_flax("encoder.embed_tokens.weight")
        assert bare[0] == "shared/embedding"

    def test_conv1d_is_stored_the_other_way_round_in_both(self):
        (weight,) = names_of("gpt2").to_torch("transformer/h/0/mlp/c_fc/kernel", (12, 4))
        assert (weight.kind, weight.dims) == ("conv1d", ((1,), (0,)))
        assert weight.shape((12, 4)) == (4, 12)


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


class TestGemmaOfDeepMind:
    """The models themselves are in tests/libraries."""

    def config(self, **fields):
        kind = type("TransformerConfig", (), {"__module__": "gemma.gm.nn._config"})
        config = kind()
        usual = {"use_post_ffw_norm": True, "transpose_gating_einsum": True}
        vars(config).update({**usual, "num_heads": 4, "num_kv_heads": 2, **fields})
        return config

    def test_the_config_says_which(self):
        assert names_of(self.config()).family == "deepmind/gemma"
        assert names_of(self.config(transpose_gating_einsum=False)).family == "deepmind/gemma2_2b"
        with pytest.raises(ValueError, match="no table of names for the family 'deepmind/gemma1'"):
            names_of(self.config(use_post_ffw_norm=False))

    def test_a_gate_is_two_parameters_whichever_way_round(self):
        for transposed, dims in ((True, ((1,), (2,))), (False, ((2,), (1,)))):
            names = names_of(self.config(transpose_gating_einsum=transposed))
            gate, up = names.to_torch("layer_3/mlp/gating_einsum", 3)
            assert [gate.name, up.name] == [
                f"model.layers.3.mlp.{p}_proj.weight" for p in ("gate", "up")
            ]
            assert (gate.dims, gate.part, up.part) == (dims, ((0, 0),), ((0, 1),))

    def test_query_key_and_value_are_one_leaf_where_there_are_as_many(self):
        fused = names_of(self.config(num_kv_heads=4))
        assert len(fused.to_torch("layer_0/attn/qkv_einsum/w", 4)) == 3
        with pytest.raises(UnmappedError, match="Give names_of the model's config"):
            names_of("deepmind/gemma").to_torch("layer_0/attn/qkv_einsum/w", 4)
