"""The same training here and in PyTorch: batches, loss and AdamW's hyper-parameters."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import torch

import flax_tied_lora as tied_lora
from tests.against_torch.torch_models import VOCABULARY, Pair

STEPS = 20
RATE, DECAY, EPSILON, BETAS = 5e-3, 0.1, 1e-8, (0.9, 0.99)
# [steps, inputs and labels, batch, length]; new data for each step.
BATCHES = np.random.default_rng(3).integers(0, VOCABULARY, (STEPS, 2, 3, 9)).astype(np.int32)


def our_adamw() -> optax.GradientTransformation:
    """Returns Optax's AdamW with the hyper-parameters of `torch_adamw`."""
    return optax.adamw(RATE, *BETAS, eps=EPSILON, weight_decay=DECAY)


def torch_adamw(parameters: Any) -> torch.optim.Optimizer:
    """Returns PyTorch's AdamW: as Optax's, its decay is times the rate and not in the gradient."""
    return torch.optim.AdamW(parameters, RATE, BETAS, eps=EPSILON, weight_decay=DECAY)


def train_here(
    both: Pair, adapted: tied_lora.Adapted, optimizer: Any, steps: int = STEPS
) -> tuple[tied_lora.Adapted, list[float]]:
    """Returns the adapted model after some steps, and the losses."""

    def logits(params: Any, tokens: Any) -> Any:
        return both.flax(tokens, params=params, train=False).logits

    apply = tied_lora.adapt(logits, on_dense="error")

    def loss(adapted: Any, batch: Any) -> Any:
        found = apply(adapted, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(found, batch[1]).mean()

    @jax.jit
    def step(adapted: Any, state: Any, batch: Any) -> Any:
        value, grads = tied_lora.value_and_grad(loss)(adapted, batch)
        updates, state = optimizer.update(grads, state, adapted.adapters)
        adapters = optax.apply_updates(adapted.adapters, updates)
        return adapted.replace(adapters=adapters), state, value

    state, losses = optimizer.init(adapted.adapters), []
    for batch in BATCHES[:steps]:
        adapted, state, value = step(adapted, state, batch)
        losses.append(float(value))
    return adapted, losses


def train_there(model: Any, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> list[float]:
    """Trains a PyTorch model in place; returns the losses."""
    losses = []
    for batch in BATCHES[:steps]:
        inputs, labels = torch.from_numpy(batch).long()
        found = model(inputs).logits
        value = torch.nn.functional.cross_entropy(found.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
