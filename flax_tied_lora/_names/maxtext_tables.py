"""The tables of names of MaxText's families: scanned layers, scaled queries, padded tables.

What is scaled, interleaved and shifted is what MaxText's own converter does on the way from Hugging
Face (``maxtext.checkpoint_conversion``), undone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_tied_lora._names.axis_maps import AxisMap, Interleaved, Offset, Padding, Scale
from flax_tied_lora._names.family import Family, config_field
from flax_tied_lora._names.line import Line, make_line

_IN_HEADS = "in heads dim -> (heads dim) in"
_PROJECTIONS = (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
_GEMMA_NORMS = {
    "pre_self_attention_norm": "input_layernorm",
    "post_self_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LLAMA_NORMS = {
    "pre_self_attention_layer_norm": "input_layernorm",
    "post_self_attention_layer_norm": "post_attention_layernorm",
}
# Gemma 3 is scanned by the period of its attention: five local layers and a global one.
_PERIOD = 6
_FIELDS = (
    "head_dim, emb_dim, num_decoder_layers, vocab_size, scan_layers, param_scan_axis and "
    "logits_via_embedding"
)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a layer's leaves are.

    Attributes:
      path: pattern of the block's Flax path.
      name: pattern of the layer's PyTorch name.
      index: of the layer along the scanned axis, or a placeholder of ``name``; None: not scanned.
      half: what ends the names of the block's modules, where a block is two layers.
    """

    path: str
    name: str
    index: str | None = None
    half: str = ""


def _field(config: Any, name: str) -> Any:
    value = config_field(config, name)
    if value is None:
        raise ValueError(
            f"names_of: MaxText's tables depend on its config, and {name} is missing; give "
            "pyconfig's config, or a dict with model_type ('maxtext/llama', ...), " + _FIELDS
        )
    return value


def _family(
    config: Any,
    vocab_size: int | None,
    places: Iterator[_Place],
    *,
    norms: Mapping[str, str],
    query: tuple[AxisMap, ...] = (),
    key: tuple[AxisMap, ...] = (),
    head_norms: bool = False,
    table: tuple[AxisMap, ...] = (),
    gemma: bool = False,
) -> Family:
    """Returns what is known of a family.

    Args:
      places: of the layers.
      norms: ``{Flax module: PyTorch module}`` of a layer's.
      query, key: maps of a head's entries.
      head_norms: whether queries and keys are normalised.
      table: maps of the input embedding's columns.
      gemma: whether norms are stored 1 more than in PyTorch.
    """
    scan_axis = _field(config, "param_scan_axis") if _field(config, "scan_layers") else 0
    norm_maps = {"d": Offset(-1.0)} if gemma else {}
    lines: list[Line] = []

    def add(place: _Place, module: str, name: str, layout: str, maps: Any = None) -> None:
        left, arrow, right = layout.partition(" -> ")
        axes = left.split()
        if place.index is not None:
            axes.insert(scan_axis, place.index)
        first, slash, rest = module.partition("/")
        path = f"{place.path}/{first}{place.half}{slash}{rest}"
        kind = "vector" if " " not in left else "linear"
        layout = " ".join(axes) + arrow + right
        lines.append(make_line((path, f"{place.name}.{name}.weight", layout, kind, maps or {})))

    for place in places:
        for ours, theirs, maps in (("query", "q", query), ("key", "k", key), ("value", "v", ())):
            leaf, name = f"self_attention/{ours}/kernel", f"self_attn.{theirs}_proj"
            add(place, leaf, name, _IN_HEADS, {"dim": maps} if maps else None)
        out = "heads dim out -> out (heads dim)"
        add(place, "self_attention/out/kernel", "self_attn.o_proj", out)
        for ours, theirs in _PROJECTIONS:
            add(place, f"mlp/{ours}/kernel", f"mlp.{theirs}_proj", "in out -> out in")
        of_heads = {"query": "q", "key": "k"} if head_norms else {}
        inner = {f"self_attention/{f}_norm": f"self_attn.{t}_norm" for f, t in of_heads.items()}
        for ours, theirs in (norms | inner).items():
            add(place, f"{ours}/scale", theirs, "d -> d", norm_maps)
    rows = _padding(_field(config, "vocab_size"), vocab_size)
    columns = {"column": table} if table else {}
    embedding, head = "token_embedder/embedding", "decoder/logits_dense/kernel"
    tied = bool(_field(config, "logits_via_embedding"))
    return Family(
        (
            *lines,
            make_line((embedding, "model.embed_tokens.weight", "row column -> row column",
                       "embedding", {**columns, **({"row": rows} if rows else {})})),
            make_line((head, "lm_head.weight", "in out -> out in", "linear",
                       {"out": rows} if rows else {})),
            make_line(("decoder/decoder_norm/scale", "model.norm.weight", "d -> d", "vector",
                       norm_maps)),
        ),
        embedding,
        tied=tied,
        head_leaf=head,
        ignored=(r"(.*\.)?rotary_emb\.inv_freq",),
    )  # fmt: skip


def _padding(rows: int, vocab_size: int | None) -> Padding | None:
    same = vocab_size is None or rows == vocab_size
    return None if same else Padding(leaf=rows, torch=vocab_size)


def _layers(config: Any) -> Iterator[_Place]:
    """Yields where the layers are: each in a block of its own, or all of them stacked."""
    if _field(config, "scan_layers"):
        yield _Place("decoder/layers", "model.layers.{layer}", "{layer}")
    else:
        yield _Place("decoder/layers_{}", "model.layers.{}")


def _llama(config: Any, vocab_size: int | None) -> Family:
    # As MaxText chooses its rotary embedding; only that of Llama 3.1 turns neighbours.
    names = (str(config_field(config, "model_name")), _value(config_field(config, "rope_type")))
    turned = (Interleaved(),) if any(n.startswith("llama3.1") for n in names) else ()
    query = (*turned, Scale(math.sqrt(_field(config, "head_dim"))))
    return _family(config, vocab_size, _layers(config), norms=_LLAMA_NORMS, query=query, key=turned)


def _qwen3(config: Any, vocab_size: int | None) -> Family:
    return _family(config, vocab_size, _layers(config), norms=_LLAMA_NORMS, head_norms=True)


def _gemma2(config: Any, vocab_size: int | None) -> Family:
    scanned = _field(config, "scan_layers")

    def places() -> Iterator[_Place]:
        for i in range(_field(config, "num_decoder_layers")):  # each a local layer and a global one
            for j, half in enumerate(("_local", "_global")):
                path = "decoder/layers" if scanned else f"decoder/layers_{i}"
                index = str(i) if scanned else None
                yield _Place(path, f"model.layers.{2 * i + j}", index, half)

    query = (Scale(math.sqrt(_field(config, "head_dim"))),)
    table = (Scale(1 / math.sqrt(_field(config, "emb_dim"))),)
    return _family(
        config, vocab_size, places(), norms=_GEMMA_NORMS, query=query, table=table, gemma=True
    )


def _gemma3(config: Any, vocab_size: int | None) -> Family:
    layers = _field(config, "num_decoder_layers")
    whole = layers - layers % _PERIOD

    def places() -> Iterator[_Place]:
        if not _field(config, "scan_layers"):
            yield from _layers(config)
            return
        for i in range(whole):
            path = f"decoder/layers/layers_{i % _PERIOD}"
            yield _Place(path, f"model.layers.{i}", str(i // _PERIOD))
        for i in range(whole, layers):
            yield _Place(f"decoder/layers_remainder/layers_{i - whole}", f"model.layers.{i}")

    # Its converter rounds the root to bfloat16; that of Gemma 2 does not.
    root = float(np.asarray(math.sqrt(_field(config, "emb_dim"))).astype(jnp.bfloat16))
    return _family(
        config, vocab_size, places(), norms=_GEMMA_NORMS, head_norms=True,
        table=(Scale(1 / root),), gemma=True,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[Any, int | None], Family]] = {
    "maxtext/llama": _llama,
    "maxtext/qwen3": _qwen3,
    "maxtext/gemma2": _gemma2,
    "maxtext/gemma3": _gemma3,
}


def maxtext_family(config: Any) -> str | None:
    """Returns the family of a MaxText config, or None for any other object.

    A family that is not in `FAMILIES` is named, too, so that an error can name it.
    """
    if not type(config).__module__.lower().startswith("maxtext."):
        return None
    block = _value(config_field(config, "decoder_block"))
    return f"maxtext/{'llama' if block == 'llama2' else block}"


def _value(of_enum: Any) -> str:
    return str(getattr(of_enum, "value", of_enum))
