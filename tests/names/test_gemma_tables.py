"""Tables of DeepMind's gemma: which config means which, and its fused leaves."""

from __future__ import annotations

import pytest

from flax_tied_lora.names import UnmappedError, names_of


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
