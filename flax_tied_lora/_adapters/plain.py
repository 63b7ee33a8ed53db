"""Plain params in place of an `Adapted`: every member of every tie group where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._tree.quantized_array import dequantized_leaves


def plain(adapted: Adapted, arrays: Mapping[str, Any]) -> Any:
    """Returns plain params: the adapted's, with some leaves replaced and every member in place.

    Args:
      arrays: leaves by path. A member of a tie group that is not among them is its canonical leaf,
        the same array where it is stored as such, a transpose otherwise. Other leaves that are
        stored quantised are dequantised.
    """
    leaves, treedef = flatten(adapted.params)
    arrays = {**dequantized_leaves({p: x for p, x in leaves.items() if p not in arrays}), **arrays}
    for group in adapted.plan.groups:
        for member in group.members[1:]:
            canonical = arrays.get(group.key, leaves[group.key])
            if member.path not in arrays:
                leaves[member.path] = _transposed(canonical) if member.transposed else canonical
    return jax.tree.unflatten(treedef, [arrays.get(p, x) for p, x in leaves.items()])


def _transposed(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype)
    return leaf.T
