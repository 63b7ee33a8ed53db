"""Names against PyTorch: transformers' models in both libraries, and tunix's leaves."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util

from flax_tied_lora.names import from_state_dict, names_of, to_state_dict
from tests.helpers.name_tables import TUNIX, tunix_names
from tests.models.families import FAMILIES, TOKENS
from tests.models.families import clip_of_old_jax as clip_of_old_jax

MAPPED = (
    "gpt2", "gpt_neo", "opt", "bloom", "llama", "mistral", "gemma", "bert", "roberta", "t5", "bart",
)  # fmt: skip
# Flax's Mistral sees one token more than PyTorch's through a window, and only itself without one.
WIDE = {"mistral": {"sliding_window": 4096}}
# Other classes: family, class in PyTorch (Flax's has the prefix), further fields of the config.
OTHERS = (
    ("gpt2", "GPT2Model", {}),
    ("gpt2", "GPT2LMHeadModel", {"add_cross_attention": True}),
    ("gpt_neo", "GPTNeoModel", {}),
    ("opt", "OPTModel", {}),
    ("opt", "OPTForCausalLM", {"word_embed_proj_dim": 16}),
    ("bloom", "BloomModel", {}),
    ("llama", "LlamaModel", {}),
    ("mistral", "MistralModel", {}),
    ("gemma", "GemmaModel", {}),
    ("bert", "BertModel", {}),
    ("bert", "BertForPreTraining", {}),
    ("bert", "BertForNextSentencePrediction", {}),
    ("bert", "BertForSequenceClassification", {}),
    ("bert", "BertForTokenClassification", {}),
    ("bert", "BertForMultipleChoice", {}),
    ("bert", "BertForQuestionAnswering", {}),
    ("roberta", "RobertaModel", {}),
    ("roberta", "RobertaForSequenceClassification", {}),
    ("roberta", "RobertaForTokenClassification", {}),
    ("roberta", "RobertaForMultipleChoice", {}),
    ("roberta", "RobertaForQuestionAnswering", {}),
    ("t5", "T5Model", {}),
    ("t5", "T5EncoderModel", {}),
    ("t5", "T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}),
    ("bart", "BartModel", {}),
    ("bart", "BartForCausalLM", {}),
    ("bart", "BartForSequenceClassification", {}),
    ("bart", "BartForQuestionAnswering", {}),
)


def config_of(name: str, **fields: Any) -> Any:
    kind, usual = FAMILIES[name].config
    return getattr(transformers, kind)(**{**usual, **WIDE.get(name, {}), **fields})


def random_torch(model: Any) -> dict[str, np.ndarray]:
    """Gives a PyTorch model weights that differ everywhere; returns its state dict."""
    torch.manual_seed(11)
    with torch.no_grad():
        for weight in model.state_dict().values():
            weight += 0.15 * torch.randn(weight.shape)
    model.eval()
    return {name: x.numpy().copy() for name, x in model.state_dict().items()}


def assert_same_state(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, x in found.items():
        assert x.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(x, expected[name], err_msg=name)


def assert_one_to_one(names: Any, params: Any) -> None:
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        for weight in names.to_torch(path, leaf.shape):
            assert names.to_flax(weight.name) == (path, weight)


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_same_model_in_both_libraries(name, tied):
    family = FAMILIES[name]
    config = config_of(name, tie_word_embeddings=tied)
    model = getattr(transformers, family.model.removeprefix("Flax"))(config)
    state = random_torch(model)
    flax = getattr(transformers, family.model)(config, _do_init=False)
    names = names_of(config)

    params = from_state_dict(state, flax.params_shape_tree, names)
    assert_same_state(to_state_dict(params, names, duplicates=True), state)
    assert_one_to_one(names, params)

    tokens = {"decoder_input_ids": TOKENS[:, ::-1].copy()} if family.encodes else {}
    mode, value = family.mode
    ours = flax(TOKENS, params=params, **tokens, **{mode: value}).logits
    with torch.no_grad():
        inputs = {name: torch.from_numpy(x) for name, x in tokens.items()}
        theirs = model(torch.from_numpy(TOKENS), **inputs).logits.numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())

    # What safetensors files hold: each tied tensor once, under the name that PyTorch lists first.
    once = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert set(to_state_dict(params, names)) == once & set(state)


@pytest.mark.parametrize(("name", "kind", "fields"), OTHERS)
def test_other_classes_of_the_families(name, kind, fields):
    config = config_of(name, **fields)
    model = getattr(transformers, kind)(config)
    state = random_torch(model)
    flax = getattr(transformers, f"Flax{kind}")(config, _do_init=False)
    names = names_of(config)
    params = from_state_dict(state, flax.params_shape_tree, names)
    assert_one_to_one(names, params)

    stored = to_state_dict(params, names)
    tied = {n for tie in names.ties for n in tie.names}
    assert set(state) - set(stored) <= tied
    assert_same_state(stored, {k: state[k] for k in stored})


BODY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 64}
FUSED = {"num_key_value_heads": 4}
# tunix's cases: the PyTorch model of the same weights.
TORCH = {
    "llama3": ("Llama", "LlamaConfig", {"tie_word_embeddings": True}),
    "llama3_untied": ("Llama", "LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2_untied": ("Qwen2", "Qwen2Config", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", "Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", "Qwen3MoeConfig", {**EXPERTS, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2", "Gemma2Config", {}),
    "gemma2_fused": ("Gemma2", "Gemma2Config", FUSED),
    "gemma3": ("Gemma3", "Gemma3TextConfig", {}),
    "gemma3_fused": ("Gemma3", "Gemma3TextConfig", FUSED),
}


@functools.cache
def torch_of_tunix(case: str) -> dict[str, np.ndarray]:
    model, config, fields = TORCH[case]
    config = getattr(transformers, config)(**{**BODY, **fields})
    return random_torch(getattr(transformers, f"{model}ForCausalLM")(config))


@pytest.mark.parametrize("case", TUNIX)
def test_tunix_s_leaves_are_the_pytorch_model_s(case):
    """Logits of tunix's own models on params made so equal PyTorch's; tunix is no dependency."""
    names, state = tunix_names(case), torch_of_tunix(case)
    shapes = {p: jax.ShapeDtypeStruct(s, np.float32) for p, s in TUNIX[case][2].items()}
    template = traverse_util.unflatten_dict(shapes, sep="/")
    params = from_state_dict(state, template, names)
    assert_one_to_one(names, params)
    assert_same_state(to_state_dict(params, names, duplicates=True), state)

    leaf = traverse_util.flatten_dict(params, sep="/")
    q = state["model.layers.0.self_attn.q_proj.weight"]
    head, row = 3, 5
    if case.startswith("gemma"):
        fused = leaf.get("layers/0/attn/qkv_einsum/w", [None])
        kernel = leaf.get("layers/0/attn/q_einsum/w", fused[0])
        found = kernel[head, :, row]
    else:
        found = leaf["layers/0/attn/q_proj/w"][:, head, row]
    np.testing.assert_array_equal(found, q[head * 16 + row])
