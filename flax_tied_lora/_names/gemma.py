"""The tables of DeepMind's ``gemma``: einsum kernels with head axes, fused gates, Linen modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_tied_lora._names.families import Family
from flax_tied_lora._names.table import make_line

_BLOCK, _TORCH = "layer_{}", "model.layers.{}"
_ATTENTION, _SELF = f"{_BLOCK}/attn", f"{_TORCH}.self_attn"
_HEADS = "heads in dim -> (heads dim) in"
_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn/_query_norm": "self_attn.q_norm",
    "attn/_key_norm": "self_attn.k_norm",
}


def _gemma(fused: bool, transposed: bool) -> Family:
    """Gemma 2 and 3.

    Args:
      fused: whether query, key and value are one leaf, as where there are as many of each.
      transposed: whether the fused gate has its inputs last.
    """
    leaf, slices = ("qkv_einsum", "qkv") if fused else ("kv_einsum", "kv")
    gate = "hidden in -> hidden in" if transposed else "in hidden -> hidden in"
    query = (f"{_ATTENTION}/q_einsum/w", f"{_SELF}.q_proj.weight", _HEADS)
    lines = (
        ("embedder/input_embedding", "model.embed_tokens.weight"),
        *(() if fused else (query,)),
        *(
            (f"{_ATTENTION}/{leaf}/w", f"{_SELF}.{p}_proj.weight", f"{i} {_HEADS}")
            for i, p in enumerate(slices)
        ),
        (
            f"{_ATTENTION}/attn_vec_einsum/w",
            f"{_SELF}.o_proj.weight",
            "heads dim out -> out (heads dim)",
        ),
        *(
            (f"{_BLOCK}/mlp/gating_einsum", f"{_TORCH}.mlp.{p}_proj.weight", f"{i} {gate}")
            for i, p in enumerate(("gate", "up"))
        ),
        (f"{_BLOCK}/mlp/linear", f"{_TORCH}.mlp.down_proj.weight", "in out -> out in"),
        *((f"{_BLOCK}/{f}/scale", f"{_TORCH}.{t}.weight") for f, t in _NORMS.items()),
        ("final_norm/scale", "model.norm.weight"),
    )
    return Family(
        tuple(make_line(line) for line in lines),
        "embedder/input_embedding",
        ignored=(r"(.*\.)?rotary_emb\.inv_freq",),
        hints=(
            r".*/(q|kv|qkv)_einsum/w|.*/gating_einsum",
            "gemma fuses query, key and value where there are as many key heads as heads. Give "
            "names_of the model's config, or a dict with num_attention_heads and "
            "num_key_value_heads",
        ),
    )


# Of the public models only Gemma 2 2B has a gate with its inputs first.
FAMILIES: dict[str, Callable[[], Family]] = {
    "deepmind/gemma": lambda: _gemma(fused=False, transposed=True),
    "deepmind/gemma2_2b": lambda: _gemma(fused=False, transposed=False),
}
FUSED: dict[str, Callable[[], Family]] = {
    "deepmind/gemma": lambda: _gemma(fused=True, transposed=True),
    "deepmind/gemma2_2b": lambda: _gemma(fused=True, transposed=False),
}


def gemma_family(config: Any) -> str | None:
    """Returns the family of a ``gemma`` ``TransformerConfig``, or None if it is none."""
    if not type(config).__module__.startswith("gemma.gm."):
        return None
    if not getattr(config, "use_post_ffw_norm", False):
        return "deepmind/gemma1"  # of which there is no table
    return "deepmind/gemma" if config.transpose_gating_einsum else "deepmind/gemma2_2b"
