"""The adapters of a table that has grown: old tokens keep their deltas, new ones have none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora._adapters.adapted import Adapted, check_slots
from flax_tied_lora._adapters.terms import weights_of
from flax_tied_lora._planning.plan import (
    LORA,
    MAGNITUDE,
    TRAINABLE_TOKENS,
    AdapterPlan,
    GroupPlan,
    Plan,
)
from flax_tied_lora._tree.boxes import boxed_as, in_place, unboxed
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._vocabulary.leaves import WHAT
from flax_tied_lora._vocabulary.rows import extended


def grown_adapters(adapted: Adapted, params: Any, keep: int, axes: Mapping[str, int]) -> Adapted:
    """Returns an `Adapted` with grown params, and with adapters that fit them.

    Args:
      adapted: as it was.
      params: the grown ones, stored as the adapted's are.
      keep: how many tokens there were.
      axes: the vocabulary's axis of every leaf that has grown.

    Raises:
      ValueError: the adapters are stacked; a leaf's vocabulary is neither its rows nor its columns,
        or cut into parts.
    """
    check_slots(WHAT, adapted, "stacked adapters are grown one by one")
    leaves, _ = flatten(params)
    groups = tuple(
        dataclasses.replace(g, shape=tuple(leaves[g.key].shape)) for g in adapted.plan.groups
    )
    plan = Plan.of(groups, adapted.plan.config)
    adapters = {kind: dict(by_key) for kind, by_key in adapted.adapters.items()}
    for group, adapter in plan.adapters():
        if group.key not in axes or adapter.kind == TRAINABLE_TOKENS:
            continue
        axis = axes[group.key]
        if axis in group.batch:
            raise ValueError(
                f"{WHAT}: {group.key!r} is walked along axis {axis}, step by step; expected its "
                "vocabulary along the rows or columns of its factors. Check leaves"
            )
        if adapter.span is not None and adapter.span[0] == axis:
            raise ValueError(
                f"{WHAT}: {adapter.key!r} is for a part of {group.key!r} along its vocabulary, and "
                "new tokens would belong to none; grow the params, and wrap them with other parts"
            )
        kind, args = adapters[adapter.kind], (group, adapter, axis, keep, leaves[group.key])
        old = kind[adapter.key]
        if adapter.kind == LORA:
            new = {name: _longer(old[name], name, *args) for name in group.axes(adapter)}
            kind[adapter.key] = {**old, **new}
        else:
            kind[adapter.key] = _longer(old, "", *args)
    result = dataclasses.replace(adapted, params=params, adapters=adapters, plan=plan)
    for group, adapter in plan.adapters(LORA):
        if group.key in axes and adapter.dora:
            pair = adapters[LORA][adapter.key]
            magnitude = _magnitude(adapted, result, group, adapter, axes[group.key], keep)
            adapters[LORA][adapter.key] = {**pair, MAGNITUDE: magnitude}
    return result


def _longer(
    old: Any, name: str, group: GroupPlan, adapter: AdapterPlan, axis: int, keep: int, leaf: Any
) -> Any:
    """Returns an adapter's array with new entries: 0 in factors, the leaf's in a full copy."""
    leaf_axes, shape = group.axes(adapter)[name], group.shapes(adapter)[name]
    if axis not in leaf_axes:
        return old
    position = leaf_axes.index(axis)
    array = unboxed(old)
    if isinstance(array, jax.ShapeDtypeStruct):
        return boxed_as(old, jax.ShapeDtypeStruct(shape, array.dtype, sharding=array.sharding))
    if adapter.kind == LORA:
        new = jnp.zeros(
            [n - keep if i == position else n for i, n in enumerate(shape)], array.dtype
        )
    else:
        new = jax.lax.slice_in_dim(jnp.asarray(leaf), keep, leaf.shape[axis], axis=axis)
    return in_place(old, extended(array, position, keep, new, path=adapter.key))


def _magnitude(
    before: Adapted, after: Adapted, group: GroupPlan, adapter: AdapterPlan, axis: int, keep: int
) -> Any:
    """Returns DoRA's magnitude: what each column's norm is now, times what it was scaled by.

    The norm of a table's column counts new rows too; an old token's row must not change by it.
    """
    old = before.adapters[LORA][adapter.key][MAGNITUDE]
    if isinstance(unboxed(old), jax.ShapeDtypeStruct):
        return after.adapters[LORA][adapter.key][MAGNITUDE]
    leaf_axes = group.axes(adapter)[MAGNITUDE]
    scale = _scale(before, group.key, leaf_axes)
    if axis in leaf_axes:
        position = leaf_axes.index(axis)
        shape = group.shapes(adapter)[MAGNITUDE]
        new = jnp.ones([n - keep if i == position else n for i, n in enumerate(shape)], scale.dtype)
        scale = extended(scale, position, keep, new, path=adapter.key)
    ones = {**after.adapters[LORA][adapter.key], MAGNITUDE: jnp.ones(scale.shape, scale.dtype)}
    adapters = {**after.adapters, LORA: {**after.adapters[LORA], adapter.key: ones}}
    inverse = _scale(dataclasses.replace(after, adapters=adapters), group.key, leaf_axes)
    grown = after.adapters[LORA][adapter.key][MAGNITUDE]
    return in_place(grown, (scale / inverse).astype(unboxed(old).dtype))


def _scale(adapted: Adapted, key: str, axes: Any) -> jax.Array:
    groups = tuple(g for g in adapted.plan.groups if g.key == key)
    alone = dataclasses.replace(adapted.eval(), plan=Plan.of(groups, adapted.plan.config))
    scale = weights_of(alone, flatten(adapted.params)[0])[key].scale
    assert scale is not None
    return scale.ordered(axes).array
