"""Small NNX models for the tests: tied by a Variable, by a submodule, stacked, with state."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from tests.helpers.small_models import randomised

VOCAB, WIDTH, LAYERS = 12, 8, 3
TOKENS = np.array([[1, 2, 3, 7], [4, 5, 1, 0]], np.int32)
CONFIG = tied_lora.LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head", "up"])


class Head(nnx.Module):
    """An output projection by a table that may be another module's."""

    def __init__(self, table: nnx.Param):
        self.embedding = table

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.embedding[...].T


class SharedVariable(nnx.Module):
    """Embedding and head are two modules with one Variable."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.lm_head = Head(self.embed_tokens.embedding)
        self.config = ("tiny", VOCAB)

    @property
    def table(self) -> jax.Array:
        return self.embed_tokens.embedding[...]

    def encode(self, tokens: Any) -> jax.Array:
        x = self.embed_tokens(tokens)
        return x + jnp.tanh(self.up(x))

    def __call__(self, tokens: Any) -> jax.Array:
        return self.lm_head(self.encode(tokens))


class SharedModule(nnx.Module):
    """The head is the embedding itself, deeper in the graph, too."""

    def __init__(self, rngs: nnx.Rngs):
        self.decoder = nnx.Dict(up=nnx.Linear(WIDTH, WIDTH, rngs=rngs))
        self.embed_tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.decoder.lm_head = self.embed_tokens

    def __call__(self, tokens: Any) -> jax.Array:
        x = self.embed_tokens(tokens)
        return self.decoder.lm_head.attend(x + jnp.tanh(self.decoder.up(x)))


class Block(nnx.Module):
    """A layer with a dropout and running statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.lin = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dropout(jnp.tanh(self.norm(self.lin(x))))


class Stateful(nnx.Module):
    """Layers with state, one after the other; the embedding is the head."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, tokens: Any) -> jax.Array:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed_tokens.attend(x)


class Stacked(nnx.Module):
    """The same layers, made by `nnx.vmap` and walked by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs, *, remat: bool = False):
        self.embed_tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> Block:
            return Block(rngs)

        self.layers = make(rngs)
        self.remat = remat

    def __call__(self, tokens: Any) -> jax.Array:
        def step(layer: Block, x: jax.Array) -> jax.Array:
            return layer(x)

        step = nnx.remat(step) if self.remat else step
        walk = nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.embed_tokens.attend(walk(self.layers, self.embed_tokens(tokens)))


def wrapped(module: nnx.Module, targets: Any, *, seed: int = 2, **options: Any) -> Any:
    """Returns a module adapted with factors that are all random, so that no delta is zero."""
    wraps = {k: options.pop(k) for k in ("sites", "ties", "rng") if k in options}
    config = tied_lora.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": targets, **options})
    adapted = tied_lora.nnx.wrap(module, config, **wraps)
    nnx.update(adapted, randomised(nnx.state(adapted, nnx.LoRAParam), seed))
    return adapted


def loss(model: Any, tokens: Any) -> jax.Array:
    """Returns the mean loss of the next token."""
    return optax.softmax_cross_entropy_with_integer_labels(
        model(tokens)[:, :-1], tokens[:, 1:]
    ).mean()


@functools.cache
def shared_variable() -> SharedVariable:
    return SharedVariable(nnx.Rngs(0))


def adapted(**options):
    return wrapped(shared_variable(), ["lm_head", "up"], **options)


def close(found, expected, tolerance=2e-5):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)
