"""The stored references are what transformers and PEFT answer."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tests.libraries.reference import (
    ALPHA,
    FOLDER,
    HEAD,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    RANK,
    TOKENS,
    VOCABULARY,
    WIDTH,
    drawn,
    reference,
)

UPDATE = "UPDATE_REFERENCES"
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_BODY = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN,
    "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD, "max_position_embeddings": 16, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "bos_token_id": 1, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
_GEMMA = {**_BODY, "query_pre_attn_scalar": HEAD, "sliding_window": 4}
# Class in transformers without "ForCausalLM", the fields of its config, and what is adapted.
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("Llama", {**_BODY, "hidden_size": HEADS * HEAD}, ["embed_tokens", *_PROJECTIONS]),
    "qwen3": ("Qwen3", _BODY, ["embed_tokens", *_PROJECTIONS]),
    "gemma": ("Gemma", _BODY, ["embed_tokens", *_PROJECTIONS]),
    "gemma2": (
        "Gemma2",
        {
            **_GEMMA,
            "num_hidden_layers": 4,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        ["embed_tokens", *_PROJECTIONS],
    ),
    # Eight layers: the sixth is global, and two are behind it.
    "gemma3": (
        "Gemma3",
        {
            **_GEMMA,
            "num_hidden_layers": 8,
            "rope_local_base_freq": 10_000.0,
            "rope_theta": 1_000_000.0,
        },
        ["embed_tokens", *_PROJECTIONS],
    ),
    "t5": (
        "T5",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "d_kv": HEAD,
            "d_ff": HIDDEN,
            "num_layers": 2,
            "num_heads": HEADS,
            "dropout_rate": 0.0,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": True,
            "decoder_start_token_id": 0,
        },
        # Not the table: PEFT replaces one of its names, and no lookup of T5 is by that.
        ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    ),
}
MODELS["umt5"] = ("UMT5", *MODELS["t5"][1:])  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")


def model_of(name: str) -> Any:
    kind, fields, _ = MODELS[name]
    text = "TextConfig" if kind == "Gemma3" else "Config"
    head = "ForConditionalGeneration" if "T5" in kind else "ForCausalLM"
    config = getattr(transformers, kind + text)(**fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, kind + head)(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.copy_(torch.from_numpy(drawn(key, tuple(weight.shape))))
    return model


@torch.no_grad()
def logits_of(name: str, model: Any) -> np.ndarray:
    tokens = torch.from_numpy(TOKENS).long()
    if "t5" in name:
        mask = torch.ones_like(tokens)
        return model(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens).logits.numpy()
    return model(tokens).logits.numpy()


def write(name: str) -> None:
    """Writes a reference."""
    folder = FOLDER / name
    model = model_of(name)
    shapes = {key: list(weight.shape) for key, weight in model.named_parameters()}
    content = {"config": model.config.to_dict(), "shapes": shapes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    base = logits_of(name, model)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=MODELS[name][2],
            ensure_weight_tying="t5" not in name,
        ),
    )
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_" in key:
                weight.copy_(torch.from_numpy(drawn(key, tuple(weight.shape))))
    adapted.eval().save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["target_modules"].sort()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(model_of(name), folder / "adapter").eval()
    np.savez_compressed(folder / "logits.npz", base=base, adapted=logits_of(name, read))


@pytest.mark.parametrize("name", MODELS)
def test_a_reference_is_what_pytorch_answers(name):
    if os.environ.get(UPDATE):
        write(name)
    stored, model = reference(name), model_of(name)
    assert set(stored.weights) == {key for key, _ in model.named_parameters()}
    np.testing.assert_allclose(logits_of(name, model), stored.logits, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(model, stored.adapter).eval()
    np.testing.assert_allclose(logits_of(name, adapted), stored.adapted_logits, atol=1e-5)
    assert np.abs(stored.adapted_logits - stored.logits).max() > 0.1

    with torch.no_grad():
        for key, weight in (merged := model_of(name)).named_parameters():
            weight.copy_(torch.from_numpy(stored.merged[key]))
    np.testing.assert_allclose(logits_of(name, merged), stored.adapted_logits, atol=1e-4)
