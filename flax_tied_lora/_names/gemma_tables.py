"""The tables of names of DeepMind's ``gemma``: einsum kernels, fused gates, Linen modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_tied_lora._names.family import Family
from flax_tied_lora._names.line import make_line

_BLOCK, _TORCH = "layer_{}", "model.layers.{}"
_HEADS = "heads in dim -> (heads dim) in"
_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn/_query_norm": "self_attn.q_norm",
    "attn/_key_norm": "self_attn.k_norm",
}


def attention_lines(block: str, *, fused: bool) -> tuple[tuple[str, ...], ...]:
    """Returns the lines of the attention of Gemma 2 and 3, in ``gemma`` and in tunix.

    Args:
      block: pattern of a layer's Flax path.
      fused: whether query, key and value are one leaf, as in models with as many key heads as
        heads; otherwise the query is one leaf, and key and value are another.
    """
    leaf, slices = ("qkv_einsum", "qkv") if fused else ("kv_einsum", "kv")
    flax, torch = f"{block}/attn", f"{_TORCH}.self_attn"
    query = (f"{flax}/q_einsum/w", f"{torch}.q_proj.weight", _HEADS)
    return (
        *(() if fused else (query,)),
        *(
            (f"{flax}/{leaf}/w", f"{torch}.{p}_proj.weight", f"{i} {_HEADS}")
            for i, p in enumerate(slices)
        ),
        (f"{flax}/attn_vec_einsum/w", f"{torch}.o_proj.weight", "heads dim out -> out (heads dim)"),
    )


def fused_hint(library: str) -> str:
    """Returns what to do where an attention leaf has no name: it may be fused, or may not."""
    return (
        f"{library} fuses query, key and value where there are as many key heads as heads. Give "
        "names_of the model's config, or a dict with num_attention_heads and num_key_value_heads"
    )


def _gemma(*, fused: bool, gate_transposed: bool) -> Family:
    """Returns what is known of Gemma 2 and 3.

    Args:
      fused: as in `attention_lines`.
      gate_transposed: whether the fused gate has its inputs last.
    """
    gate = "hidden in -> hidden in" if gate_transposed else "in hidden -> hidden in"
    lines = (
        ("embedder/input_embedding", "model.embed_tokens.weight", None, "embedding"),
        *attention_lines(_BLOCK, fused=fused),
        *(
            (f"{_BLOCK}/mlp/gating_einsum", f"{_TORCH}.mlp.{p}_proj.weight", f"{i} {gate}")
            for i, p in enumerate(("gate", "up"))
        ),
        (f"{_BLOCK}/mlp/linear", f"{_TORCH}.mlp.down_proj.weight", "in out -> out in"),
        *((f"{_BLOCK}/{f}/scale", f"{_TORCH}.{t}.weight") for f, t in _NORMS.items()),
        ("final_norm/scale", "model.norm.weight"),
    )
    return Family(
        tuple(make_line(line, "linear") for line in lines),
        "embedder/input_embedding",
        ignored=(r"(.*\.)?rotary_emb\.inv_freq",),
        hints=(r".*/(q|kv|qkv)_einsum/w|.*/gating_einsum", fused_hint("gemma")),
    )


# Of the public models only Gemma 2 2B has a gate with its inputs first.
FAMILIES: dict[str, Callable[[], Family]] = {
    "deepmind/gemma": lambda: _gemma(fused=False, gate_transposed=True),
    "deepmind/gemma2_2b": lambda: _gemma(fused=False, gate_transposed=False),
}
# The same families where query, key and value are one leaf.
FUSED: dict[str, Callable[[], Family]] = {
    "deepmind/gemma": lambda: _gemma(fused=True, gate_transposed=True),
    "deepmind/gemma2_2b": lambda: _gemma(fused=True, gate_transposed=False),
}


def gemma_family(config: Any) -> str | None:
    """Returns the family of a ``gemma`` ``TransformerConfig``, or None for any other object."""
    if not type(config).__module__.startswith("gemma.gm."):
        return None
    if not getattr(config, "use_post_ffw_norm", False):
        return "deepmind/gemma1"  # of which there is no table
    return "deepmind/gemma" if config.transpose_gating_einsum else "deepmind/gemma2_2b"
