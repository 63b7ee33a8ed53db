"""Boxes: what holds an array in a params pytree (`flax.core.meta.AxisMetadata`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
