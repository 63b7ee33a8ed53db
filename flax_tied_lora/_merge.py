"""The weights of an `Adapted`: symbolic, merged, or left as they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_tied_lora._adapted import LORA, Adapted
from flax_tied_lora._factor import Factor
from flax_tied_lora._factors import key_number, unboxed
from flax_tied_lora._paths import flatten
from flax_tied_lora._ties import Member
from flax_tied_lora._weight import LowRank, Origin, Weight


def weights_of(adapted: Adapted, leaves: Mapping[str, Any]) -> dict[str, Weight]:
    """Returns the symbolic weight of every member of every adapted group, by leaf path."""
    dropout = float(adapted.plan.config.lora_dropout)
    weights = {}
    for group in adapted.plan.adapted:
        pair = adapted.adapters[LORA][group.key]
        key = None
        if dropout and adapted.rng is not None:
            key = jax.random.fold_in(adapted.rng, key_number(group.key))
        a, b = (
            Factor(jnp.asarray(unboxed(pair[name])), axes)
            for name, axes in group.factor_axes.items()
        )
        delta = LowRank(
            a,
            b,
            jnp.asarray(adapted.scaling[group.key]),
            key,
            group.key,
            None,
            dropout if key is not None else 0.0,
        )
        array = jnp.asarray(leaves[group.key])
        for member in group.members:
            weights[member.path] = _member(member, array, delta)
    return weights


def _member(member: Member, array: jax.Array, delta: LowRank) -> Weight:
    if member.transposed:
        array = lax.transpose(array, (1, 0))
        turned = {0: 1, 1: 0}
        delta = dataclasses.replace(
            delta, a=delta.a.relabel(turned.__getitem__), b=delta.b.relabel(turned.__getitem__)
        )
    axes = tuple((i,) for i in range(array.ndim))
    return Weight.of(array, (delta,), (Origin(member.path, axes),))


def plain(adapted: Adapted, arrays: Mapping[str, Any]) -> Any:
    """Returns plain params: the adapted's, with some leaves replaced and every member in place.

    Args:
      arrays: leaves by path. A member of a tie group that is not among them is its canonical leaf,
        the same array where it is stored as such, a transpose otherwise.
    """
    leaves, treedef = flatten(adapted.params)
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


def base(adapted: Adapted) -> Any:
    """Returns the unadapted params, for example for a reference model.

    Nothing is copied but the transposed members of tie groups, which outside `jax.jit` are
    transposed copies.
    """
    check_adapted("base", adapted)
    return plain(adapted, {})


def merge(adapted: Adapted, *, dtype: Any = None) -> Any:
    """Returns plain params with each delta added to its weight once, and the ties intact.

    Members that are stored as the canonical leaf are the same array again.

    Args:
      adapted: what to merge. It stays as it is.
      dtype: of the merged leaves; by default each keeps its own. In bfloat16 a small delta is
        partly lost in rounding: a merge to float32 keeps it.

    Raises:
      TypeError: not an `Adapted`; ``dtype`` is not floating point.
      ValueError: the adapters are stacked.
    """
    check_adapted("merge", adapted)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"merge: dtype={dtype!r}; expected a floating-point dtype")
    leaves, _ = flatten(adapted.params)
    for group in adapted.plan.adapted:
        found = unboxed(adapted.adapters[LORA][group.key]["lora_a"]).shape
        if len(found) != len(group.factor_shapes()["lora_a"]):
            raise ValueError(
                f"merge: lora_a of {group.key!r} is {list(found)}, expected "
                f"{list(group.factor_shapes()['lora_a'])}: stacked adapters are merged one by one"
            )
    weights = weights_of(adapted.eval(), leaves)
    merged = {}
    for group in adapted.plan.adapted:
        weight = weights[group.key]
        merged[group.key] = weight.replace(dtype=jnp.dtype(dtype or weight.dtype)).dense()
    return plain(adapted, merged)


def check_adapted(what: str, value: Any) -> None:
    if not isinstance(value, Adapted):
        raise TypeError(
            f"{what}: expected an Adapted, as wrap returns it, got {type(value).__name__}"
        )
