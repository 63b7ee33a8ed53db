"""Arrays with named axes around one of JAX's, as Haliax and Penzai have them: a model of these."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_pytree_with_keys_class
class NamedArray:
    def __init__(self, array: Any, names: str = ""):
        self.array, self.names = array, names

    dtype = property(lambda self: self.array.dtype)
    shape = property(lambda self: dict(zip(self.names, self.array.shape, strict=True)))

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("array"), self.array)], self.names

    @classmethod
    def tree_unflatten(cls, names, arrays):
        return cls(arrays[0], names)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weight: NamedArray
    bias: NamedArray

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.weight.array.T
        return y + jnp.broadcast_to(self.bias.array, y.shape)


def params() -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def linear() -> Linear:
        weight = jax.random.normal(next(keys), (8, 8)) / 3
        return Linear(
            NamedArray(weight, "oi"), NamedArray(jax.random.normal(next(keys), (8,)), "o")
        )

    table = NamedArray(jax.random.normal(next(keys), (32, 8)) / 3, "ve")
    return {
        "embeddings": {"weight": table},
        "layers": [{"q_proj": linear(), "up_proj": linear()} for _ in range(2)],
    }


def logits(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    x = params["embeddings"]["weight"].array[tokens]
    for layer in params["layers"]:
        x = x + jnp.tanh(layer["up_proj"](layer["q_proj"](x)))
    return x @ params["embeddings"]["weight"].array.T
