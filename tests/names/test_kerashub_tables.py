"""Tables of KerasHub's families, on the paths of their variables.

`tests/libraries/` compares models under these names with PyTorch's.
"""

from __future__ import annotations

import types

import pytest

from flax_tied_lora.names import names_of

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("family", "path", "axes"),
    [
        ("llama3", "transformer_layer_1/self_attention/query/kernel", ((1, 2), (0,))),
        ("qwen3", "transformer_layer_1/self_attention/query/kernel", ((1, 2), (0,))),
        ("gemma", "decoder_block_1/attention/query/kernel", ((0, 2), (1,))),
        ("gemma2", "decoder_block_1/attention/query/kernel", ((0, 2), (1,))),
        ("gemma3", "decoder_block_1/attention/query/kernel", ((0, 2), (1,))),
    ],
)
def test_a_query_there_and_back(family, path, axes):
    names = names_of(f"kerashub/{family}")
    [weight] = names.to_torch(path, 3)
    assert (weight.name, weight.dims) == (QUERY, axes)
    assert names.to_flax(QUERY) == (path, weight)
    assert dict(names.tied) == {"token_embedding/embeddings": ("lm_head",)}


@pytest.mark.parametrize(
    ("module", "fields", "family"),
    [
        ("llama3.llama3_backbone", {}, "llama3"),
        ("gemma.gemma_backbone", {"use_post_ffw_norm": False}, "gemma"),
        ("gemma.gemma_backbone", {"use_post_ffw_norm": True}, "gemma2"),
        ("gemma3.gemma3_backbone", {}, "gemma3"),
    ],
)
def test_a_backbone_or_its_task_names_its_family(module, fields, family):
    where = f"keras_hub.src.models.{module}"
    backbone = type("Backbone", (types.SimpleNamespace,), {"__module__": where})(**fields)
    for model in (backbone, types.SimpleNamespace(backbone=backbone)):
        assert names_of(model).family == f"kerashub/{family}"


def test_an_untied_head_has_a_leaf_of_its_own():
    where = "keras_hub.src.models.qwen3.qwen3_backbone"
    kind = type("Qwen3Backbone", (types.SimpleNamespace,), {"__module__": where})
    names = names_of(kind(tie_word_embeddings=False))
    assert names.to_flax("lm_head.weight")[0] == "token_embedding/reverse_embeddings"
    assert not names.tied
    tied = names_of(kind(tie_word_embeddings=True))
    assert tied.to_flax("lm_head.weight")[0] == "token_embedding/embeddings"


def test_a_family_without_a_table_is_named():
    where = "keras_hub.src.models.phi3.phi3_backbone"
    with pytest.raises(ValueError, match="no table of names for the family 'kerashub/phi3'"):
        names_of(type("Phi3Backbone", (), {"__module__": where})())
