"""Where the arrays of `finetune_on_a_mesh.py` are: a mesh, and a sharding for every array.

A mesh has two axes. The batch is split over ``data``; ``model`` splits the weights, as --shard
says.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
import optax
import program
from jax.experimental import multihost_utils

AXES = ("data", "model")
INTO, OUT = ("q_proj", "k_proj", "v_proj", "up_proj"), ("o_proj", "down_proj")
# Of the table [vocabulary, width], of kernels into a layer [width, features] and out of it
# [features, width], and of the batch's rows. What is not named is whole on every device.
LAYOUTS = {
    "vocab": (jax.P("model", None), jax.P(None, "model"), jax.P("model", None), "data"),
    "width": (jax.P(None, "model"), jax.P(None, "model"), jax.P("model", None), "data"),
    "fsdp": (jax.P(AXES, None), jax.P(AXES, None), jax.P(AXES, None), AXES),
}


def make_mesh(sizes: dict[str, int]) -> jax.sharding.Mesh:
    """Returns a mesh over all devices of all processes."""
    wanted, there = math.prod(sizes.values()), jax.device_count()
    if wanted != there:
        asked = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise program.RefusedError(
            f"--mesh {asked} is of {wanted} devices, and there are {there}, in "
            f"{jax.process_count()} processes: make the product of the sizes {there}. (On CPUs "
            "JAX_NUM_CPU_DEVICES sets how many devices a process has.)"
        )
    # Auto: the compiler follows the arrays. (make_mesh's own default is Explicit.)
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)


def place(params: Any, mesh: jax.sharding.Mesh, shard: str) -> Any:
    """Returns abstract params with a sharding each."""
    table, into, out, _ = LAYOUTS[shard]

    def one(path: Any, leaf: Any) -> Any:
        module, name = ("", *(key.key for key in path))[-2:]
        spec = jax.P()
        if name in ("embedding", "kernel"):
            spec = table if name == "embedding" else into if module in INTO else out
        for axis, (size, split) in enumerate(zip(leaf.shape, spec, strict=False)):
            parts = _parts(mesh, split)
            if size % parts:
                raise program.RefusedError(
                    f"{module}/{name} {list(leaf.shape)} does not split into {parts} parts along "
                    f"axis {axis}, of {size}: {_remedy(name, axis, parts)}"
                )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, params)


def _parts(mesh: jax.sharding.Mesh, names: Any) -> int:
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(mesh.shape[n] for n in names if n)


def _remedy(name: str, axis: int, parts: int) -> str:
    if name == "embedding" and axis == 0:
        return (
            f"take a --vocabulary that {parts} divides (a table that is there gets such a size "
            f"from tied_lora.grow_vocabulary with pad_to_multiple_of={parts}), or --shard width"
        )
    return f"take a --width that {parts} divides, or a smaller axis in --mesh"


def rows_sharding(mesh: jax.sharding.Mesh, shard: str, rows: int) -> jax.NamedSharding:
    """Returns the sharding of a batch: its rows over the axes that hold data."""
    names = LAYOUTS[shard][3]
    if rows % (parts := _parts(mesh, names)):
        raise program.RefusedError(
            f"--batch {rows} does not split over {parts} slices of the mesh ({names}): take a "
            f"multiple of {parts}"
        )
    return jax.NamedSharding(mesh, jax.P(names, None))


def global_batch(rows: np.ndarray, sharding: jax.NamedSharding) -> jax.Array:
    """Returns a batch over all processes, to which each gives what its own devices hold.

    The rows are all of the batch here; a process that reads a file of its own gives those.
    """
    places = sharding.addressable_devices_indices_map(rows.shape).values()
    own = sorted({place[0].indices(len(rows))[:2] for place in places if place})
    local = np.concatenate([rows[start:stop] for start, stop in own])
    return jax.make_array_from_process_local_data(sharding, local, rows.shape)


def anywhere(flag: bool) -> bool:
    """Returns whether it is so in any process; all of them have to ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def optimizer_state(optimizer: optax.GradientTransformation, adapters: Any, mesh: Any) -> Any:
    """Returns the first state, its moments where the factors are, its counts on every device."""
    whole = jax.NamedSharding(mesh, jax.P())
    shardings = optax.tree.map_params(
        optimizer, lambda _, factor: factor.sharding, jax.eval_shape(optimizer.init, adapters),
        adapters, transform_non_params=lambda _: whole,
    )  # fmt: skip
    return jax.jit(optimizer.init, out_shardings=shardings)(adapters)


def described(trees: dict[str, Any]) -> str:
    """Returns what is where: bytes in all and on one device, and what is split, of layers one."""
    lines: dict[str, None] = {}
    for name, tree in trees.items():
        pairs = jax.tree_util.tree_leaves_with_path(tree)
        here = sum(x.addressable_shards[0].data.nbytes for _, x in pairs)
        total = sum(x.nbytes for _, x in pairs)
        lines[f"{name}: {total:,} bytes, {here:,} on each device"] = None
        for path, x in pairs:
            if any(x.sharding.spec) and name != "optimizer":
                leaf = jax.tree_util.keystr(path, simple=True, separator="/")
                leaf = re.sub(r"layer_\d+", "layer_*", leaf)
                lines[f"  {leaf} {list(x.shape)}: {', '.join(map(str, x.sharding.spec))}"] = None
    return "\n".join(lines)
