"""Which axes of a targeted leaf are rows, columns and batch: from the config, or its call sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax_tied_lora._algebra.site_filter import LOOKUP, OTHER, PROJECTION
from flax_tied_lora._config.axes_and_parts import said_of
from flax_tied_lora._interpreter.sites import CallSite, CallSites
from flax_tied_lora._ties.groups import TieGroup
from flax_tied_lora._ties.sources import is_table
from flax_tied_lora._tree.paths import describe, leaf_name, module_of

SITES_LINE = 'sites = tied_lora.trace(model.apply, {"params": params}, tokens)'

# Rows and columns of a leaf, or of a call site.
_Sides = tuple[set[int], set[int]]


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a group's canonical leaf are rows, columns and batch."""

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    batch: tuple[int, ...]
    is_table: bool


def axes_of(
    group: TieGroup, leaf: Any, sites: CallSites | None, said: Mapping[str, Any] | None = None
) -> Axes:
    """Returns the axes of a group: as the config has them, or by its call sites; two need neither.

    An axis that one site indexes or scans over, and that is a row or column axis at another, counts
    as the latter.

    Args:
      said: `LoraConfig.axes`.

    Raises:
      ValueError: the leaf has more than two axes and nothing says which are rows; two sites
        disagree; the config names axes that there are not, or that the sites use otherwise.
    """
    ndim = len(leaf.shape)
    every = (sites or CallSites()).of(*group.paths)
    used = in_canonical_layout(group, every)
    lookups = [s for s in used if s.role == LOOKUP]
    table = read_as_table(group, used) if used else is_table(group.key)
    sides = _of_config(group, leaf, said or {})
    if sides is not None:
        _check_of_config(group.key, leaf, sides, used)
    elif used:
        sides = _of_sites(group.key, leaf, [*lookups, *(s for s in used if s.role != LOOKUP)])
    elif ndim == 2:
        sides = {0}, {1}
    else:
        long = [i for i, n in enumerate(leaf.shape) if n != 1]
        if not every or len(long) != 2:
            raise ValueError(_unknown_axes(group.key, leaf, sites, every))
        sides = {long[0]}, {long[1]}  # only added to data: a table of positions
    rows, cols = (tuple(sorted(side)) for side in sides)
    batch = tuple(i for i in range(ndim) if i not in (*rows, *cols))
    return Axes(rows, cols, batch, table)


def in_canonical_layout(group: TieGroup, sites: Iterable[CallSite]) -> list[CallSite]:
    """Returns the lookups and projections of a group, their axes those of its canonical leaf."""
    flips = {m.path: m.transposed for m in group.members}
    used = [s for s in sites if s.leaf in flips and s.role != OTHER]
    return [_transposed(s) if flips[s.leaf] else s for s in used]


def read_as_table(group: TieGroup, sites: Iterable[CallSite]) -> bool:
    """Returns whether call sites read a group as a table: rows are picked from it.

    A product with one-hot data picks rows, too, but the kernel of a Dense that is fed one-hot
    features is a kernel all the same, unless something multiplies with its transpose as well.

    Args:
      sites: of the group, in the canonical leaf's layout.
    """
    sites = list(sites)
    lookups = [s for s in sites if s.role == LOOKUP]
    kernel = all(leaf_name(path) == "kernel" for path in group.paths)
    return bool(lookups) and (_picked(lookups, sites) or not kernel)


def roles_of(group: TieGroup, sites: CallSites | None) -> tuple[tuple[str, str], ...]:
    """Returns what its call sites say that each leaf of a group is: looked up, or multiplied with.

    A leaf is left out that they say nothing of: it is not read, or only multiplied with one-hot
    data, which may pick rows or be the features that a layer is fed.
    """
    used, roles = in_canonical_layout(group, (sites or CallSites()).of(*group.paths)), []
    for path in group.paths:
        lookups = [s for s in used if s.leaf == path and s.role == LOOKUP]
        if lookups and _picked(lookups, used):
            roles.append((path, LOOKUP))
        elif not lookups and any(s.leaf == path for s in used):
            roles.append((path, PROJECTION))
    return tuple(roles)


def _picked(lookups: Iterable[CallSite], sites: Sequence[CallSite]) -> bool:
    """Returns whether some lookups pick rows in any case: by index, or of what is a head, too."""
    return any(
        pick.operation != "dot_general" or any(set(s.rows) & set(pick.cols) for s in sites)
        for pick in lookups
    )


def _transposed(site: CallSite) -> CallSite:
    def flip(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(1 - a for a in axes))

    return dataclasses.replace(site, rows=flip(site.rows), cols=flip(site.cols))


def _name(key: str) -> str:
    """Returns by what name a config would mean a leaf."""
    return leaf_name(module_of(key)) or key


def _unknown_axes(key: str, leaf: Any, sites: CallSites | None, every: Sequence[CallSite]) -> str:
    start = (
        f"wrap: {key!r} {describe(leaf)} has {len(leaf.shape)} axes, and which of them are rows "
    )
    said = f'LoraConfig(axes={{"{_name(key)}": (rows, columns)}})'
    if sites is None:
        return (
            f"{start}needs to be traced: {SITES_LINE}; wrap(params, config, sites=sites). Or say "
            f"so: {said}"
        )
    if not every:
        return (
            f"{start}is not known, as it is read at none of these sites; trace a call that reads "
            f"it, and unite them: {SITES_LINE}; sites1 | sites2. Or say so: {said}"
        )
    how = ", ".join(dict.fromkeys(s.operation for s in every))
    return (
        f"{start}is not known, as it is not multiplied or looked up at these sites, but read by "
        f"{how} only. Take it out of target_modules, or say so: {said}"
    )


def _of_sites(key: str, leaf: Any, used: Sequence[CallSite]) -> _Sides:
    rows: set[int] = set()
    cols: set[int] = set()
    for site in used:
        site_rows, site_cols = set(site.rows), set(site.cols)
        straight = site_rows & rows or site_cols & cols
        if not straight and (site_rows & cols or site_cols & rows):
            # A table's projection sums over what its lookups keep.
            site_rows, site_cols = site_cols, site_rows
        if site_rows & site_cols:
            raise ValueError(
                f"wrap: {site} has rows and columns of {key!r} {describe(leaf)} in one axis, which "
                "no factors can follow; take it out of target_modules, or say what its axes are: "
                f'axes={{"{_name(key)}": (rows, columns)}}, and have it materialised there'
            )
        if not site_rows or not site_cols:
            raise ValueError(
                f"wrap: {site} leaves {key!r} {describe(leaf)} without rows or without columns "
                f"(rows {site.rows}, columns {site.cols}), so there is nothing of low rank; take "
                f'it out of target_modules, or say which it has: axes={{"{_name(key)}": '
                "(rows, columns)}"
            )
        if (rows | site_rows) & (cols | site_cols):
            other = next((s for s in used if _clash(s, site)), used[0])
            raise ValueError(
                f"wrap: {key!r} {describe(leaf)} is used in two ways that no one pair of factors "
                "serves:\n"
                f"  {other}: rows {other.rows}, columns {other.cols}\n"
                f"  {site}: rows {site.rows}, columns {site.cols}\n"
                "Take it out of target_modules; or say what its axes shall be, those in dispute "
                f'being neither, with factors for each entry: axes={{"{_name(key)}": (rows, '
                "columns)}; or give each use a leaf of its own"
            )
        rows |= site_rows
        cols |= site_cols
    return rows, cols


def _clash(one: CallSite, two: CallSite) -> bool:
    """Returns whether no labelling of axes as rows and columns is that of both sites."""
    straight = (set(one.rows) | set(two.rows)) & (set(one.cols) | set(two.cols))
    swapped = (set(one.rows) | set(two.cols)) & (set(one.cols) | set(two.rows))
    return bool(straight and swapped)


def _of_config(group: TieGroup, leaf: Any, said: Mapping[str, Any]) -> _Sides | None:
    """Returns what the config says of a group's axes, in the canonical leaf's layout."""
    by_member: dict[str, _Sides] = {}
    for member in group.members:
        sides = said_of(said, member.path)
        if sides is None:
            continue
        shape = tuple(leaf.shape)[::-1] if member.transposed else tuple(leaf.shape)
        where = f"wrap: axes={{...: {sides}}} for {member.path!r} {list(shape)}"
        ndim = len(shape)
        for axis in (*sides[0], *sides[1]):
            if not -ndim <= axis < ndim:
                raise ValueError(f"{where}, which has no axis {axis}; expected 0 to {ndim - 1}")
        rows, cols = ([a % ndim for a in side] for side in sides)
        if len({*rows, *cols}) != len(rows) + len(cols):
            raise ValueError(
                f"{where}: an axis is there twice; expected each axis once, as one of the rows or "
                "of the columns, or in neither"
            )
        if member.transposed:
            rows, cols = ([1 - a for a in side] for side in (rows, cols))
        by_member[member.path] = set(rows), set(cols)
    if not by_member:
        return None
    first, *others = by_member
    for other in others:
        if by_member[other] != by_member[first]:
            raise ValueError(
                f"wrap: axes says {by_member[first]} of {first!r} and {by_member[other]} of "
                f"{other!r}, in the layout of {group.key!r}, which both are; say one thing"
            )
    return by_member[first]


def _check_of_config(key: str, leaf: Any, sides: _Sides, used: Sequence[CallSite]) -> None:
    """Refuses axes that a call site uses otherwise; a table's projections sum over its columns."""

    def fits(rows: set[int], cols: set[int], site: CallSite) -> bool:
        summed, kept = set(site.rows), set(site.cols)
        apart = not (rows & kept or cols & summed)
        return apart and bool(not summed or rows & summed) and bool(not kept or cols & kept)

    sites = [s for s in used if not set(s.rows) & set(s.cols)]
    rows, cols = sides
    odd = [s for s in sites if not fits(rows, cols, s) and not fits(cols, rows, s)]
    if sites and not odd and not any(fits(rows, cols, s) for s in sites):
        odd = sites
    if odd:
        raise ValueError(
            f"wrap: axes says that {key!r} {describe(leaf)} has rows {tuple(sorted(rows))} and "
            f"columns {tuple(sorted(cols))}, and it is used otherwise:\n"
            f"  {odd[0]}: rows {odd[0].rows}, columns {odd[0].cols}, walked {odd[0].batch}\n"
            "Rows are what is summed over or picked from, columns what is kept; take the leaf out "
            "of axes, or leave axes out that it has in either"
        )
