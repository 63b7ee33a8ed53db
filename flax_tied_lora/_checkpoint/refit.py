"""A saved plan fitted to a base: leaves checked, ties stored once, templates of the factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._adapters.make import make_adapters
from flax_tied_lora._checkpoint.errors import CheckpointError, explained
from flax_tied_lora._checkpoint.items import without_boxes
from flax_tied_lora._planning.plan import LORA, GroupPlan, Plan
from flax_tied_lora._tree.boxes import boxes_of
from flax_tied_lora._tree.paths import TiedLeaf, describe, flatten, is_marker, nearby
from flax_tied_lora._verbs.wrap import stored_once


def fit(plan: Plan, params: Any, check_base: bool) -> tuple[Plan, Any]:
    """Returns the plan, fitted to the params, and the params with each tie stored once.

    Args:
      check_base: whether leaves must have the plan's dtypes; otherwise the plan takes on theirs.

    Raises:
      CheckpointError: a leaf of the plan is missing, or has another shape or dtype.
    """
    if isinstance(params, Adapted):
        raise CheckpointError(
            "restore: params is an Adapted; expected the base, tied_lora.base(adapted)"
        )
    leaves, treedef = flatten(params)
    groups = tuple(_fitted(group, leaves, check_base) for group in plan.groups)
    plan = Plan.of(groups, plan.config)
    return plan, stored_once(leaves, treedef, plan)


def _fitted(group: GroupPlan, leaves: Mapping[str, Any], check_base: bool) -> GroupPlan:
    dtype = group.dtype
    if not check_base and hasattr(leaves.get(group.key), "dtype"):
        dtype = str(leaves[group.key].dtype)
    for member in group.members:
        shape = group.shape[::-1] if member.transposed else group.shape
        leaf = leaves.get(member.path)
        if leaf is None:
            similar = ", ".join(map(repr, nearby(member.path, leaves)))
            raise CheckpointError(
                f"restore: the params have no {member.path!r} {dtype}{list(shape)}, which the "
                f"checkpoint's plan names; leaves with such a name: {similar}. Load the base as it "
                "was for wrap"
            )
        if is_marker(leaf):
            fits, text = leaf == TiedLeaf(group.key, member.transposed), repr(leaf)
        else:
            fits, text = tuple(leaf.shape) == shape and str(leaf.dtype) == dtype, describe(leaf)
        if not fits:
            raise CheckpointError(
                f"restore: {member.path!r} is {text} in the params and {dtype}{list(shape)} in "
                "the checkpoint's plan; load the base as it was for wrap"
            )
    return dataclasses.replace(group, dtype=dtype)


def adapter_templates(plan: Plan, params: Any, sharding: Any) -> dict[str, Any]:
    """Returns abstract adapters, boxed and placed like their leaf, or as ``sharding`` says."""
    leaves, boxes = flatten(params)[0], boxes_of(params)
    with explained("restore: adapters cannot be placed:", f"sharding={sharding!r}"):
        abstract = {
            group.key: jax.ShapeDtypeStruct(
                group.shape,
                jnp.dtype(group.dtype),
                sharding=_leaf_sharding(leaves[group.key], boxes.get(group.key), sharding),
            )
            for group in plan.adapted
        }
        adapters = make_adapters(plan, abstract, boxes, jax.random.key(0))
        if sharding is None or isinstance(sharding, jax.sharding.Mesh):
            return adapters
        if isinstance(sharding, jax.sharding.Sharding):
            return jax.tree.map(lambda x: _on(x, sharding), adapters)
        plain = without_boxes(sharding)
        plain = plain if LORA in plain else {LORA: plain}
        placed = jax.tree.map(_on, without_boxes(adapters), plain)
        return jax.tree.unflatten(jax.tree.structure(adapters), jax.tree.leaves(placed))


def _on(factor: Any, place: Any) -> Any:
    sharding = place if isinstance(place, jax.sharding.Sharding) else place.sharding
    return jax.ShapeDtypeStruct(factor.shape, factor.dtype, sharding=sharding)


def _leaf_sharding(leaf: Any, box: Any, sharding: Any) -> Any:
    """Returns the sharding that the factors of a leaf follow: its present one, or on a mesh."""
    current = getattr(leaf, "sharding", None)
    current = current if isinstance(current, jax.NamedSharding) else None
    if not isinstance(sharding, jax.sharding.Mesh):
        return current
    if current is not None:
        return jax.NamedSharding(sharding, current.spec)
    # A box may have logical names, which no mesh has.
    names = getattr(box, "names", ())
    return jax.NamedSharding(
        sharding, jax.P(*(n if n in sharding.axis_names else None for n in names))
    )
