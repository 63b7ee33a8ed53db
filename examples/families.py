"""What configs of Llama's kin say of each layer, and mean by leaving a setting out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OF_ALL = {
    "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_QWEN = {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096,
         "max_window_layers": 28}  # fmt: skip
_GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 8192}
_GEMMA2 = _GEMMA | {"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072,
                "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6,
                "use_sliding_window": False, "no_rope_layer_interval": 4},
    "gemma": _GEMMA | {"num_key_value_heads": 16},
    "gemma2": _GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA2 | {"max_position_embeddings": 131_072, "rope_theta": 1e6,
                              "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6},
}  # fmt: skip


def completed(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a ``config.json`` with the settings that it leaves to its class.

    Raises:
      ValueError: the model is of another family, or not causal.
    """
    kind = found.get("model_type")
    if kind not in DEFAULTS:
        raise ValueError(f"model_type is {kind!r}: expected one of {', '.join(DEFAULTS)}")
    if found.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is set: expected a causal model")
    return {**_OF_ALL, **DEFAULTS[kind], **found}


def layer_types(found: Mapping[str, Any]) -> list[str]:
    """Returns ``full_attention`` or ``sliding_attention`` for each layer.

    Args:
      found: what ``completed`` returns; for the functions below, too.
    """
    numbers, kind = range(found["num_hidden_layers"]), found["model_type"]
    if found.get("layer_types"):
        return list(found["layer_types"])
    if kind == "gemma2":
        sliding = [i % 2 == 0 for i in numbers]
    elif kind == "gemma3_text":
        sliding = [(i + 1) % found["sliding_window_pattern"] > 0 for i in numbers]
    elif kind in ("qwen2", "qwen3"):
        sliding = [i >= found["max_window_layers"] for i in numbers]
    elif kind == "smollm3":
        sliding = [not has_rope for has_rope in has_rope(found)]
    else:
        sliding = [kind == "mistral" for _ in numbers]
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def windows(found: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Returns for each layer how many tokens it sees, its own included, or None: all."""
    size = found.get("sliding_window") if found.get("use_sliding_window", True) else None
    return tuple(size if kind == "sliding_attention" else None for kind in layer_types(found))


def has_rope(found: Mapping[str, Any]) -> list[bool]:
    """Returns for each layer whether it has a rotary embedding."""
    numbers = range(found["num_hidden_layers"])
    if found["model_type"] != "smollm3":
        return [True for _ in numbers]
    each = found["no_rope_layer_interval"]
    return [bool(used) for used in found.get("no_rope_layers") or [(i + 1) % each for i in numbers]]
