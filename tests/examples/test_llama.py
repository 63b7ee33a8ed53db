"""The examples' Llama family against transformers' PyTorch classes, on random weights."""

from __future__ import annotations

import copy

import generation
import jax
import jax.numpy as jnp
import llama
import loading
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

import flax_tied_lora as tied_lora

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama untied": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "llama linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA | {"num_hidden_layers": 7}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A model of PyTorch's with weights far from its first ones, and its directory."""
    family, changes = CASES[request.param]
    kind = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{kind}Config")(**SMALL | changes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, max_shard_size="10KB")
    return model, folder


def assert_close(found, expected, limit=1e-4):
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit * np.abs(expected).max())


def test_logits(case):
    model, folder = case
    tokens = np.random.default_rng(0).integers(3, 97, (2, 40))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    ours = loading.load(folder)
    assert_close(jax.jit(lambda model, tokens: model(tokens))(ours, tokens), expected)
    assert ours.config.tie_word_embeddings == model.config.tie_word_embeddings
    hidden, table = ours.hidden(jnp.asarray(tokens)), ours.output_matrix()
    if cap := ours.config.logit_cap:
        assert_close(cap * np.tanh(hidden @ table.T / cap), expected)
    else:
        assert_close(hidden @ table.T, expected)


def test_greedy_continuation(case):
    model, folder = case
    prompt = np.random.default_rng(1).integers(3, 97, (2, 9))
    tokens = torch.tensor(prompt)
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    found = generation.generate(loading.load(folder), prompt, 12)
    np.testing.assert_array_equal(found, tokens[:, 9:])


def test_padding_is_not_seen(case):
    _, folder = case
    model, tokens = loading.load(folder), np.arange(3, 13)[None]
    mask = jnp.arange(10)[None] < 7
    whole = model(tokens, mask=mask)
    assert_close(whole[:, :7], model(tokens[:, :7]))


# PEFT 0.21 asks transformers 5 under the name that it had in 4.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapted_and_written(case, tmp_path):
    """The way of a fine-tuned model: adapted, written, and read by PEFT; merged, and by PyTorch."""
    torch_model, folder = case
    model, tokens = loading.load(folder), np.arange(3, 33).reshape(2, 15)
    config = tied_lora.LoraConfig(
        r=2,
        lora_alpha=0.2,
        init_lora_weights=False,
        target_modules=["embed_tokens", "q_proj", "down_proj"],
    )
    adapted = tied_lora.nnx.wrap(model, config)
    adapted.on_dense = "error"
    found = jax.jit(lambda model, tokens: model(tokens))(adapted, tokens)
    settings = loading.config(folder)
    plain, names = tied_lora.nnx.adapted(adapted), loading.names(settings)
    tied_lora.peft.save_adapter(tmp_path / "adapter", plain, names)
    in_peft = PeftModel.from_pretrained(copy.deepcopy(torch_model), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_close(found, in_peft(torch.tensor(tokens)).logits.numpy())
    tied_lora.peft.save_merged(tmp_path / "merged", plain, names, settings)
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    with torch.no_grad():
        expected = merged(torch.tensor(tokens)).logits.numpy()
    assert_close(found, expected)
    assert_close(loading.load(tmp_path / "merged")(tokens), expected)


def test_what_is_not_known():
    with pytest.raises(ValueError, match=r"model_type is 'mamba': expected one of llama, mistral"):
        llama.Config.from_hf({"model_type": "mamba"})
    with pytest.raises(ValueError, match="the config of this llama model has no 'hidden_size'"):
        llama.Config.from_hf({"model_type": "llama"})
    config = SMALL | {"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}
    with pytest.raises(ValueError, match="rope_type is 'yarn': expected 'default', 'linear' or"):
        llama.Config.from_hf(config)
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        llama.Config.from_hf(SMALL | {"model_type": "llama", "hidden_act": "relu"})
