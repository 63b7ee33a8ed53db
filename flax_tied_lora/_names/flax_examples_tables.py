"""The table of names of Gemma in Flax's own examples: einsum kernels, NNX modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_tied_lora._names.family import Family
from flax_tied_lora._names.gemma_tables import attention_lines
from flax_tied_lora._names.line import make_line
from flax_tied_lora._names.model_config import config_field

_BLOCK, _TORCH = "layers/{}", "model.layers.{}"
_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn/_query_norm": "self_attn.q_norm",
    "attn/_key_norm": "self_attn.k_norm",
}


def _gemma(config: Any, _: int | None) -> Family:
    heads = config_field(config, "num_heads")
    fused = heads is not None and heads == config_field(config, "num_kv_heads")
    attention = attention_lines(_BLOCK, fused=fused)
    lines = (
        ("embedder/embedding", "model.embed_tokens.weight", None, "embedding"),
        *((path.removesuffix("w") + "kernel", *rest) for path, *rest in attention),
        *(
            (f"{_BLOCK}/mlp/{p}_proj/kernel", f"{_TORCH}.mlp.{p}_proj.weight")
            for p in ("gate", "up", "down")
        ),
        *((f"{_BLOCK}/{f}/scale", f"{_TORCH}.{t}.weight") for f, t in _NORMS.items()),
        ("final_norm/scale", "model.norm.weight"),
    )
    return Family(
        tuple(make_line(line, "linear") for line in lines),
        "embedder/embedding",
        ignored=(r"(.*\.)?rotary_emb\.inv_freq",),
    )


# Of Gemma 2 and 3; that of Gemma 1 has no norms behind its layers.
FAMILIES: dict[str, Callable[[Any, int | None], Family]] = {"flax/gemma": _gemma}
