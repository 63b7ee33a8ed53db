"""What a model class of transformers' Flax families is called, and what its trace must show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# Three widths make a vocabulary: a fused q, k, v kernel then has the table's shape.
VOCABULARY, WIDTH, LAYERS, HEADS, WIDE, LENGTH = 96, 32, 2, 4, 64, 16

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
QKV_OUT = ("q_proj", "k_proj", "v_proj", "out_proj")
BERT = ("query", "key", "value", "attention/output/dense")
GPT2 = ("c_attn", "attn/c_proj")

PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "max_position_embeddings": LENGTH,
}
GPT2_FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": LENGTH,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A class of a family, and what its trace must show.

    Attributes:
      model: name of the Flax class in transformers.
      config: name of the config class, and its fields; of a model of two, those of each part.
      table: leaf path of the tied table.
      attention: targets that name the attention projections.
      kernels: how many kernels those name.
      head: module scope, below the model, in which the table is the output projection.
      lookups: how often the table's rows are looked up.
      mode: keyword of the model that turns its own dropout off.
      untied_head: leaf that the class has where others read the table: the config says that it is
        tied, or it has to be declared.
      encoder: what the encoder of an encoder-decoder reads: "tokens", "features", "pixels",
        "waves"; "" for a model that is no encoder-decoder.
      generates: whether ``generate`` is there, and works.
      checkpoint: whether the model is run with gradient checkpointing.
      length: of the tokens, where it has to be another than 7.
      declared_untied: the model's config says that its table is not tied: the class ties it all the
        same, or cannot, so that it has to be declared.
      slow: whether decoding is left to the slow tests, as another family is much like it.
      unread: part of the paths of leaves that the model has and does not use here.
    """

    model: str
    config: tuple[str, Mapping[str, Any]]
    table: str
    attention: tuple[str, ...]
    kernels: int
    head: str = "lm_head"
    lookups: int = 1
    mode: tuple[str, bool] = ("train", False)
    untied_head: str | None = None
    encoder: str = ""
    generates: bool = False
    checkpoint: bool = False
    length: int = 7
    declared_untied: bool = False
    unread: str = ""
    slow: bool = False

    @property
    def targets(self) -> list[str]:
        """The table and the attention projections."""
        return [self.table.split("/")[-2], *self.attention]

    @property
    def ties(self) -> Any:
        """What has to be declared about ties where the model's config is not given."""
        return [(self.table, self.untied_head)] if self.untied_head else "auto"

    @property
    def encodes(self) -> bool:
        """Whether there is an encoder beside the decoder."""
        return bool(self.encoder)

    @property
    def of_two(self) -> bool:
        """Whether the model is an encoder of one family with a decoder of another."""
        return "encoder" in self.config[1]
