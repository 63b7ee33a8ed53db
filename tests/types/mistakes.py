"""Mistakes that a type checker finds, each on a line that says so."""

from pathlib import Path

import jax

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint, names, peft

Params = dict[str, dict[str, jax.Array]]


def apply(params: Params, tokens: jax.Array, scale: float = 1.0) -> jax.Array:
    return scale * params["embed"]["embedding"][tokens]


def loss_fn(params: Params, tokens: jax.Array) -> jax.Array:
    return apply(params, tokens).sum()


def mistakes(params: Params, tokens: jax.Array, folder: Path) -> None:
    config = tied_lora.LoraConfig(r=8, target_modules=["embed"])
    tied_lora.LoraConfig(lora_rank=8)  # mistake: a field that there is not
    tied_lora.LoraConfig(bias="nonsense")  # mistake: none of the values
    tied_lora.LoraConfig(target_modules=8)  # mistake: a number for names
    adapted = tied_lora.wrap(params, config)
    adapted.replace(adapter=adapted.adapters)  # mistake: a misspelt keyword
    tied_lora.merge(params)  # mistake: no Adapted
    tied_lora.adapt(apply)(adapted, tokens, scales=2.0)  # mistake: a misspelt keyword
    tied_lora.value_and_grad(loss_fn)  # mistake: a function of plain params, not adapted
    tied_lora.wrap(params, config, ties="embed")  # mistake: no ties
    merged: jax.Array = tied_lora.merge(adapted)  # mistake: params are no array
    table = names.names_of("gpt2")
    peft.load_adapter(folder, params, table, tied_copies="together")  # mistake: none of the values
    checkpoint.restore(8, params)  # mistake: a number for a path
    tied_lora.AdaptedModel(apply, params)  # mistake: no Adapted
    tied_lora.nnx.wrap(params, config)  # mistake: no module
    tied_lora.adapt(apply, on_dense=True)  # mistake: none of the values
    print(merged)
