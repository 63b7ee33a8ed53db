"""Collectives inside a `jax.shard_map` that gather a weight or move it: its factors are, it is not.

A factor that is the same on all devices of a mesh axis stays as it is. Which those are is known
where JAX checks it (``check_vma=True``, its default); elsewhere the weight is materialised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from flax_tied_lora._algebra.factor import Axis, Factor, NotServedError
from flax_tied_lora._algebra.term import Dense, LowRank
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._interpreter.rules.layout import same_axes
from flax_tied_lora._tree.sharding import varying


def _mesh_axes(eqn: Any, weight: Any) -> tuple[str, ...]:
    """Returns the mesh axes of a collective.

    Raises:
      NotServedError: it is one of groups of devices, or nothing says what varies over them.
    """
    names = eqn.params["axis_name"]
    names = tuple(names) if isinstance(names, tuple | list) else (names,)
    if eqn.params.get("axis_index_groups") is not None or not isinstance(weight, Weight):
        raise NotServedError
    if not any(varying(x) >= {*names} for x in jax.tree.leaves(weight)):
        raise NotServedError
    return names


def _varies(factor: Factor, names: Sequence[str]) -> bool:
    over = varying(factor.array) & {*names}
    if over and over != {*names}:
        raise NotServedError
    return bool(over)


def _own_part(factor: Factor, axis: Axis, names: Sequence[str]) -> Factor:
    """Returns the part along an axis that is this device's, of a factor that all devices have."""
    position, count = factor.axes.index(axis), 1
    for name in names:
        count *= lax.axis_size(name)
    size = factor.size(axis) // count
    start = lax.axis_index(tuple(names)) * size
    array = lax.dynamic_slice_in_dim(factor.array, start, size, position)
    return Factor(array, factor.axes)


@rule("all_gather")
def all_gather(context, eqn, weight):
    """Gathered along an axis, or along a new one, is the factor that differs between devices."""
    names, axis = _mesh_axes(eqn, weight), eqn.params["all_gather_dimension"]
    tiled = eqn.params["tiled"]

    def move(factor: Factor) -> Factor:
        if tiled:
            if _varies(factor, names) != (axis in factor.axes):
                raise NotServedError
            if axis not in factor.axes:
                return factor
            position = factor.axes.index(axis)
            array = lax.all_gather(factor.array, names, axis=position, tiled=True)
            return Factor(array, factor.axes)
        shifted = factor.relabel(lambda a: a + (a >= axis))
        if not _varies(factor, names):
            return shifted
        return Factor(lax.all_gather(factor.array, names), (axis, *shifted.axes))

    aval = eqn.outvars[0].aval
    held = same_axes(eqn)
    if not tiled:
        held = [() if i == axis else (i - (i > axis),) for i in range(aval.ndim)]
    return [weight.rearrange(aval, move, held)]


@rule("all_to_all")
def all_to_all(context, eqn, weight):
    """Split along another axis: one factor is gathered, a part is taken of the other."""
    names, p = _mesh_axes(eqn, weight), eqn.params
    split, joined = p["split_axis"], p["concat_axis"]
    if not p["tiled"]:
        raise NotServedError

    def move(factor: Factor) -> Factor:
        has_split, has_joined = split in factor.axes, joined in factor.axes
        if _varies(factor, names):
            if not has_joined:
                raise NotServedError
            array, position = factor.array, factor.axes.index(joined)
            if has_split:
                array = lax.all_to_all(array, names, factor.axes.index(split), position, tiled=True)
            else:
                array = lax.all_gather(array, names, axis=position, tiled=True)
            return Factor(array, factor.axes)
        if has_joined:
            raise NotServedError
        return _own_part(factor, split, names) if has_split else factor

    return [weight.rearrange(eqn.outvars[0].aval, move, same_axes(eqn))]


@rule("reduce_scatter")
def reduce_scatter(context, eqn, weight):
    """Summed over devices, of which each keeps a part: the factor that differs is summed."""
    names, axis = _mesh_axes(eqn, weight), eqn.params["scatter_dimension"]
    weight = weight.folded()
    if not eqn.params["tiled"]:
        raise NotServedError
    for term in weight.terms:
        if isinstance(term, LowRank):
            if _varies(term.a, names) == _varies(term.b, names):
                raise NotServedError
        elif not isinstance(term, Dense):
            raise NotServedError

    def move(factor: Factor) -> Factor:
        if not _varies(factor, names):
            return _own_part(factor, axis, names) if axis in factor.axes else factor
        if axis not in factor.axes:
            return Factor(lax.psum(factor.array, names), factor.axes)
        position = factor.axes.index(axis)
        array = lax.psum_scatter(factor.array, names, scatter_dimension=position, tiled=True)
        return Factor(array, factor.axes)

    return [weight.rearrange(eqn.outvars[0].aval, move, same_axes(eqn))]


@rule("ppermute")
def ppermute(context, eqn, weight):
    """What differs between devices goes from one to another, as in a pipeline or a ring."""
    names = _mesh_axes(eqn, weight)

    def move(factor: Factor) -> Factor:
        if not _varies(factor, names):
            return factor
        return Factor(lax.ppermute(factor.array, names, eqn.params["perm"]), factor.axes)

    if len(eqn.params["perm"]) != lax.axis_size(names):
        raise NotServedError  # devices to which nothing goes have zeros, and so no delta
    return [weight.rearrange(eqn.outvars[0].aval, move, same_axes(eqn))]
