"""Boxes: what holds an array in a params pytree (`flax.core.meta.AxisMetadata`)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import meta

from flax_tied_lora._tree.paths import is_tracer, path_name


def names_along(names: Any, axes: Sequence[Any]) -> list[Any]:
    """Returns the names of some of a leaf's axes; None for an axis that is not the leaf's."""
    return [names[a] if isinstance(a, int) and a < len(names) else None for a in axes]


def boxes_of(params: Any) -> dict[str, Any]:
    """Returns the boxes of a params pytree by the path of the leaf that each holds."""
    if not any(map(is_box, jax.tree.leaves(params, is_leaf=is_box))):
        return {}
    pairs, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    return {path_name(p): x for p, x in pairs if is_box(x)}


def boxed_like(box: Any, axes: Sequence[Any], array: Any) -> Any:
    """Returns an array in a box like a leaf's, with its names for the axes that it has.

    Raises:
      ValueError: the box has no axis names.
    """
    if not hasattr(box, "names"):
        raise ValueError(
            f"wrap: a leaf is boxed in a {type(box).__name__}, which has no axis names; expected "
            "flax.linen.Partitioned or LogicallyPartitioned. Unbox it with flax.linen.meta.unbox"
        )
    return dataclasses.replace(box, value=array, names=tuple(names_along(box.names, axes)))


def unboxed(factor: Any) -> Any:
    """Returns the array of a factor, boxed or not."""
    if not is_box(factor):
        return factor
    # Mapped over slots by `jax.vmap`, the array lacks the box's first axis.
    return factor.value if len(factor.names) > jnp.ndim(factor.value) else factor.unbox()


def with_slots(factor: Any) -> Any:
    """Returns a factor whose box, if it has one, has an axis of slots before the others."""
    return factor.add_axis(0, {meta.PARTITION_NAME: None}) if is_box(factor) else factor


def is_box(node: Any) -> bool:
    """Returns whether a node of a pytree is a box."""
    return isinstance(node, meta.AxisMetadata)


def boxed_as(old: Any, array: Any) -> Any:
    """Returns an array in the box, if there is one, of the array that it takes the place of."""
    return old.replace_boxed(array) if is_box(old) else array


def in_place(old: Any, array: jax.Array) -> Any:
    """Returns an array boxed and placed as the one that it takes the place of."""
    if not is_tracer(array):  # a tracer takes long to say that it is placed nowhere
        sharding = getattr(unboxed(old), "sharding", None)
        if isinstance(sharding, jax.NamedSharding):
            array = jax.device_put(array, sharding)
    return boxed_as(old, array)


def refuse_models(what: str, params: Any, of_module: str) -> None:
    """Refuses a model where its params belong, which would be a pytree without a leaf of use.

    Args:
      of_module: what to do with an `nnx.Module`: how the error ends, from its comma on.

    Raises:
      TypeError: it is one.
    """
    kind = type(params).__name__
    if isinstance(params, nnx_type("Module")):
        raise TypeError(f"{what}: expected params, got {kind}, an nnx.Module{of_module}")
    if not jax.tree_util.all_leaves([params]) or hasattr(params, "shape"):
        return
    if isinstance(params, linen.Module):
        made = "what its init returns under 'params'"
        raise TypeError(f"{what}: expected params, got {kind}, a Flax module; pass {made}")
    if hasattr(params, "params"):
        raise TypeError(f"{what}: expected params, got {kind}, a model; pass model.params")


def nnx_type(name: str) -> Any:
    """Returns a class of `flax.nnx` for `isinstance`, or ``()``, of which nothing is an instance.

    Where `flax.nnx` is not imported nobody has an object of it, and importing it takes a while.
    """
    return getattr(sys.modules.get("flax.nnx"), name, ())


def quantized_by_qwix(params: Any) -> list[str]:
    """Returns the paths of the leaves that are qwix's own quantised arrays."""
    kind = getattr(sys.modules.get("qwix"), "QArray", ())  # not imported, nobody has one
    pairs, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, kind))
    return [path_name(p).removesuffix("/array") for p, x in pairs if isinstance(x, kind)]
