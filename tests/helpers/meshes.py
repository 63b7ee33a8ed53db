"""The GPT-2-shaped model on a mesh of eight devices, its leaves placed in the usual ways."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from flax_tied_lora.losses import linear_cross_entropy
from tests.helpers import gpt2_shape

# No two sizes of interest are alike: neither table, its shards, logits, hidden states nor factors.
SHAPE = gpt2_shape.Shape(2560, 16, 64, 8, 1, 8, 13)
RANK, CHUNK = 4, 32
P = jax.P

# Kernels as tensor parallelism cuts them: those that make heads and features by their outputs,
# those that take them by their inputs, so that each pair is one sum over devices.
_KERNELS = {
    "c_attn": P(None, "model"), "c_fc": P(None, "model"),
    "c_proj": P("model", None), "c_out": P("model", None),
}  # fmt: skip
LAYOUTS = {
    "data parallel": (8, 1),
    "FSDP": (8, 1),
    "by vocabulary": (2, 4),
    "by width": (2, 4),
}


def mesh(layout: str, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh(LAYOUTS[layout], ("data", "model"), axis_types=(kind, kind))


def spec(layout: str, module: str, leaf: str, shape: tuple[int, ...]) -> jax.P:
    """Returns how a leaf is split; the batch is split over the axis "data" always."""
    if layout == "data parallel":
        return P()
    if layout == "FSDP":  # every leaf, along its longest axis
        longest = max(range(len(shape)), key=shape.__getitem__)
        return P(*("data" if i == longest else None for i in range(len(shape))))
    if module == "wte":
        return P("model", None) if layout == "by vocabulary" else P(None, "model")
    if leaf == "kernel":
        return _KERNELS[module]
    return P("model") if leaf == "bias" and "model" in _KERNELS.get(module, P())[1:] else P()


def params(layout: str, on: jax.sharding.Mesh) -> Any:
    """Returns abstract params, placed."""

    def place(path: Any, x: Any) -> Any:
        *_, module, leaf = (k.key for k in path)
        sharding = jax.NamedSharding(on, spec(layout, module, leaf, x.shape))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, gpt2_shape.params(SHAPE))


def tokens(on: jax.sharding.Mesh, batch: int = SHAPE.batch) -> Any:
    sharding = jax.NamedSharding(on, P("data"))
    return jax.ShapeDtypeStruct((batch, SHAPE.length), jnp.int32, sharding=sharding)


def plain_logits(p: Any, tokens: Any) -> jax.Array:
    return gpt2_shape.loss(gpt2_shape.forward(p, tokens, SHAPE), tokens)


def without_logits(p: Any, tokens: Any) -> jax.Array:
    x, table = gpt2_shape.hidden_states(p, tokens, SHAPE), p["wte"]["embedding"]
    return linear_cross_entropy(x[:, :-1], table, tokens[:, 1:], chunk_size=CHUNK)


LOSSES = {"plain logits": plain_logits, "linear_cross_entropy": without_logits}
