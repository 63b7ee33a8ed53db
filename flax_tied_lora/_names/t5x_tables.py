"""The tables of names of T5X: its T5, and its scalable T5, which is UMT5, scanned or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flax_tied_lora._names.family import Family
from flax_tied_lora._names.line import make_line
from flax_tied_lora._names.model_config import config_field

_TABLE, _HEAD = "token_embedder/embedding", "decoder/logits_dense/kernel"
# Of a stack, the modules of a layer: attention or MLP, its norm, and what it is in PyTorch.
_MODULES = {
    "encoder": (
        ("attention", "pre_attention_layer_norm", "SelfAttention"),
        ("mlp", "pre_mlp_layer_norm", "DenseReluDense"),
    ),
    "decoder": (
        ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
        ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
        ("mlp", "pre_mlp_layer_norm", "DenseReluDense"),
    ),
}
_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


def _layer(stack: str, in_heads: str, heads_out: str) -> Iterator[tuple[str, str, str, str]]:
    """Yields Flax path, PyTorch name, layout and kind of each leaf of a layer."""
    for i, (ours, norm, theirs) in enumerate(_MODULES[stack]):
        yield f"{norm}/scale", f"layer.{i}.layer_norm.weight", "d -> d", "vector"
        name = f"layer.{i}.{theirs}"
        if ours == "mlp":
            for leaf in ("wi", "wi_0", "wi_1", "wo"):
                yield f"mlp/{leaf}/kernel", f"{name}.{leaf}.weight", "in out -> out in", "linear"
            continue
        for leaf in ("query", "key", "value"):
            yield f"{ours}/{leaf}/kernel", f"{name}.{leaf[0]}.weight", in_heads, "linear"
        yield f"{ours}/out/kernel", f"{name}.o.weight", heads_out, "linear"


def _family(config: Any, lines: list[tuple[str, ...]]) -> Family:
    return Family(
        (
            make_line((_TABLE, "shared.weight", None, "embedding")),
            make_line((_HEAD, "lm_head.weight", None, "linear")),
            *map(make_line, lines),
        ),
        _TABLE,
        shared=("encoder.embed_tokens", "decoder.embed_tokens"),
        tied=bool(config_field(config, "logits_via_embedding")),
        head_leaf=_HEAD,
        ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    )


def _norms(stack: str) -> tuple[str, ...]:
    return f"{stack}/{stack}_norm/scale", f"{stack}.final_layer_norm.weight", "d -> d", "vector"


def _t5(config: Any, _: int | None) -> Family:
    lines: list[tuple[str, ...]] = []
    for stack in _MODULES:
        for path, name, layout, kind in _layer(stack, *["in out -> out in"] * 2):
            lines.append(
                (f"{stack}/layers_{{}}/{path}", f"{stack}.block.{{}}.{name}", layout, kind)
            )
        bias = f"{stack}/relpos_bias/rel_embedding", f"{stack}.block.0.{_BIAS}"
        lines += [(*bias, "head bucket -> bucket head", "embedding"), _norms(stack)]
    return _family(config, lines)


def _umt5(config: Any, _: int | None) -> Family:
    scanned = config_field(config, "scan_layers")
    scanned = True if scanned is None else scanned
    axis = config_field(config, "param_scan_axis")
    lines: list[tuple[str, ...]] = []
    for stack in _MODULES:
        heads = "in heads dim -> (heads dim) in", "heads dim out -> out (heads dim)"
        bias = "relpos_bias/rel_embedding", _BIAS, "head bucket -> bucket head", "embedding"
        for path, name, layout, kind in (*_layer(stack, *heads), bias):
            if not scanned:
                place = f"{stack}/layers_{{}}", f"{stack}.block.{{}}"
            else:
                left, arrow, right = layout.partition(" -> ")
                axes = left.split()
                axes.insert(1 if axis is None else axis, "{layer}")
                layout = " ".join(axes) + arrow + right
                place = f"{stack}/{stack}", f"{stack}.block.{{layer}}"
            lines.append((f"{place[0]}/{path}", f"{place[1]}.{name}", layout, kind))
        lines.append(_norms(stack))
    return _family(config, lines)


FAMILIES: dict[str, Callable[[Any, int | None], Family]] = {"t5x/t5": _t5, "t5x/umt5": _umt5}
_EXAMPLES = {"t5": "t5x/t5", "scalable_t5": "t5x/umt5"}


def t5x_family(config: Any) -> str | None:
    """Returns the family of a T5X ``T5Config``, or None for any other object."""
    library, _, rest = type(config).__module__.partition(".examples.")
    if library != "t5x":
        return None
    example = rest.partition(".")[0]
    return _EXAMPLES.get(example, f"t5x/{example}")
