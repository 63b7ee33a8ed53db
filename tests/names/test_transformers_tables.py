"""What is known of families: ties, heads, prefixes, tunix's configs and leaves."""

from __future__ import annotations

import types

import pytest

from flax_tied_lora.names import FAMILIES, UnmappedError, names_of
from tests.helpers.name_tables import OWN


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
