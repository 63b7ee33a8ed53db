"""A small adapted model, its loss, and a few steps of training it."""

from __future__ import annotations

import jax
import optax

import flax_tied_lora as tied_lora
from tests.helpers.small_models import TOKENS, TiedLM, init, wrapped

MODEL = TiedLM()
PARAMS = init(MODEL)
TABLE = "embed_tokens/embedding"
ADAPTED = wrapped(PARAMS, ["embed_tokens", "up"])
APPLY = tied_lora.adapt(MODEL.apply, on_dense="error")


def loss_fn(adapted, tokens):
    logits = APPLY({"params": adapted}, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def fresh():
    config = tied_lora.LoraConfig(r=2, target_modules=["embed_tokens", "up"])
    return tied_lora.wrap(PARAMS, config)


def fit(optimizer, steps=3, adapted=None):
    """Returns the adapted model and the optimizer's state after some steps."""
    adapted = fresh() if adapted is None else adapted
    state = optimizer.init(adapted.adapters)

    @jax.jit
    def step(adapted, state):
        loss, grads = tied_lora.value_and_grad(loss_fn)(adapted, TOKENS)
        updates, state = optimizer.update(grads, state, adapted.adapters)
        adapters = optax.apply_updates(adapted.adapters, updates)
        return adapted.replace(adapters=adapters), state, loss

    losses = []
    for _ in range(steps):
        adapted, state, loss = step(adapted, state)
        losses.append(float(loss))
    return adapted, state, losses
