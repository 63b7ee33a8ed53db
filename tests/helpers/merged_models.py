"""Small params, adapted, and configs of their PyTorch models, for the tests of merged export."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flax_tied_lora as tied_lora
from flax_tied_lora.names import names_of
from tests.helpers.name_tables import draw

OWN_CONFIG = {"model_type": "own", "vocab_size": 7, "hidden_size": 4}
SHAPES = {
    "transformer/wte/embedding": (9, 4),
    "transformer/wpe/embedding": (5, 4),
    "transformer/h/0/attn/c_attn/kernel": (12, 4),
    "transformer/h/0/attn/c_attn/bias": (12,),
    "transformer/h/0/mlp/c_fc/kernel": (16, 4),
    "transformer/h/0/mlp/c_fc/bias": (16,),
    "transformer/ln_f/scale": (4,),
}
CONFIG = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 4, "architectures": ["GPT2LMHeadModel"]}
# Flax's Llama has a leaf for the head beside the table.
LLAMA_SHAPES = {
    "model/embed_tokens/embedding": (9, 4),
    "model/layers/0/mlp/up_proj/kernel": (4, 6),
    "model/norm/weight": (4,),
    "lm_head/kernel": (4, 9),
}
LLAMA = {"model_type": "llama", "vocab_size": 9, "hidden_size": 4, "tie_word_embeddings": True}
LLAMA_TIE = [("model/embed_tokens/embedding", "lm_head/kernel")]
NAMES = names_of("gpt2")


def random(adapted: tied_lora.Adapted, seed: int = 5) -> tied_lora.Adapted:
    rng = np.random.default_rng(seed)
    return adapted.replace(
        adapters=jax.tree.map(
            lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), adapted.adapters
        )
    )


def gpt2(dtype: Any = np.float32, **fields: Any) -> tied_lora.Adapted:
    fields = {"r": 2, "target_modules": ["wte", "c_attn", "c_fc"], **fields}
    return random(tied_lora.wrap(draw(SHAPES, dtype), tied_lora.LoraConfig(**fields)))


def llama(params: Any = None, ties: Any = LLAMA_TIE, **fields: Any) -> tied_lora.Adapted:
    fields = {"r": 2, "target_modules": ["embed_tokens", "up_proj"], **fields}
    params = draw(LLAMA_SHAPES) if params is None else params
    return random(tied_lora.wrap(params, tied_lora.LoraConfig(**fields), ties=ties))


def tied_llama() -> Any:
    params = draw(LLAMA_SHAPES)
    params["lm_head"]["kernel"] = params["model"]["embed_tokens"]["embedding"].T.copy()
    return params
