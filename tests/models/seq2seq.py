"""Encoder-decoder models."""

from __future__ import annotations

from typing import Any

from tests.models.family import (
    BERT,
    GPT2,
    GPT2_FIELDS,
    HEADS,
    LAYERS,
    LENGTH,
    PLAIN,
    QKV_OUT,
    VOCABULARY,
    WIDE,
    WIDTH,
    Family,
)

_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "num_layers": LAYERS, "num_heads": HEADS,
    "d_kv": 8, "d_ff": WIDE, "decoder_start_token_id": 0,
}  # fmt: skip
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": LAYERS,
    "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": WIDE, "decoder_ffn_dim": WIDE,
    "max_position_embeddings": LENGTH,
}  # fmt: skip
# An embedding multiplied by the root of the width; one layer, as the family differs in little.
_SCALED = {
    **_BART, "encoder_layers": 1, "decoder_layers": 1, "scale_embedding": True,
    "pad_token_id": 1, "decoder_start_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_CROSS = {**GPT2_FIELDS, "n_layer": 1, "add_cross_attention": True, "is_decoder": True}
_CROSS_GPT2 = (*GPT2, "q_attn", "crossattention/c_proj")


def _t5(name: str, *, checkpoint: bool = False, slow: bool = False, **fields: Any) -> Family:
    return Family(
        f"Flax{name}ForConditionalGeneration",
        (f"{name}Config", {**_T5, **fields}),
        "shared/embedding",
        ("q", "k", "v", "o"),
        12 * fields.get("num_layers", LAYERS),
        lookups=2,
        encoder="tokens",
        generates=True,
        checkpoint=checkpoint,
        slow=slow,
    )


def _bart(
    name: str, kind: str = "ForConditionalGeneration", slow: bool = False, **fields: Any
) -> Family:
    return Family(
        f"Flax{name}{kind}",
        (f"{name}Config", {**_SCALED, **fields}),
        "model/shared/embedding",
        QKV_OUT,
        12,
        lookups=2,
        encoder="tokens",
        generates=True,
        slow=slow,
    )


SEQ2SEQ: dict[str, Family] = {
    "t5": _t5("T5"),
    "mt5": _t5(  # Gated, as T5 1.1 is.
        "MT5", checkpoint=True, slow=True, num_layers=1, tie_word_embeddings=True
    ),
    "longt5": _t5(
        "LongT5", slow=True, num_layers=1, encoder_attention_type="local", local_radius=2
    ),
    "longt5_global": _t5(
        "LongT5", checkpoint=True, num_layers=1, encoder_attention_type="transient-global",
        local_radius=2, global_block_size=2,
    ),
    "bart": Family(
        "FlaxBartForConditionalGeneration",
        ("BartConfig", _BART),
        "model/shared/embedding",
        QKV_OUT,
        24,
        lookups=2,
        encoder="tokens",
        generates=True,
    ),
    "mbart": _bart("MBart", slow=True),
    "marian": _bart("Marian", "MTModel"),
    "pegasus": _bart("Pegasus", slow=True, scale_embedding=False),  # Else it repeats its input.
    "blenderbot": _bart("Blenderbot", slow=True),
    "blenderbot_small": _bart("BlenderbotSmall", slow=True),
    "whisper": Family(
        "FlaxWhisperForConditionalGeneration",
        (
            "WhisperConfig",
            {**_SCALED, "num_mel_bins": 8, "max_source_positions": 6,
             "max_target_positions": LENGTH, "begin_suppress_tokens": None, "bos_token_id": 2},
        ),
        "model/decoder/embed_tokens/embedding",
        QKV_OUT,
        12,
        encoder="features",
        generates=True,
        checkpoint=True,
    ),
    "bert_gpt2": Family(
        "FlaxEncoderDecoderModel",
        (
            "EncoderDecoderConfig",
            {
                # encode() hands positions to BERT as token types: NaN where there are but two.
                "encoder": (
                    "BertConfig",
                    {**PLAIN, "num_hidden_layers": 1, "type_vocab_size": LENGTH},
                ),
                "decoder": ("GPT2Config", _CROSS),
            },
        ),
        "decoder/transformer/wte/embedding",
        (*BERT, *_CROSS_GPT2),
        9,
        head="decoder/lm_head",
        encoder="tokens",
        generates=True,
        slow=True,
    ),
    "vit_gpt2": Family(
        "FlaxVisionEncoderDecoderModel",
        (
            "VisionEncoderDecoderConfig",
            {
                "encoder": (
                    "ViTConfig",
                    {**PLAIN, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4},
                ),
                "decoder": ("GPT2Config", _CROSS),
            },
        ),
        "decoder/transformer/wte/embedding",
        ("query", "key", "value", "attention/output/dense", *_CROSS_GPT2),
        9,
        head="decoder/lm_head",
        encoder="pixels",
        generates=True,
    ),
    "wav2vec2_bart": Family(
        "FlaxSpeechEncoderDecoderModel",
        (
            "SpeechEncoderDecoderConfig",
            {
                "encoder": (
                    "Wav2Vec2Config",
                    {**PLAIN, "num_hidden_layers": 1, "conv_dim": (16, 16), "conv_stride": (4, 4),
                     "conv_kernel": (8, 4), "num_conv_pos_embeddings": 4,
                     "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True,
                     "feat_extract_norm": "layer", "mask_time_prob": 0.0},
                ),
                "decoder": (
                    "BartConfig",
                    {**_BART, "decoder_layers": 1, "max_position_embeddings": 64,
                     "is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": True},
                ),
            },
        ),
        "decoder/model/decoder/embed_tokens/embedding",
        QKV_OUT,
        12,
        head="decoder/lm_head",
        encoder="waves",
        unread="masked_spec_embed",
        generates=True,
        declared_untied=True,
        slow=True,
    ),
}  # fmt: skip
