"""The tables of names of KerasHub's families, on the paths of their variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_tied_lora._names.family import Family
from flax_tied_lora._names.line import make_line
from flax_tied_lora._names.model_config import config_field

_TORCH = "model.layers.{}"
_TABLE, _HEAD = "token_embedding/embeddings", "token_embedding/reverse_embeddings"


def _family(model: Any, block: str, *lines: tuple[str, ...], norm: str) -> Family:
    """Returns what is known of a family.

    Args:
      model: what `names_of` was given.
      block: pattern of a layer's path.
      lines: of a layer: path in it, PyTorch name in it, and where need be a layout.
      norm: path of the last norm.
    """
    backbone = config_field(model, "backbone") or model
    tied = config_field(backbone, "tie_word_embeddings")
    table = (
        (_TABLE, "model.embed_tokens.weight", "row column -> row column", "embedding"),
        (_HEAD, "lm_head.weight", "in out -> out in", "linear"),
        (norm, "model.norm.weight"),
        *((f"{block}/{path}", f"{_TORCH}.{name}", *rest) for path, name, *rest in lines),
    )
    return Family(
        tuple(make_line(line, "linear") for line in table),
        _TABLE,
        tied=True if tied is None else bool(tied),
        head_leaf=_HEAD,
        ignored=(r"(.*\.)?rotary_emb\.inv_freq",),
    )


def _attention(module: str, heads: str, query_norm: str = "", key_norm: str = "") -> Any:
    """Returns the lines of an attention, given the axes of a projection to heads."""
    norms = {"q": query_norm, "k": key_norm}
    return (
        *((f"{module}/{ours}/kernel", f"self_attn.{ours[0]}_proj.weight", heads)
          for ours in ("query", "key", "value")),
        (f"{module}/attention_output/kernel", "self_attn.o_proj.weight",
         "heads dim out -> out (heads dim)"),
        *((f"{module}/{ours}/scale", f"self_attn.{theirs}_norm.weight")
          for theirs, ours in norms.items() if ours),
    )  # fmt: skip


def _llama_like(model: Any, *attention: tuple[str, ...]) -> Family:
    feedforward = {"gate": "gate", "intermediate": "up", "output": "down"}
    return _family(
        model,
        "transformer_layer_{}",
        *attention,
        *((f"feedforward_{ours}_dense/kernel", f"mlp.{theirs}_proj.weight")
          for ours, theirs in feedforward.items()),
        ("self_attention_layernorm/scale", "input_layernorm.weight"),
        ("feedforward_layernorm/scale", "post_attention_layernorm.weight"),
        norm="sequence_output_layernorm/scale",
    )  # fmt: skip


def _gemma(model: Any, norms: dict[str, str], *attention: tuple[str, ...]) -> Family:
    feedforward = {"gating": "gate", "gating_2": "up", "linear": "down"}
    return _family(
        model,
        "decoder_block_{}",
        *attention,
        *((f"ffw_{ours}/kernel", f"mlp.{theirs}_proj.weight")
          for ours, theirs in feedforward.items()),
        *((f"{ours}_norm/scale", f"{theirs}_layernorm.weight") for ours, theirs in norms.items()),
        norm="final_normalization/scale",
    )  # fmt: skip


_IN_HEADS, _HEADS_IN = "in heads dim -> (heads dim) in", "heads in dim -> (heads dim) in"
_GEMMA_NORMS = {"pre_attention": "input", "pre_ffw": "post_attention"}
_MORE_NORMS = {
    "pre_attention": "input",
    "post_attention": "post_attention",
    "pre_ffw": "pre_feedforward",
    "post_ffw": "post_feedforward",
}

FAMILIES: dict[str, Callable[[Any, int | None], Family]] = {
    "kerashub/llama3": lambda model, _: _llama_like(
        model, *_attention("self_attention", _IN_HEADS)
    ),
    "kerashub/qwen3": lambda model, _: _llama_like(
        model,
        *_attention(
            "self_attention", _IN_HEADS, "query_dense_layernorm", "key_dense_layernorm"
        ),
    ),
    "kerashub/gemma": lambda model, _: _gemma(
        model, _GEMMA_NORMS, *_attention("attention", _HEADS_IN)
    ),
    "kerashub/gemma2": lambda model, _: _gemma(
        model, _MORE_NORMS, *_attention("attention", _HEADS_IN)
    ),
    "kerashub/gemma3": lambda model, _: _gemma(
        model, _MORE_NORMS, *_attention("attention", _HEADS_IN, "query_norm", "key_norm")
    ),
}  # fmt: skip


def kerashub_family(model: Any) -> str | None:
    """Returns the family of a KerasHub backbone or task, or None for any other object.

    A family that is not in `FAMILIES` is named, too, so that an error can name it.
    """
    backbone = config_field(model, "backbone") or model
    library, _, rest = type(backbone).__module__.partition(".src.models.")
    if library != "keras_hub":
        return None
    name = rest.partition(".")[0]
    # Gemma 2 is Gemma's class with norms behind attention and feedforward.
    if name == "gemma" and config_field(backbone, "use_post_ffw_norm"):
        name = "gemma2"
    return f"kerashub/{name}"
