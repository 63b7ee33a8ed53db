"""Plain params from an `Adapted`: merged, or as they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_tied_lora._adapted import Adapted
from flax_tied_lora._paths import flatten, leaf_name
from flax_tied_lora._plan import GroupPlan
from flax_tied_lora._quantized_array import dequantized_leaves
from flax_tied_lora._sites import SiteFilter
from flax_tied_lora._targets import ROLES
from flax_tied_lora._weight import Weight
from flax_tied_lora._weights import shapes_of, weights_of


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


def base(adapted: Adapted) -> Any:
    """Returns the unadapted params, for example for a reference model.

    Nothing is copied but the transposed members of tie groups, which outside `jax.jit` are
    transposed copies, and what is stored quantised, which is dequantised.

    Raises:
      TypeError: not an `Adapted`.
      ValueError: the adapters' first values were taken out of the params (PiSSA, OLoRA).
    """
    check_adapted("base", adapted)
    for group, adapter in adapted.plan.adapters():
        if adapter.residual:
            raise ValueError(
                f"base: init_lora_weights={adapted.plan.config.init_lora_weights!r} took the first "
                f"values of its factors out of {group.key!r}, so what is stored is a residual; "
                "keep the params that you gave to wrap"
            )
    return plain(adapted, {})


def merge(adapted: Adapted, *, dtype: Any = None, untie: Mapping[str, str] | None = None) -> Any:
    """Returns plain params with each delta added to its weight once, and the ties intact.

    Members that are stored as the canonical leaf are the same array again.

    Args:
      adapted: what to merge; of stacked adapters one that is selected. It stays as it is.
      dtype: of the merged leaves; by default each keeps its own. In bfloat16 a small delta is
        partly lost in rounding: a merge to float32 keeps it.
      untie: for a leaf with separate adapters, which one array cannot hold: name of the part ->
        path of the leaf that the part gets for its own, for example
        ``{"lm_head": "lm_head/kernel"}``. A new leaf called ``kernel`` is the transpose of a table;
        it has no box. The model's config must then say untied, too
        (``tie_word_embeddings=False``).

    Raises:
      TypeError: not an `Adapted`; ``dtype`` is not floating point; ``untie`` is no dict.
      ValueError: the adapters are stacked, and not one is selected; a leaf has separate adapters
        and ``untie`` does not say where they go; or what it names is unknown, or in the way.
    """
    check_adapted("merge", adapted)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"merge: dtype={dtype!r}; expected a floating-point dtype")
    if untie is not None and not isinstance(untie, Mapping):
        raise TypeError(f"merge: untie={untie!r}; expected a dict, name of the part -> leaf path")
    one = adapted.slot is not None and jnp.ndim(adapted.slot) == 0
    for key, name, found, expected in shapes_of(adapted):
        if len(found) != len(expected) + one:
            raise ValueError(
                f"merge: {name} of {key!r} is {list(found)}, expected {list(expected)}: stacked "
                "adapters are merged one by one, merge(tied_lora.select(stacked, 0))"
            )
    leaves, _ = flatten(adapted.params)
    weights = weights_of(adapted.eval(), leaves, dtype)
    merged, new, left = {}, {}, dict(untie or {})
    for group in adapted.plan.adapted:
        kind = jnp.dtype(dtype or weights[group.key].dtype)
        if not group.separate:
            merged[group.key] = weights[group.key].replace(dtype=kind).dense()
            continue
        own = {m.path for m in group.members}
        for path, array in untied_leaves(group, weights, left, kind).items():
            if path in new or (path in leaves and path not in own):
                raise ValueError(
                    f"merge: untie puts a new leaf at {path!r}, where another leaf is in the way; "
                    "name another path"
                )
            (merged if path in own else new)[path] = array
    if left:
        raise ValueError(
            f"merge: untie names {', '.join(map(repr, left))}, for which there is no separate "
            "adapter; leave it out"
        )
    return _with_leaves(plain(adapted, merged), new)


def untied_leaves(
    group: GroupPlan, weights: Mapping[str, Weight], untie: dict[str, str], dtype: Any
) -> dict[str, Any]:
    """Returns the arrays of a group with separate adapters by path, and takes its names out.

    Each part that is untied becomes a leaf of its own; what is left stays where it was.
    """
    parts = {a.name: a.sites for a in group.separate}
    scoped = any(sites is not None and not sites.role for sites in parts.values())
    names = [n for n in untie if n in parts or (n in ROLES and not scoped)]
    members = [m.path for m in group.members]
    left = {a.name: a for a in group.separate if a.name not in names}
    gone = [parts.get(name, SiteFilter(role=ROLES.get(name))) for name in names]
    mixed = [
        a.name for path in members if path not in untie.values() for a in left.values()
        if a.sites is not None and a.covers(path) and not _alone(a.sites, gone)
    ]  # fmt: skip
    if not names or mixed:
        raise ValueError(
            f"merge: {group.key!r} has separate adapters for {', '.join(map(repr, parts))}, which "
            "one array cannot hold; say where the second copy goes: "
            f'untie={{"{mixed[-1] if mixed and names else next(reversed(parts))}": "path/of/leaf"}}'
        )
    arrays: dict[str, Any] = {}
    for name in names:
        path, sites = untie.pop(name), parts.get(name, SiteFilter(role=ROLES.get(name)))
        own = next((a.members for a in group.separate if a.name == name), ())
        if (sites is None and path not in own) or (sites is not None and path == group.key):
            expected = f"one of {own}" if sites is None else "another path than the others' leaf"
            raise ValueError(f"merge: untie={{{name!r}: {path!r}}}; expected {expected}")
        if path in arrays:
            raise ValueError(
                f"merge: untie names {path!r} twice; each part needs a leaf of its own"
            )
        array = _as_read(weights[path if path in members else group.key], sites, dtype)
        turn = path not in members and leaf_name(path) == "kernel" and group.is_table
        arrays[path] = array.T if turn else array
    for path in members:
        if path not in arrays:
            rest = [a.sites for a in left.values() if a.sites is not None and a.covers(path)]
            arrays[path] = _as_read(weights[path], rest[0] if rest else None, dtype)
    return arrays


def _alone(sites: SiteFilter, gone: Sequence[SiteFilter | None]) -> bool:
    """Returns whether a leaf is read by these sites only, others having a leaf of their own.

    That is known of lookups where the projections are gone, and the other way round; what else is
    read beside a scope is not.
    """
    others = {SiteFilter(role=role) for role in ROLES.values() if role != sites.role}
    return sites == SiteFilter(role=sites.role) and others <= set(gone)


def _as_read(weight: Weight, sites: SiteFilter | None, dtype: Any) -> Any:
    """Returns a weight as it is read by the call sites of a part, or by those of none."""
    terms = [
        t for t in weight.terms
        if t.sites is None or t.sites == sites or (t.sites.others and sites not in t.sites.others)
    ]  # fmt: skip
    return weight.replace(dtype=dtype).dense(terms)


def _with_leaves(params: Any, new: Mapping[str, Any]) -> Any:
    """Returns nested dicts with leaves added under their paths."""
    for path, array in new.items():
        if not isinstance(params, Mapping):
            raise ValueError(
                f"merge: untie puts a new leaf at {path!r}, and the params are a "
                f"{type(params).__name__}; expected dicts. Give them the leaf before wrap, tied"
            )
        params = _with_leaf(params, path.split("/"), array, path)
    return params


def _with_leaf(tree: Any, names: list[str], array: Any, path: str) -> Any:
    first, rest = names[0], names[1:]
    below = tree.get(first, {}) if isinstance(tree, Mapping) else None
    if below is None or (not rest and first in tree) or (rest and not isinstance(below, Mapping)):
        raise ValueError(
            f"merge: untie puts a new leaf at {path!r}, where another leaf is in the way; name "
            "another path"
        )
    kind: Any = type(tree)  # dict, FrozenDict
    return kind({**tree, first: _with_leaf(below, rest, array, path) if rest else array})


def check_adapted(what: str, value: Any) -> None:
    if not isinstance(value, Adapted):
        raise TypeError(
            f"{what}: expected an Adapted, as wrap returns it, got {type(value).__name__}"
        )
