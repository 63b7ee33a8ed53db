"""Small Linen models for the unit tests: a tied table, attention kernels, stacked layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import flax_tied_lora as tied_lora

VOCAB, WIDTH, HEADS, HEAD_DIM, LAYERS = 12, 8, 2, 4, 3
TOKENS = np.array([[1, 2, 3], [4, 5, 1]], np.int32)


class TiedLM(nn.Module):
    """Embedding, one dense layer, and logits by the embedding again."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(VOCAB, WIDTH, name="embed_tokens")
        x = embed(tokens)
        x = x + jnp.tanh(nn.Dense(WIDTH, name="up")(x))
        return embed.attend(x)


class Layer(nn.Module):
    """Attention's kernels, [d, heads, head_dim] and [heads, head_dim, d], without the softmax."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        heads = nn.DenseGeneral((HEADS, HEAD_DIM), name="q_proj")(x)
        return x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="o_proj")(jnp.tanh(heads))


class Step(nn.Module):
    """A layer in the form that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x: Any, _: None) -> Any:
        return Layer(name="layer")(x), None


class StackedLM(nn.Module):
    """Embedding, three layers stacked by `nn.scan`, and an output projection of its own."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(VOCAB, WIDTH, name="embed_tokens")(tokens)
        stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Step, length=LAYERS, **stacked)(name="layers")(x, None)
        return nn.Dense(VOCAB, use_bias=False, name="lm_head")(x)


def init(model: nn.Module, *args: Any, seed: int = 0) -> Any:
    """Returns a model's params, every leaf random, biases too."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *(args or (TOKENS,)))
    return randomised(shapes["params"], seed)


def randomised(tree: Any, seed: int = 0, scale: float = 0.5) -> Any:
    """Returns a pytree of arrays with normal values, of these shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        treedef,
        [jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype) for x in leaves],
    )


def wrapped(params: Any, targets: Any, *, seed: int = 2, **options: Any) -> tied_lora.Adapted:
    """Returns params adapted with factors that are all random, so that no delta is zero."""
    wraps = {k: options.pop(k) for k in ("sites", "ties", "rng") if k in options}
    config = tied_lora.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": targets, **options})
    adapted = tied_lora.wrap(params, config, **wraps)
    return adapted.replace(adapters=randomised(adapted.adapters, seed))
