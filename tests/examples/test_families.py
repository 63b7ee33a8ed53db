"""What a config.json says and leaves out, against transformers' config classes, 4 or 5."""

from __future__ import annotations

import families
import llama
import pytest
import transformers

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 8,
    "num_attention_heads": 4,
}  # fmt: skip
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "smollm3": "SmolLM3", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text",
}  # fmt: skip
SLIDING = {"use_sliding_window": True, "sliding_window": 8}
LINEAR = {"rope_type": "linear", "factor": 8.0}
CASES = [
    *((kind, {}) for kind in CLASSES),
    ("llama", {"head_dim": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "rope_theta": 5e5}),
    ("llama", {"rope_scaling": LINEAR}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 16, "num_key_value_heads": 2}),
    ("qwen2", {"sliding_window": 8}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
    ("qwen2", {**SLIDING, "max_window_layers": 3}),
    ("qwen2", SLIDING),
    ("qwen3", {**SLIDING, "max_window_layers": 0, "attention_bias": True}),
    ("smollm3", {"no_rope_layer_interval": 3, "tie_word_embeddings": False}),
    ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 0, 1, 1, 0], **SLIDING}),
    ("smollm3", {**SLIDING, "rope_theta": 5e6}),
    ("gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 144}),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"] * 4}),
    ("gemma3_text", {"final_logit_softcapping": 20.0, "rope_scaling": LINEAR}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_what_is_left_out_is_what_the_class_has(kind, settings):
    whole = getattr(transformers, f"{CLASSES[kind]}Config")(**SIZES, **settings).to_dict()
    found = {"model_type": kind, **SIZES, **settings}
    assert llama.Config.from_hf(found) == llama.Config.from_hf(whole)


def test_every_family_is_compared():
    assert list(CLASSES) == list(families.DEFAULTS)


def test_windows_and_layers_without_rope():
    config = llama.Config.from_hf({"model_type": "smollm3", **SIZES, **SLIDING})
    assert config.windows == (None, None, None, 8) * 2
    assert [rope is None for rope in config.ropes] == [False, False, False, True] * 2
    config = llama.Config.from_hf({"model_type": "gemma3_text", **SIZES})
    assert config.windows == (4096,) * 5 + (None,) + (4096,) * 2
    assert config.ropes[5] != config.ropes[4] == config.ropes[6]


def test_a_model_that_sees_what_follows():
    found = {"model_type": "gemma3_text", **SIZES, "use_bidirectional_attention": True}
    with pytest.raises(ValueError, match=r"use_bidirectional_attention is set: expected a causal"):
        llama.Config.from_hf(found)
