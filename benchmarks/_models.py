"""The GPT-2 shape of the tests with arrays in it, and training steps of it, one for each peer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1] / "tests" / "helpers"))
sys.path.insert(1, str(Path(__file__).parents[1] / "examples"))

import gpt2_shape
import jax
import jax.numpy as jnp
import optax
from gpt2_shape import Shape as Shape

import flax_tied_lora as tied_lora

ATTENTION, TIED = ["c_attn"], ["wte", "c_attn"]
TINY = Shape(vocabulary=256, positions=32, width=16, heads=2, layers=1, batch=2, length=16)


class Step:
    """A compiled training step with AdamW, and what it carries on: called, it takes one step.

    Adapters and optimizer state are donated; the frozen params are an argument, as users do it.
    """

    def __init__(self, loss: Callable[..., Any], adapters: Any, frozen: Any, rows: jax.Array):
        optimizer = optax.adamw(1e-3, weight_decay=0.01)
        run = gpt2_shape.training_step(loss, optimizer)
        self.carried = jax.tree.map(jnp.copy, (adapters, optimizer.init(adapters)))
        self.frozen, self.rows = frozen, rows
        step = jax.jit(run, donate_argnums=(1, 2))
        self.compiled = step.lower(frozen, *self.carried, rows).compile()

    def __call__(self) -> jax.Array:
        *self.carried, loss = self.compiled(self.frozen, *self.carried, self.rows)
        jax.block_until_ready(self.carried)
        return loss


class Value:
    """A compiled loss, and nothing else."""

    def __init__(self, loss: Callable[..., Any], params: Any, rows: jax.Array):
        self.args = params, rows
        self.compiled = jax.jit(loss).lower(*self.args).compile()

    def __call__(self) -> jax.Array:
        return self.compiled(*self.args).block_until_ready()


def adapted_step(loss: Callable[..., Any], adapted: tied_lora.Adapted, rows: jax.Array) -> Step:
    """Returns a step on ``adapt(loss)``, a loss of plain params and rows of tokens."""
    served = tied_lora.adapt(loss, on_dense="error")

    def of_adapters(adapters: Any, frozen: tied_lora.Adapted, rows: jax.Array) -> Any:
        return served(frozen.replace(adapters=adapters), rows)

    return Step(of_adapters, adapted.adapters, adapted.replace(adapters=None), rows)


def densified_step(loss: Callable[..., Any], adapted: tied_lora.Adapted, rows: jax.Array) -> Step:
    """Returns a step on W + delta, added up."""

    def of_adapters(adapters: Any, frozen: tied_lora.Adapted, rows: jax.Array) -> Any:
        return loss(tied_lora.merge(frozen.replace(adapters=adapters)), rows)

    return Step(of_adapters, adapted.adapters, adapted.replace(adapters=None), rows)


def by_hand_step(s: Shape, adapted: tied_lora.Adapted, rows: jax.Array) -> Step:
    """Returns a step of a model that has the deltas in its own code."""

    def of_deltas(deltas: Any, params: Any, rows: jax.Array) -> Any:
        return plain_loss(params, rows, s=s, deltas=deltas)

    return Step(of_deltas, adapted.adapters["lora"], adapted.params, rows)


def plain_loss(
    params: Any, rows: jax.Array, *, s: Shape, deltas: Any = None, cap: float | None = None
) -> jax.Array:
    logits = gpt2_shape.forward(params, rows[:, :-1], s, deltas)
    if cap:
        logits = cap * jnp.tanh(logits / cap)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def fused_loss(params: Any, rows: jax.Array, *, s: Shape, cap: float | None = None) -> jax.Array:
    """Returns the same without logits."""
    hidden = gpt2_shape.hidden_states(params, rows[:, :-1], s)
    table = params["wte"]["embedding"]
    return tied_lora.losses.linear_cross_entropy(hidden, table, rows[:, 1:], logit_soft_cap=cap)


def random_params(s: Shape) -> Any:
    """Returns params: kernels and tables random, scales 1, biases 0."""

    @jax.jit
    def draw() -> Any:
        shapes, treedef = jax.tree_util.tree_flatten_with_path(gpt2_shape.params(s))
        leaves = []
        for i, (path, leaf) in enumerate(shapes):
            name = path[-1].key
            key = jax.random.fold_in(jax.random.key(0), i)
            drawn = 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
            known = {"scale": jnp.ones, "bias": jnp.zeros}
            leaves.append(known[name](leaf.shape, leaf.dtype) if name in known else drawn)
        return jax.tree.unflatten(treedef, leaves)

    return draw()


def random_rows(s: Shape) -> jax.Array:
    """Returns int32 tokens [batch, length + 1]: inputs, and labels one further."""
    return jax.random.randint(jax.random.key(1), (s.batch, s.length + 1), 0, s.vocabulary)


def wrapped(params: Any, targets: list[str]) -> tied_lora.Adapted:
    config = tied_lora.LoraConfig(
        r=gpt2_shape.RANK, lora_alpha=2 * gpt2_shape.RANK, target_modules=targets
    )
    return shaken(tied_lora.wrap(params, config))


def shaken(adapted: tied_lora.Adapted) -> tied_lora.Adapted:
    """Returns it with factors that are not zero, so that what it computes depends on them."""

    @jax.jit
    def drawn(adapters: Any) -> Any:
        leaves, treedef = jax.tree.flatten(adapters)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        added = [0.002 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.map(jnp.add, adapters, jax.tree.unflatten(treedef, added))

    return adapted.replace(adapters=drawn(adapted.adapters))


def cases(s: Shape, cap: float | None = None) -> dict[str, Step | Value]:
    """Returns the peers on one set of params: name -> what takes a step, or computes a loss."""
    params, rows = random_params(s), random_rows(s)
    plain = functools.partial(plain_loss, s=s, cap=cap)
    fused = functools.partial(fused_loss, s=s, cap=cap)
    attention, tied = wrapped(params, ATTENTION), wrapped(params, TIED)
    found = {
        "unadapted, loss only": Value(plain, params, rows),
        "attention only": adapted_step(plain, attention, rows),
        "tied": adapted_step(plain, tied, rows),
        "tied, linear_cross_entropy": adapted_step(fused, tied, rows),
    }
    if cap is None:
        found["tied by hand"] = by_hand_step(s, tied, rows)
        found["densified"] = densified_step(plain, tied, rows)
    return found
