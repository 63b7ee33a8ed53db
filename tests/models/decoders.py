"""Causal language models."""

from __future__ import annotations

from typing import Any

from tests.models.family import (
    GPT2,
    GPT2_FIELDS,
    HEADS,
    LAYERS,
    LENGTH,
    PLAIN,
    QKV_OUT,
    QKVO,
    VOCABULARY,
    WIDE,
    WIDTH,
    Family,
)

_GROUPED = {**PLAIN, "num_key_value_heads": 2, "tie_word_embeddings": True}
_DECODER = {**PLAIN, "is_decoder": True, "num_hidden_layers": 1}
# These classes keep their cache only where there is cross-attention, which nothing reads here.
_CACHED: dict[str, Any] = {
    "fields": {"add_cross_attention": True}, "generates": True, "unread": "crossattention",
}  # fmt: skip
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "ffn_dim": WIDE,
    "word_embed_proj_dim": WIDTH,
    "max_position_embeddings": LENGTH,
}


def _bert(name: str, scope: str, head: str = "lm_head/decoder", **more: Any) -> Family:
    """Returns the causal class of a family built as BERT, which it is in most."""
    fields = more.pop("fields", {})
    return Family(
        f"Flax{name}ForCausalLM",
        (f"{name}Config", {**_DECODER, **fields}),
        f"{scope}/embeddings/word_embeddings/embedding",
        ("attention/self/query", "attention/self/key", "attention/self/value",
         "attention/output/dense"),
        4,
        head=head,
        **more,
    )  # fmt: skip


DECODERS: dict[str, Family] = {
    "gpt2": Family(
        "FlaxGPT2LMHeadModel",
        ("GPT2Config", GPT2_FIELDS),
        "transformer/wte/embedding",
        GPT2,
        4,
        generates=True,
    ),
    "gpt_neo": Family(
        "FlaxGPTNeoForCausalLM",
        (
            "GPTNeoConfig",
            {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": LAYERS,
             "num_heads": HEADS, "attention_types": [[["global", "local"], 1]],
             "window_size": 4, "intermediate_size": WIDE, "max_position_embeddings": LENGTH},
        ),
        "transformer/wte/embedding",
        QKV_OUT,
        8,
        slow=True,
        generates=True,
    ),
    "gptj": Family(
        "FlaxGPTJForCausalLM",
        ("GPTJConfig", {**GPT2_FIELDS, "rotary_dim": 4}),
        "transformer/wte/embedding",
        QKV_OUT,
        8,
        untied_head="lm_head/kernel",
        declared_untied=True,
        slow=True,
        generates=True,
    ),
    "opt": Family(
        "FlaxOPTForCausalLM",
        ("OPTConfig", _OPT),
        "model/decoder/embed_tokens/embedding",
        QKV_OUT,
        8,
        mode=("deterministic", True),
        slow=True,
        generates=True,
    ),
    "opt_projected": Family(  # A table narrower than the model, a projection on either side.
        "FlaxOPTForCausalLM",
        ("OPTConfig", {**_OPT, "word_embed_proj_dim": 16}),
        "model/decoder/embed_tokens/embedding",
        ("project_in", "project_out", *QKV_OUT),
        10,
        mode=("deterministic", True),
        generates=True,
    ),
    "bloom": Family(
        "FlaxBloomForCausalLM",
        (
            "BloomConfig",
            {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
        ),
        "transformer/word_embeddings/embedding",
        ("query_key_value", "self_attention/dense"),
        4,
        generates=True,
    ),
    "gemma": Family(
        "FlaxGemmaForCausalLM",
        ("GemmaConfig", {**_GROUPED, "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}),
        "model/embed_tokens/embedding",
        QKVO,
        8,
        generates=True,
    ),
    "llama": Family(
        "FlaxLlamaForCausalLM",
        ("LlamaConfig", _GROUPED),
        "model/embed_tokens/embedding",
        QKVO,
        8,
        untied_head="lm_head/kernel",
        generates=True,
    ),
    "mistral": Family(
        "FlaxMistralForCausalLM",
        ("MistralConfig", {**_GROUPED, "sliding_window": 4}),
        "model/embed_tokens/embedding",
        QKVO,
        8,
        untied_head="lm_head/kernel",
        slow=True,
        generates=True,
    ),
    "xglm": Family(
        "FlaxXGLMForCausalLM",
        (
            "XGLMConfig",
            {"vocab_size": VOCABULARY, "d_model": WIDTH, "num_layers": LAYERS,
             "attention_heads": HEADS, "ffn_dim": WIDE, "max_position_embeddings": LENGTH},
        ),
        "model/embed_tokens/embedding",
        QKV_OUT,
        8,
        slow=True,
        generates=True,
    ),
    "bart_decoder": Family(
        "FlaxBartForCausalLM",
        (
            "BartConfig",
            {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": LAYERS,
             "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
             "decoder_attention_heads": HEADS, "encoder_ffn_dim": WIDE, "decoder_ffn_dim": WIDE,
             "max_position_embeddings": LENGTH, "is_decoder": True, "is_encoder_decoder": False},
        ),
        "model/decoder/embed_tokens/embedding",
        tuple(f"self_attn/{name}" for name in QKV_OUT),
        8,
        unread="encoder_attn",
        slow=True,
        generates=True,
    ),
    "bert_causal": _bert("Bert", "bert", "cls/predictions/decoder", **_CACHED),
    "roberta_causal": _bert("Roberta", "roberta", slow=True, **_CACHED),
    "xlm_roberta_causal": _bert("XLMRoberta", "roberta", slow=True, **_CACHED),
    "roberta_prelayernorm_causal": _bert(
        "RobertaPreLayerNorm", "roberta_prelayernorm", slow=True, **_CACHED
    ),
    "electra_causal": _bert(
        "Electra", "electra", "generator_lm_head", fields={"embedding_size": 16}, slow=True
    ),
    "big_bird_causal": _bert(
        "BigBird", "bert", "cls/predictions/decoder", fields={"attention_type": "original_full"},
        slow=True,
    ),
}  # fmt: skip
