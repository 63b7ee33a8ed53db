"""The tables of names of tunix's families: einsum kernels with head axes, NNX modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_tied_lora._names.family import Family
from flax_tied_lora._names.gemma_tables import attention_lines, fused_hint
from flax_tied_lora._names.line import make_line

_BLOCK, _TORCH = "layers/{}", "model.layers.{}"
_IN_HEADS = "in heads dim -> (heads dim) in"
_HEADS_OUT = "heads dim out -> out (heads dim)"
_MLP = tuple(
    (f"{_BLOCK}/mlp/{p}_proj/kernel", f"{_TORCH}.mlp.{p}_proj.weight")
    for p in ("gate", "up", "down")
)
_TABLE = ("embedder/input_embedding", "model.embed_tokens.weight", None, "embedding")


def _family(*lines: tuple[str, ...], tied: bool, hints: tuple[str, ...] = ()) -> Family:
    return Family(
        tuple(make_line(line, "linear") for line in (_TABLE, *_MLP, *lines)),
        "embedder/input_embedding",
        tied=tied,
        head_leaf="lm_head/w",
        ignored=(r"(.*\.)?rotary_emb\.inv_freq",),
        hints=hints,
    )


def _norms(last: str, **names: str) -> tuple[tuple[str, str], ...]:
    """Returns the lines of norms, given ``Flax module = PyTorch module`` of those in a layer."""
    lines = ((f"{_BLOCK}/{f}/{last}", f"{_TORCH}.{t}.weight") for f, t in names.items())
    return (*lines, (f"final_norm/{last}", "model.norm.weight"))


def _head_norms(last: str, query: str, key: str) -> tuple[tuple[str, str], ...]:
    return (
        (f"{_BLOCK}/attn/{query}/{last}", f"{_TORCH}.self_attn.q_norm.weight"),
        (f"{_BLOCK}/attn/{key}/{last}", f"{_TORCH}.self_attn.k_norm.weight"),
    )


def _llama_like(*lines: tuple[str, ...]) -> Family:
    """Returns what is known of Llama 3, Qwen 2 and 3: query, key and value are three leaves."""
    return _family(
        *(
            (f"{_BLOCK}/attn/{p}_proj/w", f"{_TORCH}.self_attn.{p}_proj.weight", _IN_HEADS)
            for p in "qkv"
        ),
        (f"{_BLOCK}/attn/o_proj/w", f"{_TORCH}.self_attn.o_proj.weight", _HEADS_OUT),
        *_norms(
            "w",
            input_layernorm="input_layernorm",
            post_attention_layernorm="post_attention_layernorm",
        ),
        ("lm_head/w", "lm_head.weight", "in out -> out in"),
        *lines,
        tied=False,
    )


def _qwen2() -> Family:
    return _llama_like(
        *((f"{_BLOCK}/attn/{p}_bias", f"{_TORCH}.self_attn.{p}_proj.bias") for p in "qkv")
    )


def _qwen3() -> Family:
    return _llama_like(
        *_head_norms("w", "q_norm", "k_norm"),
        # Mixture of experts: one leaf for all experts of a layer, one parameter each in PyTorch.
        (f"{_BLOCK}/mlp/router/kernel", f"{_TORCH}.mlp.gate.weight"),
        *(
            (
                f"{_BLOCK}/mlp/{p}_proj",
                f"{_TORCH}.mlp.experts.{{expert}}.{p}_proj.weight",
                "{expert} in out -> out in",
            )
            for p in ("gate", "up", "down")
        ),
    )


def _gemma(*lines: tuple[str, ...], post_attention: str, fused: bool) -> Family:
    """Returns what is known of Gemma 2 and 3; ``fused`` as in `attention_lines`."""
    return _family(
        *attention_lines(_BLOCK, fused=fused),
        *_norms(
            "scale",
            pre_attention_norm="input_layernorm",
            pre_ffw_norm="pre_feedforward_layernorm",
            post_ffw_norm="post_feedforward_layernorm",
            **{post_attention: "post_attention_layernorm"},
        ),
        *lines,
        tied=True,
        hints=(r".*/(q|kv|qkv)_einsum/w", fused_hint("tunix")),
    )


def _gemma2(fused: bool = False) -> Family:
    return _gemma(post_attention="post_attn_norm", fused=fused)


def _gemma3(fused: bool = False) -> Family:
    norms = _head_norms("scale", "_query_norm", "_key_norm")
    return _gemma(*norms, post_attention="post_attention_norm", fused=fused)


FAMILIES: dict[str, Callable[[], Family]] = {
    "tunix/qwen2": _qwen2,
    "tunix/qwen3": _qwen3,
    "tunix/llama3": _llama_like,
    "tunix/gemma2": _gemma2,
    "tunix/gemma3": _gemma3,
}
# The same families where query, key and value are one leaf.
FUSED: dict[str, Callable[[], Family]] = {
    "tunix/gemma2": lambda: _gemma2(fused=True),
    "tunix/gemma3": lambda: _gemma3(fused=True),
}


def tunix_family(config: Any) -> str | None:
    """Returns the family of a tunix ``ModelConfig``, or None for any other object.

    A family that is not in `FAMILIES` is named, too, so that an error can name it.
    """
    library, _, rest = type(config).__module__.partition(".models.")
    if library != "tunix":
        return None
    name = rest.partition(".")[0]
    if name == "gemma":  # Gemma 1 or 2: only the second has norms after its layers
        name = "gemma2" if getattr(config, "use_post_ffw_norm", False) else "gemma1"
    return f"tunix/{name}"


def tunix_ties(config: Any) -> bool | None:
    """Returns whether a tunix ``ModelConfig`` ties input and output; None if it does not say."""
    return getattr(config, "use_tied_embedding", getattr(config, "weight_tying", None))
