"""A small random Llama as a directory of Hugging Face, made without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import llama
import loading
from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import flax_tied_lora as tied_lora
from flax_tied_lora import peft

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "12", "he", "Ġhe"]
MERGES = [("1", "2"), ("h", "e"), ("Ġ", "he")]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# SmolLM2's, short of the system message that it adds.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in TOKENS[:3]])
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=TOKENS[1], eos_token=TOKENS[2], pad_token=TOKENS[2]
    )
    result.chat_template = template
    return result


def write(folder: Path, template: str | None = TEMPLATE, **changes: object) -> Path:
    """Writes config, weights and tokenizer; returns the folder."""
    config = CONFIG | changes
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = llama.Llama(llama.Config.from_hf(config), rngs=nnx.Rngs(0))
        params = tied_lora.nnx.params(model)
    peft.save_merged(folder, params, loading.names(config), config)
    tokenizer(template).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder
