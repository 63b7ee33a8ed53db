"""Which axes of a targeted leaf are rows, columns and batch: from its call sites."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax_tied_lora._paths import describe
from flax_tied_lora._sites import LOOKUP, OTHER, CallSite, CallSites
from flax_tied_lora._tie_sources import TieGroup, is_table

SITES_LINE = 'sites = tied_lora.trace(model.apply, {"params": params}, tokens)'


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a group's canonical leaf are rows, columns and batch."""

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    batch: tuple[int, ...]
    is_table: bool


def axes_of(group: TieGroup, leaf: Any, sites: CallSites | None) -> Axes:
    """Returns the axes of a group, from its call sites; two axes need none.

    Raises:
      ValueError: the leaf has more than two axes and no site says which are rows; or two sites
        disagree.
    """
    ndim = len(leaf.shape)
    flips = {m.path: m.transposed for m in group.members}
    used = [
        _turned(s) if flips[s.leaf] else s
        for s in (sites or CallSites()).of(*group.paths)
        if s.role != OTHER
    ]
    if not used:
        if ndim == 2:
            return Axes((0,), (1,), (), is_table(group.key))
        why = (
            "needs to be traced"
            if sites is None
            else "is not multiplied or looked up in these sites"
        )
        raise ValueError(
            f"wrap: {group.key!r} {describe(leaf)} has {ndim} axes, and which of them are rows "
            f"{why}: {SITES_LINE}; wrap(params, config, sites=sites)"
        )
    lookups = [s for s in used if s.role == LOOKUP]
    first = (lookups or used)[0]
    batch = tuple(i for i in range(ndim) if i not in (*first.rows, *first.cols))
    for site in used:
        _check_agreement(group.key, leaf, first, site)
    if not first.rows or not first.cols:
        raise ValueError(
            f"wrap: {first} leaves {group.key!r} {describe(leaf)} without rows or without columns "
            f"(rows {first.rows}, columns {first.cols}), so there is nothing of low rank; take it "
            "out of target_modules"
        )
    return Axes(first.rows, first.cols, batch, bool(lookups))


def _turned(site: CallSite) -> CallSite:
    def flip(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(1 - a for a in axes))

    return dataclasses.replace(site, rows=flip(site.rows), cols=flip(site.cols))


def _check_agreement(key: str, leaf: Any, first: CallSite, site: CallSite) -> None:
    def sides(s: CallSite) -> set[frozenset[int]]:
        return {frozenset(s.rows), frozenset(s.cols)}

    mixed = set(site.rows) & set(site.cols)
    if sides(site) != sides(first) or mixed:
        raise ValueError(
            f"wrap: {key!r} {describe(leaf)} is used in two ways that no one pair of factors "
            "serves:\n"
            f"  {first}: rows {first.rows}, columns {first.cols}\n"
            f"  {site}: rows {site.rows}, columns {site.cols}\n"
            "Take it out of target_modules"
        )
