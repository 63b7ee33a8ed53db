"""Places of arrays that a compiled function changes: where they were, they stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from flax_tied_lora._tree.paths import is_tracer


def place_of(array: Any) -> jax.NamedSharding | None:
    """Returns where an array is on the Auto axes of a mesh; None elsewhere.

    On Explicit axes the place of what is computed from it is part of its type; on Auto ones the
    compiler decides, unless it is told.
    """
    if is_tracer(array):
        return None
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding):
        return None
    return None if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types else sharding


def in_places(tree: Any, places: Sequence[jax.NamedSharding | None]) -> Any:
    """Returns a pytree within a compiled function with its leaves where `place_of` says."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, places, strict=True)
    put = [x if to is None else lax.with_sharding_constraint(x, to) for x, to in pairs]
    return jax.tree.unflatten(treedef, put)


def on_one_mesh(tree: Any) -> Any:
    """Returns a pytree of which some arrays are on a mesh with the others on all its devices.

    An array that may go anywhere, as a step's count does, comes back from a compiled function on
    the mesh: taken there before, it is the same to the compiler the second time.
    """
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not is_tracer(x)]
    shardings = [x.sharding for x in arrays if isinstance(x.sharding, jax.NamedSharding)]
    if not shardings:
        return tree
    everywhere = jax.NamedSharding(shardings[0].mesh, jax.P())
    free = {id(x) for x in arrays if not x.committed}
    return jax.tree.map(lambda x: jax.device_put(x, everywhere) if id(x) in free else x, tree)
