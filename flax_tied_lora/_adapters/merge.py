"""Plain params from an `Adapted`: merged, or as they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._algebra.site_filter import SiteFilter
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._planning.plan import GroupPlan
from flax_tied_lora._planning.targets import ROLES
from flax_tied_lora._tree.paths import flatten, leaf_name
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


def check_adapted(what: str, value: Any) -> None:
    if not isinstance(value, Adapted):
        raise TypeError(
            f"{what}: expected an Adapted, as wrap returns it, got {type(value).__name__}"
        )
