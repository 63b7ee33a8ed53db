"""Training steps compiled for a TPU that is not there, and what is read off their programs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies

import flax_tied_lora as tied_lora
from tests.helpers import gpt2_shape
from tests.helpers.gpt2_shape import Shape

TARGETS = ("wte", "c_attn")
SMALL = Shape()
Place = Callable[[tuple[Any, ...], jax.ShapeDtypeStruct], Any]


@functools.cache
def devices() -> Any:
    """Returns the eight chips of a TPU v5e host; programs are compiled for them, and do not run.

    Raises:
      RuntimeError: libtpu is not installed.
    """
    # libtpu otherwise asks a cloud machine's metadata server which TPU it is on, and waits.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu").devices


def on_one_chip(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> Any:
    return jax.sharding.SingleDeviceSharding(devices()[0])


def on_eight(*axes: str | None) -> Any:
    """Returns a sharding over all eight chips, which are one axis, "chips"."""
    mesh = jax.sharding.Mesh(np.array(devices()), ("chips",))
    return jax.NamedSharding(mesh, jax.P(*axes))


def placed(tree: Any, place: Place) -> Any:
    def one(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(path, x))

    return jax.tree_util.tree_map_with_path(one, tree)


def wide(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return gpt2_shape.loss(logits.astype(jnp.float32), tokens)


def plain_loss(p: Any, tokens: jax.Array, s: Shape, deltas: Any = None) -> jax.Array:
    return wide(gpt2_shape.forward(p, tokens, s, deltas), tokens)


def fused_loss(p: Any, tokens: jax.Array, s: Shape, chunk: int | None = None) -> jax.Array:
    """The loss without logits; the last position's label is one that does not count."""
    hidden = gpt2_shape.hidden_states(p, tokens, s)
    labels = jnp.concatenate([tokens[:, 1:], jnp.full_like(tokens[:, :1], -100)], 1)
    table = p["wte"]["embedding"]
    return tied_lora.losses.linear_cross_entropy(hidden, table, labels, chunk_size=chunk)


@functools.cache
def step(
    kind: str, dtype: str, shape: Shape = SMALL, loss: Any = plain_loss,
    targets: tuple[str, ...] = TARGETS, copied: tuple[str, ...] = (), place: Place = on_one_chip,
) -> Any:  # fmt: skip
    """Returns a compiled training step with AdamW.

    Args:
      kind: "ours", the adapted function; "by hand", the deltas written into the model;
        "densified", the model with the deltas added to its weights.
      dtype: of the frozen params; factors are float32.
      copied: what is trained whole.
      place: the sharding of a leaf, of its path and type.
    """
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), gpt2_shape.params(shape))
    params = placed(params, place)
    config = tied_lora.LoraConfig(
        r=gpt2_shape.RANK, lora_alpha=2 * gpt2_shape.RANK, target_modules=list(targets),
        modules_to_save=list(copied) or None,
    )  # fmt: skip
    whole = tied_lora.wrap(params, config)
    apply = tied_lora.adapt(loss, on_dense="error")
    frozen, adapters = whole, whole.adapters

    def ours(adapters: Any, frozen: Any, tokens: Any) -> Any:
        return apply(frozen.replace(adapters=adapters), tokens, shape)

    def by_hand(adapters: Any, frozen: Any, tokens: Any) -> Any:
        deltas = jax.tree.map(lambda x: x.astype(dtype), adapters["lora"])
        return loss(frozen, tokens, shape, deltas)

    def densified(adapters: Any, frozen: Any, tokens: Any) -> Any:
        return loss(tied_lora.merge(frozen.replace(adapters=adapters)), tokens, shape)

    if kind == "by hand":
        frozen = params
    functions = {"ours": ours, "by hand": by_hand, "densified": densified}
    optimizer = optax.adamw(1e-3)
    run = gpt2_shape.training_step(functions[kind], optimizer)
    state = jax.eval_shape(optimizer.init, adapters)
    tokens = jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32)
    operands = placed((frozen, adapters, state, tokens), place)
    return jax.jit(run, donate_argnums=(1, 2)).lower(*operands).compile()


def flops(program: Any) -> float:
    return program.cost_analysis()["flops"]


def temporary(program: Any) -> int:
    """Returns bytes of a chip's memory that hold what is neither an argument nor a result."""
    return program.memory_analysis().temp_size_in_bytes
