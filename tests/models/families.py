"""Model families of transformers' Flax classes, tiny, with small random weights.

Nothing is downloaded: each model is built from a config, and its weights are drawn here rather
than by the class, whose deviation of 0.02 leaves attention all but uniform and biases at zero.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

# Three widths make a vocabulary: a fused q, k, v kernel then has the table's shape.
VOCABULARY, WIDTH, LAYERS, HEADS, WIDE, LENGTH = 96, 32, 2, 4, 64, 16
TOKENS = np.random.default_rng(0).integers(4, VOCABULARY, (2, 7)).astype(np.int32)
LABELS = np.random.default_rng(1).integers(4, VOCABULARY, (2, 7)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family, and what its trace must show.

    Attributes:
      model: name of the Flax class in transformers.
      config: name of the config class, and its fields.
      table: leaf path of the tied table.
      attention: targets that name the attention projections.
      kernels: how many kernels those name.
      head: module scope, below the model, in which the table is the output projection.
      lookups: how often the table's rows are looked up.
      reads: how often an attention kernel is read.
      inputs: further arguments of the module: masks and positions.
      first_position, token_type: what the model fills in where they are not given.
      mode: keyword of the model that turns its own dropout off.
      untied_head: leaf that the class has where others read the table: to be tied by declaring it.
    """

    model: str
    config: tuple[str, dict[str, Any]]
    table: str
    attention: tuple[str, ...]
    kernels: int
    head: str = "lm_head"
    lookups: int = 1
    reads: int = 1
    inputs: tuple[str, ...] = ("attention_mask", "position_ids")
    mode: tuple[str, bool] = ("train", False)
    first_position: int = 0
    token_type: int = 0
    untied_head: str | None = None

    @property
    def targets(self) -> list[str]:
        """The table and the attention projections."""
        return [self.table.split("/")[-2], *self.attention]

    @property
    def ties(self) -> Any:
        """What has to be declared about ties."""
        return [(self.table, self.untied_head)] if self.untied_head else "auto"

    @property
    def encodes(self) -> bool:
        """Whether there is an encoder beside the decoder."""
        return self.lookups == 2


_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_QKV_OUT = ("q_proj", "k_proj", "v_proj", "out_proj")
_BERT = ("query", "key", "value", "attention/output/dense")
_BERT_INPUTS = ("attention_mask", "token_type_ids", "position_ids", "head_mask")
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "max_position_embeddings": LENGTH,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2, "tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "FlaxGPT2LMHeadModel",
        (
            "GPT2Config",
            {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
             "n_positions": LENGTH},
        ),
        "transformer/wte/embedding",
        ("c_attn", "attn/c_proj"),
        4,
    ),
    "gpt_neo": Family(
        "FlaxGPTNeoForCausalLM",
        (
            "GPTNeoConfig",
            {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": LAYERS,
             "num_heads": HEADS, "attention_types": [[["global", "local"], 1]],
             "window_size": 4, "intermediate_size": WIDE, "max_position_embeddings": LENGTH},
        ),
        "transformer/wte/embedding",
        _QKV_OUT,
        8,
    ),
    "opt": Family(
        "FlaxOPTForCausalLM",
        (
            "OPTConfig",
            {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
             "num_attention_heads": HEADS, "ffn_dim": WIDE, "word_embed_proj_dim": WIDTH,
             "max_position_embeddings": LENGTH},
        ),
        "model/decoder/embed_tokens/embedding",
        _QKV_OUT,
        8,
        mode=("deterministic", True),
    ),
    "bloom": Family(
        "FlaxBloomForCausalLM",
        (
            "BloomConfig",
            {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
        ),
        "transformer/word_embeddings/embedding",
        ("query_key_value", "self_attention/dense"),
        4,
        inputs=("attention_mask",),
    ),
    "gemma": Family(
        "FlaxGemmaForCausalLM",
        ("GemmaConfig", {**_GROUPED, "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}),
        "model/embed_tokens/embedding",
        _QKVO,
        8,
    ),
    "llama": Family(
        "FlaxLlamaForCausalLM",
        ("LlamaConfig", _GROUPED),
        "model/embed_tokens/embedding",
        _QKVO,
        8,
        untied_head="lm_head/kernel",
    ),
    "mistral": Family(
        "FlaxMistralForCausalLM",
        ("MistralConfig", {**_GROUPED, "sliding_window": 4}),
        "model/embed_tokens/embedding",
        _QKVO,
        8,
        untied_head="lm_head/kernel",
    ),
    "xglm": Family(
        "FlaxXGLMForCausalLM",
        (
            "XGLMConfig",
            {"vocab_size": VOCABULARY, "d_model": WIDTH, "num_layers": LAYERS,
             "attention_heads": HEADS, "ffn_dim": WIDE, "max_position_embeddings": LENGTH},
        ),
        "model/embed_tokens/embedding",
        _QKV_OUT,
        8,
    ),
    "bert": Family(
        "FlaxBertForMaskedLM",
        ("BertConfig", _PLAIN),
        "bert/embeddings/word_embeddings/embedding",
        _BERT,
        8,
        head="cls/predictions/decoder",
        inputs=_BERT_INPUTS,
    ),
    "roberta": Family(
        "FlaxRobertaForMaskedLM",
        ("RobertaConfig", _PLAIN),
        "roberta/embeddings/word_embeddings/embedding",
        _BERT,
        8,
        head="lm_head/decoder",
        inputs=_BERT_INPUTS,
        first_position=2,
    ),
    "albert": Family(
        "FlaxAlbertForMaskedLM",
        ("AlbertConfig", {**_PLAIN, "embedding_size": 16}),
        "albert/embeddings/word_embeddings/embedding",
        ("query", "key", "value", "attention/dense"),
        4,
        head="predictions/decoder",
        reads=LAYERS,  # one layer, applied twice
        inputs=("attention_mask", "token_type_ids", "position_ids"),
    ),
    "electra": Family(
        "FlaxElectraForMaskedLM",
        ("ElectraConfig", {**_PLAIN, "embedding_size": 16}),
        "electra/embeddings/word_embeddings/embedding",
        _BERT,
        8,
        head="generator_lm_head",
        inputs=_BERT_INPUTS,
        token_type=1,
    ),
    "distilbert": Family(
        "FlaxDistilBertForMaskedLM",
        (
            "DistilBertConfig",
            {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS,
             "hidden_dim": WIDE, "max_position_embeddings": LENGTH},
        ),
        "distilbert/embeddings/word_embeddings/embedding",
        ("q_lin", "k_lin", "v_lin", "out_lin"),
        8,
        head="vocab_projector",
        inputs=("attention_mask",),
    ),
    "t5": Family(
        "FlaxT5ForConditionalGeneration",
        (
            "T5Config",
            {"vocab_size": VOCABULARY, "d_model": WIDTH, "num_layers": LAYERS,
             "num_heads": HEADS, "d_kv": 8, "d_ff": WIDE, "decoder_start_token_id": 0},
        ),
        "shared/embedding",
        ("q", "k", "v", "o"),
        24,
        lookups=2,
        inputs=("attention_mask", "decoder_attention_mask"),
    ),
    "bart": Family(
        "FlaxBartForConditionalGeneration",
        (
            "BartConfig",
            {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": LAYERS,
             "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
             "decoder_attention_heads": HEADS, "encoder_ffn_dim": WIDE, "decoder_ffn_dim": WIDE,
             "max_position_embeddings": LENGTH},
        ),
        "model/shared/embedding",
        _QKV_OUT,
        24,
        lookups=2,
        inputs=(
            "attention_mask", "decoder_attention_mask", "position_ids", "decoder_position_ids"
        ),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of a family with its weights."""

    family: Family
    model: Any
    params: Any

    def call(self, params: Any, tokens: Any) -> Any:
        """Returns logits of the model, called as people call it."""
        decoder = {"decoder_input_ids": tokens[:, ::-1]} if self.family.encodes else {}
        mode, value = self.family.mode
        return self.model(tokens, params=params, **decoder, **{mode: value}).logits

    def apply(self, variables: Any, tokens: Any) -> Any:
        """Returns logits of the model's Flax module."""
        decoder = {"decoder_input_ids": tokens[:, ::-1]} if self.family.encodes else {}
        inputs = {name: self._input(name, tokens) for name in self.family.inputs}
        return self.model.module.apply(variables, input_ids=tokens, **decoder, **inputs).logits

    def _input(self, name: str, tokens: Any) -> Any:
        if name == "head_mask":
            return np.ones((LAYERS, HEADS), np.int32)
        if name.endswith("position_ids"):
            positions = np.arange(tokens.shape[1], dtype=np.int32) + self.family.first_position
            return np.broadcast_to(positions, tokens.shape)
        fill = self.family.token_type if name == "token_type_ids" else 1
        return np.full(tokens.shape, fill, np.int32)


@functools.cache
def build(name: str, dtype: Any = jnp.float32) -> Case:
    """Returns a family's model that computes in ``dtype``; its weights are float32."""
    family = FAMILIES[name]
    kind, fields = family.config
    config = getattr(transformers, kind)(**fields)
    model = getattr(transformers, family.model)(config, dtype=dtype, _do_init=False)
    return Case(family, model, random_weights(model.params_shape_tree))


def random_weights(shapes: Any) -> Any:
    """Returns arrays of these shapes: scales around one, all else around zero, deviation 0.15."""
    rng = np.random.default_rng(7)

    def draw(path: Any, leaf: Any) -> jax.Array:
        around = 1.0 if len(leaf.shape) == 1 and path[-1].key in ("scale", "weight") else 0.0
        return jnp.asarray(around + 0.15 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.tree.map(lambda x: x, dict(shapes)))


@pytest.fixture(scope="module", autouse=True)
def clip_of_old_jax():
    """Gives ``jnp.clip`` its old names ``a_min`` and ``a_max``, by which Flax T5 calls it."""
    clip = jnp.clip

    def with_old_names(x: Any, *bounds: Any, a_min: Any = None, a_max: Any = None) -> Any:
        return clip(x, *bounds) if bounds else clip(x, min=a_min, max=a_max)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "clip", with_old_names)
        yield
