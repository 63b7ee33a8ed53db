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

from flax_tied_lora._names.axis_map import AxisMap
from flax_tied_lora._names.axis_maps import Interleaved, Offset, Padding, Scale
from flax_tied_lora._names.family import Family
from flax_tied_lora._names.line import make_line
from flax_tied_lora._names.model_config import config_field

_IN_HEADS = "in heads dim -> (heads dim) in"
_HEADS_OUT = "heads dim out -> out (heads dim)"
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


@dataclasses.dataclass(frozen=True)
class _Form:
    """What a family has of its own.

    Attributes:
      norms: ``{Flax module: PyTorch module}`` of a layer's.
      query, key: maps of a head's entries.
      head_norms: whether queries and keys are normalised.
      table: maps of the input embedding's columns.
      offset: what norms have more than in PyTorch.
    """

    norms: Mapping[str, str]
    query: tuple[AxisMap, ...] = ()
    key: tuple[AxisMap, ...] = ()
    head_norms: bool = False
    table: tuple[AxisMap, ...] = ()
    offset: float = 0.0

    @property
    def norm_maps(self) -> dict[str, AxisMap]:
        return {"d": Offset(-self.offset)} if self.offset else {}

    def layer(self) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
        """Yields Flax path, PyTorch module, layout and maps of each leaf of a layer."""
        attention = {"query": ("q", self.query), "key": ("k", self.key), "value": ("v", ())}
        for ours, (theirs, maps) in attention.items():
            of_heads = {"dim": maps} if maps else {}
            yield f"self_attention/{ours}/kernel", f"self_attn.{theirs}_proj", _IN_HEADS, of_heads
        yield "self_attention/out/kernel", "self_attn.o_proj", _HEADS_OUT, {}
        for ours, theirs in _PROJECTIONS:
            yield f"mlp/{ours}/kernel", f"mlp.{theirs}_proj", "in out -> out in", {}
        inner = {"query": "q", "key": "k"} if self.head_norms else {}
        heads = {f"self_attention/{f}_norm": f"self_attn.{t}_norm" for f, t in inner.items()}
        for ours, theirs in {**self.norms, **heads}.items():
            yield f"{ours}/scale", theirs, "d -> d", self.norm_maps


def _family(config: Any, vocab_size: int | None, places: Iterator[_Place], form: _Form) -> Family:
    """Returns what is known of a family with layers in these places."""
    scan_axis = _field(config, "param_scan_axis") if _field(config, "scan_layers") else 0
    rows = _padding(_field(config, "vocab_size"), vocab_size)
    embedding, head = "token_embedder/embedding", "decoder/logits_dense/kernel"
    of_table = {"column": form.table} if form.table else {}
    of_rows = {"row": rows} if rows else {}
    lines = [
        (embedding, "model.embed_tokens.weight", None, "embedding", {**of_table, **of_rows}),
        (head, "lm_head.weight", None, "linear", {"out": rows} if rows else {}),
        ("decoder/decoder_norm/scale", "model.norm.weight", "d -> d", "vector", form.norm_maps),
    ]
    for place in places:
        for leaf, module, layout, maps in form.layer():
            left, arrow, right = layout.partition(" -> ")
            axes = left.split()
            kind = "linear" if len(axes) > 1 else "vector"
            if place.index is not None:
                axes.insert(scan_axis, place.index)
            first, slash, rest = leaf.partition("/")
            path = f"{place.path}/{first}{place.half}{slash}{rest}"
            name = f"{place.name}.{module}.weight"
            lines.append((path, name, " ".join(axes) + arrow + right, kind, maps))
    return Family(
        tuple(map(make_line, lines)),
        embedding,
        tied=bool(_field(config, "logits_via_embedding")),
        head_leaf=head,
        ignored=(r"(.*\.)?rotary_emb\.inv_freq",),
    )


def _padding(rows: int, vocab_size: int | None) -> Padding | None:
    if vocab_size is None or rows == vocab_size:
        return None
    return Padding(leaf=rows, torch=vocab_size)


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
    form = _Form(_LLAMA_NORMS, query=query, key=turned)
    return _family(config, vocab_size, _layers(config), form)


def _qwen3(config: Any, vocab_size: int | None) -> Family:
    return _family(config, vocab_size, _layers(config), _Form(_LLAMA_NORMS, head_norms=True))


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
    form = _Form(_GEMMA_NORMS, query=query, table=table, offset=1.0)
    return _family(config, vocab_size, places(), form)


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
    form = _Form(_GEMMA_NORMS, head_norms=True, table=(Scale(1 / root),), offset=1.0)
    return _family(config, vocab_size, places(), form)


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
