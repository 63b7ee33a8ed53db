"""Lines of decoders that call a layer's modules as Hugging Face does, with leaves of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax_tied_lora._names.family import Family
from flax_tied_lora._names.line import make_line

LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*LLAMA_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")

_IN_OUT, _OUT_IN = "in out -> out in", "out in -> out in"
_MLP = ("gate", "up", "down")
# Layouts of a layer's projections: flat kernels; with an axis of heads; Haliax's, outputs first.
FLAT: dict[str, str] = dict.fromkeys((*"qkvo", *_MLP), _IN_OUT)
HEADS = {
    **dict.fromkeys("qkv", "in heads dim -> (heads dim) in"),
    "o": "heads dim out -> out (heads dim)",
    **dict.fromkeys(_MLP, _IN_OUT),
}
OUTPUTS_FIRST = {
    "q": "kv group dim in -> (kv group dim) in",
    **dict.fromkeys("kv", "kv dim in -> (kv dim) in"),
    "o": "out heads dim -> out (heads dim)",
    **dict.fromkeys(_MLP, _OUT_IN),
}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How a library stores a decoder.

    Attributes:
      table: path of the input embedding.
      layers: path of the layers, or of a stack of them.
      last_norm: path of the norm behind them.
      head: path of the output projection's leaf, where there is one.
      leaf, scale: names of a projection's leaf, and of a norm's.
      layouts: of a layer's projections, one of those above.
      stacked: whether all layers are one leaf, along its first axis.
      attention: name of a layer's attention.
      norms, head_norms: names of a layer's norms, and of those in its attention.
    """

    table: str
    layers: str
    last_norm: str
    head: str
    leaf: str
    scale: str
    layouts: Mapping[str, str]
    stacked: bool = False
    attention: str = "self_attn"
    norms: Sequence[str] = LLAMA_NORMS
    head_norms: Sequence[str] = ()

    def family(self, **fields: Any) -> Family:
        """Returns what is known of it; ``fields`` are more of `Family`."""
        head = _OUT_IN if self.layouts is OUTPUTS_FIRST else _IN_OUT
        lines: list[tuple[str, ...]] = [
            (self.table, "model.embed_tokens.weight", "row column -> row column", "embedding"),
            (self.head, "lm_head.weight", head),
            (f"{self.last_norm}/{self.scale}", "model.norm.weight", "d -> d"),
        ]
        for p, layout in self.layouts.items():
            ours, theirs = ("mlp", "mlp") if p in _MLP else (self.attention, "self_attn")
            lines.append(self._line(f"{ours}/{p}_proj/{self.leaf}", f"{theirs}.{p}_proj", layout))
        names = {n: n for n in self.norms}
        names |= {f"{self.attention}/{n}": f"self_attn.{n}" for n in self.head_norms}
        lines += [self._line(f"{f}/{self.scale}", t, "d -> d") for f, t in names.items()]
        return Family(
            tuple(make_line(x, "linear") for x in lines),
            self.table,
            head_leaf=self.head,
            ignored=(r"(.*\.)?rotary_emb\.inv_freq",),
            **fields,
        )

    def _line(self, path: str, name: str, layout: str) -> tuple[str, ...]:
        if self.stacked:
            stack = f"{self.layers}/{path}", f"model.layers.{{layer}}.{name}.weight"
            return *stack, f"{{layer}} {layout}"
        return f"{self.layers}/{{}}/{path}", f"model.layers.{{}}.{name}.weight", layout
