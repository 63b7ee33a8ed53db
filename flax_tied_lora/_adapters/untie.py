"""Separate adapters merged: a leaf for each, since one array cannot hold both."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flax_tied_lora._algebra.site_filter import SiteFilter
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._planning.naming import ROLES
from flax_tied_lora._planning.plan import GroupPlan
from flax_tied_lora._tree.paths import leaf_name


def untied_names(group: GroupPlan, untie: Collection[str]) -> list[str]:
    """Returns the names that are for a group: of its separate adapters, or of a role in it."""
    filters = {a.name: a.sites for a in group.separate}
    scoped = any(sites is not None and not sites.role for sites in filters.values())
    return [n for n in untie if n in filters or (n in ROLES and not scoped)]


def untied_leaves(
    group: GroupPlan, weights: Mapping[str, Weight], untie: Mapping[str, str], dtype: Any
) -> dict[str, Any]:
    """Returns the arrays of a group with separate adapters, by path.

    What ``untie`` names becomes a leaf of its own; all else stays where it was.

    Args:
      weights: symbolic weights of the group's members, by path.
      untie: name of a separate adapter, or of a role -> path of its leaf. Names that are for other
        groups do not count.
      dtype: of the arrays.

    Raises:
      ValueError: an array would have to hold two adapters; a path is that of another's leaf.
    """
    names = untied_names(group, untie)
    separate = {a.name: a for a in group.separate}
    sites = {n: separate[n].sites if n in separate else SiteFilter(role=ROLES[n]) for n in names}
    members = [m.path for m in group.members]
    staying = [a for a in group.separate if a.name not in names]
    mixed = [
        a.name for path in members if path not in untie.values() for a in staying
        if a.sites is not None and a.covers(path) and not _alone(a.sites, sites.values())
    ]  # fmt: skip
    if not names or mixed:
        raise ValueError(
            f"merge: {group.key!r} has separate adapters for {', '.join(map(repr, separate))}, "
            "which one array cannot hold; say where the second copy goes: "
            f'untie={{"{mixed[-1] if mixed and names else next(reversed(separate))}": '
            '"path/of/leaf"}'
        )
    arrays: dict[str, Any] = {}
    for name in names:
        path = untie[name]
        _check_path(group, name, path, sites[name])
        if path in arrays:
            raise ValueError(
                f"merge: untie names {path!r} twice; each adapter needs a leaf of its own"
            )
        array = _as_read(weights[path if path in members else group.key], sites[name], dtype)
        is_kernel = path not in members and leaf_name(path) == "kernel" and group.is_table
        arrays[path] = array.T if is_kernel else array
    for path in members:
        if path not in arrays:
            readers = [a.sites for a in staying if a.sites is not None and a.covers(path)]
            arrays[path] = _as_read(weights[path], readers[0] if readers else None, dtype)
    return arrays


def _check_path(group: GroupPlan, name: str, path: str, sites: SiteFilter | None) -> None:
    if sites is None:
        members = next(a.members for a in group.separate if a.name == name)
        fits, expected = path in members, f"one of {members}"
    else:
        fits, expected = path != group.key, "another path than the others' leaf"
    if not fits:
        raise ValueError(f"merge: untie={{{name!r}: {path!r}}}; expected {expected}")


def _alone(sites: SiteFilter, untied: Collection[SiteFilter | None]) -> bool:
    """Returns whether a leaf is read by these sites only, others having a leaf of their own.

    That is known of lookups where the projections are untied, and the other way round; what else is
    read beside a scope is not.
    """
    others = {SiteFilter(role=role) for role in ROLES.values() if role != sites.role}
    return sites == SiteFilter(role=sites.role) and others <= set(untied)


def _as_read(weight: Weight, sites: SiteFilter | None, dtype: Any) -> Any:
    """Returns a weight as some call sites read it; None: as those without a separate adapter."""
    terms = [
        t for t in weight.terms
        if t.sites is None or t.sites == sites or (t.sites.others and sites not in t.sites.others)
    ]  # fmt: skip
    return weight.replace(dtype=dtype).dense(terms)
